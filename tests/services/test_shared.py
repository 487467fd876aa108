"""A budget that tasks share: two rows, two locks, one charge, on a real server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC
from typing import TYPE_CHECKING

import pytest

from aioworker.budget import run_time, tables
from aioworker.budget.pace import budget_key
from aioworker.budget.run_time import Change
from aioworker.budget.shared import Shared, SharedBudget
from aioworker.errors import DatabaseError, TurnLostError
from aioworker.limits import RateLimit
from aioworker.reasons import ReasonKind
from aioworker.words import moment
from tests.conftest import Run, execute, make_database, rows, simple_addons

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

    from aioworker.mysql.database import Database
    from support.servers import Servers

KEY = budget_key("writes")
LEFT, RIGHT = "shop.left", "shop.right"
ALIVE = (
    "INSERT INTO aioworker_worker (id, host, pid, task, version, session, state, reason, since,"
    f" seen, shares) VALUES ('{{}}', 'web1', 7, '{LEFT}', '1', 1, 'waiting', '', SYSDATE(6),"
    " SYSDATE(6), {})"
)
LONG_AGO = "UPDATE aioworker_budget SET last_start = '2000-01-01', last_charge = last_start"


class Fleet:
    """Makes workers' budgets of tasks, each on a connection of its own."""

    def __init__(self, pair: Servers) -> None:
        self.databases: dict[SharedBudget, Database] = {}
        self._pair = pair

    def __call__(
        self,
        task: str,
        own: str | None = None,
        shared: str | None = "1/h",
        *,
        name: str = "writes",
        gather_seconds: float = 0.0,
    ) -> SharedBudget:
        """Make one more."""
        database = make_database(self._pair)
        rate = None if own is None else RateLimit.parse(own)
        both = None if shared is None else Shared(name, RateLimit.parse(shared))
        budget = SharedBudget(
            database,
            task,
            rate,
            f"worker:{len(self.databases) + 1}",
            gather_seconds=gather_seconds,
            shared=both,
        )
        self.databases[budget] = database
        return budget


@pytest.fixture
async def make(pair: Servers, shop: Connection[Cursor], database: Database) -> AsyncIterator[Fleet]:
    """Budgets on the rows that init makes."""
    simple_addons(shop, 1)
    await tables.add_rows(database, [LEFT, RIGHT, KEY])
    fleet = Fleet(pair)
    yield fleet
    for opened in fleet.databases.values():
        opened.close()


async def start(budget: SharedBudget) -> str:
    """Begin a start in a turn of its own; return why not, without the moment."""
    wait = await budget.check()
    if wait is None:
        async with budget.turn() as wait:
            wait = wait or await budget.charge(["one"])
    return "" if wait is None else wait.reason.words.partition(" at ")[0]


def charged(shop: Connection[Cursor]) -> dict[str, int]:
    """Return how many starts each row counts."""
    found = rows(shop, "SELECT task, starts FROM aioworker_budget WHERE task LIKE '%:%' OR starts")
    return dict(found)


async def test_starts_of_all_tasks_are_an_interval_apart(
    make: Fleet, shop: Connection[Cursor]
) -> None:
    left, right = make(LEFT), make(RIGHT)
    assert await start(left) == ""

    assert await start(right) == "budget writes: next start"

    assert charged(shop) == {KEY: 1, LEFT: 1}
    [[one, other]] = rows(
        shop,
        "SELECT MIN(last_charge), MAX(last_charge) FROM aioworker_budget WHERE starts > 0",
    )
    assert (other - one).total_seconds() < 0.1


async def test_a_tasks_own_limit_holds_besides(make: Fleet, shop: Connection[Cursor]) -> None:
    left, right = make(LEFT, "1/h", "1000/s"), make(RIGHT, None, "1000/s")
    assert await start(left) == ""
    await asyncio.sleep(0.01)

    assert await start(left) == "budget: next start"
    assert await start(right) == ""
    assert charged(shop) == {KEY: 2, LEFT: 1, RIGHT: 1}


async def test_never_two_at_once(make: Fleet) -> None:
    """The lock of the task is given back if the other one cannot be had: it blocks no third."""
    left, right = make(LEFT, None, "1000/s"), make(RIGHT, None, "1000/s")
    await left.check()
    await right.check()
    async with left.turn() as wait:
        assert wait is None
        async with right.turn() as refused:
            assert refused is not None
            assert refused.reason.kind is ReasonKind.TURN_UNOWNED
            assert refused.reason.words.startswith("budget writes: turn: held by session ")
        again = make(RIGHT, None, "1000/s")
        await again.check()
        async with again.turn() as refused:
            assert refused is not None
            assert refused.reason.words.startswith("budget writes: ")

    async with right.turn() as wait:
        assert wait is None


@pytest.mark.parametrize(
    ("row", "hindrance"),
    [
        *((row, "paused = TRUE") for row in (LEFT, KEY)),
        *((row, "gap_us = 3600000000") for row in (LEFT, KEY)),
        *((row, "server = 'elsewhere'") for row in (LEFT, KEY)),
        (LEFT, "shares = NULL"),
    ],
)
async def test_both_rows_are_charged_or_none(
    make: Fleet, shop: Connection[Cursor], row: str, hindrance: str
) -> None:
    """Whatever comes between the look and the charge."""
    left = make(LEFT, "100/s", "100/s")
    assert await start(left) == ""
    await asyncio.sleep(0.05)
    before = charged(shop)
    assert await left.check() is None
    async with left.turn() as wait:
        assert wait is None
        execute(shop, f"UPDATE aioworker_budget SET {hindrance} WHERE task = '{row}'")
        assert await left.charge(["two"]) is not None

    assert charged(shop) == before
    assert rows(shop, "SELECT message FROM aioworker_run WHERE message = 'two'") == []
    assert rows(shop, "SELECT COUNT(*) FROM aioworker_start") == [(1,)]


async def test_the_first_write_stamps_both_rows(make: Fleet, shop: Connection[Cursor]) -> None:
    left = make(LEFT, "100/s", "100/s")
    await left.check()
    async with left.turn():
        await left.charge(["one"])
        async with make.databases[left].transaction() as cursor:
            await cursor.execute("UPDATE addons SET current_version = NULL")

    found = rows(
        shop,
        "SELECT last_write, last_start = last_write FROM aioworker_budget"
        f" WHERE task IN ('{LEFT}', '{KEY}')",
    )
    assert len({write for write, _ in found}) == 1
    assert all(same for _, same in found)


@pytest.mark.parametrize("lost", [LEFT, KEY])
async def test_a_lock_that_is_lost_ends_the_run(
    make: Fleet, shop: Connection[Cursor], lost: str
) -> None:
    """Of either row: whoever has it may run."""
    left = make(LEFT, "100/s", "100/s")
    await left.check()
    database = make.databases[left]
    name = tables.lock_name(await database.schema(), lost)
    with pytest.raises(TurnLostError):
        async with left.turn():
            await left.charge(["one"])
            await database.query("SELECT RELEASE_LOCK(%s)", (name,))
            async with database.transaction() as cursor:
                await cursor.execute("UPDATE addons SET current_version = 10001")

    assert rows(shop, "SELECT current_version FROM addons") == [(None,)]


async def test_a_first_write_is_due_by_the_moment_at_which_each_row_is_read(
    make: Fleet, shop: Connection[Cursor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A busy server takes its time between them."""
    slow = tables._FIND.replace("bulk_next,", "bulk_next + SLEEP(0.02),")
    left, right = make(LEFT, None, "1/h"), make(RIGHT, None, "1/h")
    await right.check()
    async with right.turn():
        await right.charge(["one"])
        await make.databases[right].execute("UPDATE addons SET current_version = NULL")
    monkeypatch.setattr(tables, "_FIND", slow)

    await left.check()

    [[due]] = rows(
        shop, f"SELECT last_write + INTERVAL 1 HOUR FROM aioworker_budget WHERE task = '{KEY}'"
    )
    assert left._write_due.moment >= due.replace(tzinfo=UTC)


async def test_a_pause_of_the_budget_holds_all_its_tasks(
    make: Fleet, shop: Connection[Cursor]
) -> None:
    left, right, alone = make(LEFT), make(RIGHT), make("update_current_version", "1/s", None)
    await run_time.pause(make.databases[left], KEY, Change("dba", "paused"))

    assert (await start(left)).startswith("budget writes: paused by dba since ")
    assert (await start(right)).startswith("budget writes: paused by dba since ")
    assert await start(alone) == ""


async def test_a_rate_of_the_budget_at_run_time_acts_on_all(make: Fleet) -> None:
    left, right = make(LEFT), make(RIGHT)
    assert await start(left) == ""
    await run_time.set_rate(make.databases[left], KEY, 1000, Change("dba", "faster"))
    await asyncio.sleep(0.01)

    assert await start(right) == ""


async def test_without_any_limit_nothing_is_counted(make: Fleet, shop: Connection[Cursor]) -> None:
    left = make(LEFT)
    await run_time.set_rate(make.databases[left], KEY, 0, Change("dba", "none"))

    assert await start(left) == ""

    assert not left.limited
    assert charged(shop) == {KEY: 0}


async def test_its_row_is_missed_by_its_name(make: Fleet, shop: Connection[Cursor]) -> None:
    execute(shop, f"DELETE FROM aioworker_budget WHERE task = '{KEY}'")

    with pytest.raises(DatabaseError, match="budget 'writes' has no row in aioworker_budget"):
        await make(LEFT).check()


async def test_a_budget_without_a_limit_is_nobodys_to_wait_for(make: Fleet) -> None:
    left, right = make(LEFT, "100/s"), make(RIGHT, "100/s")
    await run_time.set_rate(make.databases[left], KEY, 0, Change("dba", "none"))
    await left.check()
    await right.check()

    async with left.turn() as wait:
        assert wait is None
        assert await left.charge(["one"]) is None
        async with right.turn() as other:
            assert other is None


async def test_a_limit_that_comes_in_a_turn_of_the_task_alone_is_waited_for(make: Fleet) -> None:
    left = make(LEFT, "100/s")
    await run_time.set_rate(make.databases[left], KEY, 0, Change("dba", "none"))
    await left.check()
    await run_time.set_rate(make.databases[left], KEY, None, Change("dba", "reset"))

    async with left.turn() as wait:
        assert wait is not None
        assert wait.reason.words == "budget: its row was changed meanwhile"

    assert await start(left) == ""


async def test_who_wants_and_cannot_start_keeps_nobody_waiting(
    make: Fleet, shop: Connection[Cursor]
) -> None:
    """Its place in the order passes, as that of a task whose workers have died."""
    right = make(RIGHT, None, "6/m")
    assert await start(right) == ""
    execute(shop, f"UPDATE aioworker_budget SET shares = 'writes' WHERE task = '{LEFT}'", LONG_AGO)
    await tables.want(make.databases[right], LEFT, urgent=True, bulk=True)
    await right.want(urgent=False, bulk=True)

    later = make(RIGHT, None, "6/m")

    assert await start(later) == ""


async def test_who_goes_first_takes_the_turn_first_however_long_others_gather(
    make: Fleet, shop: Connection[Cursor]
) -> None:
    """A long lead would else win every start."""
    assert await start(make(LEFT, None, "6/m")) == ""
    earlier = ", ".join(
        f"last_{one} = last_{one} - INTERVAL 5 SECOND" for one in ("charge", "write")
    )
    execute(shop, f"UPDATE aioworker_budget SET {earlier}, last_start = last_charge WHERE starts")
    left, right = make(LEFT, None, "6/m", gather_seconds=20), make(RIGHT, None, "6/m")
    assert await left.check() is None, "it gathers already"
    await left.want(urgent=False, bulk=True)
    await right.check()
    await right.want(urgent=True, bulk=False)

    first, second = await right.check(), await left.check()

    assert first is not None
    assert second is not None
    assert first.reason.words.endswith(" UTC")
    assert second.reason.words.endswith(f" UTC, of {RIGHT} first")


@pytest.mark.parametrize(("urgent_starts", "bulk"), [(1, False), (2, True)])
async def test_after_urgent_starts_of_all_tasks_one_begins_with_the_bulk_lane(
    make: Fleet, shop: Connection[Cursor], urgent_starts: int, bulk: bool
) -> None:
    left, right = make(LEFT, None, "1000/s"), make(RIGHT, None, "1000/s")
    for budget in (left, right):
        await budget.check()
        await budget.want(urgent=True, bulk=True)
    for _ in range(urgent_starts):
        async with left.turn():
            assert await left.charge(["one"], bulk_next=True) is None

    await left.check()
    await right.check()

    assert (left.bulk_next, right.bulk_next) == (bulk, bulk)


async def test_workers_of_two_new_codes_do_not_wait_for_each_other(
    make: Fleet, shop: Connection[Cursor], database: Database
) -> None:
    """The first one's counts; the other one waits for it."""
    await tables.add_rows(database, [budget_key("others")])
    for name in ("writes", "others"):
        execute(shop, ALIVE.format(name[0], f"'{name}'"))
    one, other = make(LEFT, None, "1000/s"), make(LEFT, None, "1000/s", name="others")

    assert await start(one) == ""

    wait = await other.check()
    assert wait is not None
    assert wait.reason.words.endswith("by whose code shop.left shares budget writes")
    await asyncio.sleep(0.01)
    assert await start(one) == ""


async def test_a_worker_of_other_code_waits_for_those_of_the_old(
    make: Fleet, shop: Connection[Cursor]
) -> None:
    """From no budget to one and back: by the rows of the workers that are alive."""
    execute(shop, ALIVE.format("a", "NULL"))
    wait = await make(LEFT).check()
    assert wait is not None
    assert wait.reason.kind is ReasonKind.OTHER_BUDGET
    assert wait.reason.words == (
        "waiting for the end of web1:7, by whose code shop.left shares no budget"
    )
    assert await start(make(LEFT, "1/h", None)) == "", "the old ones go on"

    execute(shop, "UPDATE aioworker_worker SET seen = SYSDATE(6) - INTERVAL 50 SECOND")
    [[gone_at]] = rows(shop, "SELECT seen + INTERVAL 90 SECOND FROM aioworker_worker")
    late = await make(LEFT).check()
    assert late is not None
    assert late.reason.words == (
        f"{wait.reason.words}; unless it is seen again, until {moment(gone_at)}"
    )

    execute(shop, "DELETE FROM aioworker_worker")
    assert await start(make(LEFT)) == ""
    assert rows(shop, f"SELECT shares FROM aioworker_budget WHERE task = '{LEFT}'") == [("writes",)]

    execute(shop, LONG_AGO, ALIVE.format("a", "'writes'"))
    back = await make(LEFT, "1/h", None).check()
    assert back is not None
    assert back.reason.words.endswith("shares budget writes")
    execute(shop, "UPDATE aioworker_worker SET seen = SYSDATE(6) - INTERVAL 91 SECOND")
    assert await start(make(LEFT, "1/h", None)) == "", "the old one has not been seen for long"
    assert rows(shop, f"SELECT shares FROM aioworker_budget WHERE task = '{LEFT}'") == [(None,)]


async def test_the_commands_name_a_budget(make: Fleet, run: Run, shop: Connection[Cursor]) -> None:
    """By an option of its own, beside tasks in what shows all."""
    assert await start(make(LEFT, None, "1/s")) == ""

    paused = run("pause", "--budget", "writes", "--for", "2h", "--reason", "copy").stdout
    status = run("status", "--budget", "writes").stdout.splitlines()
    rate = run("rate-limit", "--budget", "writes", "10/m").stdout
    told = json.loads(run("status", "--budget", "writes", "--json").stdout)
    history = run("history").stdout.splitlines()
    audit = run("audit", "--budget", "writes").stdout.splitlines()
    resumed = run("resume", "--all").stdout.splitlines()

    assert paused.startswith("budget writes: paused until ")
    assert status[:2] == ["budget     writes", f"tasks      {LEFT}"]
    assert status[2].startswith("paused     paused by ")
    assert status[3] == "rate       60/m of all workers, the workers' own"
    assert rate.startswith(
        "budget writes: rate limit 10/m, run time (was each worker's own); still"
    )
    assert (told["tasks"], told["limit"]["rate"], told["limit"]["starts"]) == ([LEFT], "10/m", 1)
    assert [line[25:].partition(" by ")[0] for line in history] == [
        f"{LEFT}  start 1",
        "budget writes  paused for 2 h,",
        "budget writes  rate limit 10/m,",
    ]
    assert audit[:2] == ["budget        writes", "rate          kept"]
    assert resumed[-1] == "budget writes: resumed, rate limit 10/m, run time"


async def test_a_turn_that_cannot_be_read_is_given_back(
    make: Fleet, shop: Connection[Cursor]
) -> None:
    """Nobody would get its locks from a session that only looks from then on."""
    left = make(LEFT)
    await left.check()
    execute(shop, "ALTER TABLE aioworker_budget RENAME COLUMN shares TO gone")

    with pytest.raises(DatabaseError):
        async with left.turn():
            pytest.fail("taken")

    execute(shop, "ALTER TABLE aioworker_budget RENAME COLUMN gone TO shares")
    assert await start(make(RIGHT)) == ""
    assert await start(make(LEFT, None, "1000/s")) == ""


async def test_the_status_of_a_task_whose_budget_is_paused_promises_no_start(
    make: Fleet, run: Run, shop: Connection[Cursor]
) -> None:
    assert await start(make(LEFT, "1/h")) == ""
    execute(shop, ALIVE.format("a", "'writes'"))
    run("pause", "--budget", "writes", "--reason", "copy")

    found = run("status", LEFT).stdout.splitlines()
    history = run("history", LEFT).stdout.splitlines()

    assert "next start not while its budget is paused" in found
    [shares] = [line for line in found if line.startswith("shares")]
    assert shares.startswith("shares     budget writes: paused by ")
    assert not [line for line in found if line.startswith("done in")]
    assert [line[25:].partition(",")[0].partition(" by ")[0] for line in history] == [
        f"{LEFT}  start 1",
        "budget writes  paused",
    ]


async def test_the_rate_of_a_budget_is_that_of_its_last_start(
    make: Fleet, run: Run, shop: Connection[Cursor]
) -> None:
    """Only the tasks' code names it; what was set, or reset, since that start hides it."""

    def rate(*meant: str) -> str:
        found = run("status", *meant).stdout.splitlines()
        return next(line for line in found if line.startswith("rate ")).split(maxsplit=1)[1]

    none_yet = rate("--budget", "writes")
    execute(shop, ALIVE.format("b", "'writes'"))
    assert await make(LEFT, None, "1/s").check() is None
    assert "last start never" in run("status", LEFT).stdout.splitlines()
    assert await start(make(LEFT, None, "1/s")) == ""
    execute(shop, ALIVE.format("a", "'writes'"))
    of_all, of_the_task = rate("--budget", "writes"), rate(LEFT)
    for change in ("10/m", "--reset"):
        run("rate-limit", "--budget", "writes", change)

    assert none_yet.startswith("what the tasks' code says; no start has told it yet")
    assert of_all == "60/m of all workers, the workers' own"
    assert of_the_task == "the budget's alone"
    assert rate("--budget", "writes").startswith("what the tasks' code says")


@pytest.mark.parametrize("command", [("pause",), ("status",), ("audit",), ("rate-limit", "2/m")])
def test_a_budget_that_is_not_there_is_refused_in_one_line(
    make: Fleet, run: Run, command: tuple[str, ...]
) -> None:
    refused = run(*command, "--budget", "wirtes")

    assert (refused.returncode, refused.stderr) == (
        2,
        "aioworker: unknown budget 'wirtes': there are: writes\n",
    )
