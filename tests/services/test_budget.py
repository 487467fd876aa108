"""The shared budget against a real server: one row, one turn, that server's clock."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest

from aioworker.budget import tables
from aioworker.budget.shared import SharedBudget
from aioworker.budget.tables import Row, find_row
from aioworker.errors import DatabaseError, TurnLostError
from aioworker.limits import RateLimit, Wait
from aioworker.mysql.database import Database
from aioworker.reasons import Reason, ReasonKind
from tests.conftest import TASK, Run, execute, make_database, rows, simple_addons

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

    from support.servers import Servers


class Fleet:
    """Makes workers' budgets, each on a connection of its own."""

    def __init__(self, pair: Servers) -> None:
        self.databases: list[Database] = []
        self._pair = pair

    def __call__(self, rate: str | None = "1/h") -> SharedBudget:
        """Make one more."""
        database = make_database(self._pair)
        self.databases.append(database)
        limit = RateLimit.parse(rate) if rate else None
        return SharedBudget(database, TASK, limit, f"worker:{len(self.databases)}")


@pytest.fixture
async def make(pair: Servers, shop: Connection[Cursor]) -> AsyncIterator[Fleet]:
    """Budgets on the row that init makes."""
    fleet = Fleet(pair)
    yield fleet
    for database in fleet.databases:
        database.close()


async def row(database: Database) -> Row:
    """Return the task's row."""
    found = await find_row(database, TASK)
    assert found is not None
    return found


async def start(budget: SharedBudget) -> Wait | None:
    """Begin a start in a turn of its own; return why not."""
    async with budget.turn() as wait:
        return wait or await budget.charge(["one"])


async def looked(budget: SharedBudget) -> str:
    """Return the reason that a look gives, without the moment; nothing when a start is due."""
    wait = await budget.check()
    return "" if wait is None else wait.reason.words.partition(" at ")[0]


async def test_the_first_start_is_free_and_the_second_waits(
    make: Fleet, database: Database
) -> None:
    budget, other = make(), make()
    assert await looked(budget) == ""

    assert await start(budget) is None

    assert await looked(budget) == await looked(other) == "budget: next start"
    assert (await row(database)).starts == 1
    assert (await row(database)).holder == "worker:1"


async def test_a_new_process_knows_of_the_last_start(make: Fleet) -> None:
    """The row remembers; a crash loop starts nothing early."""
    first = make()
    await first.check()
    await start(first)

    wait = await make().check()

    assert wait is not None
    assert wait.reason.words.startswith("budget: next start at ")


async def test_one_turn_at_a_time(make: Fleet, shop: Connection[Cursor]) -> None:
    """The second contender is told who has it; nothing of it waits in the row."""
    budget, other = make(), make()
    await budget.check()
    await other.check()
    execute(
        shop,
        "INSERT INTO aioworker_worker SELECT 'id', 'host', 77, task, '1', NULL, 0, 'running', '',"
        " SYSDATE(6), SYSDATE(6), 'running', NULL, NULL FROM aioworker_budget",
    )

    async with budget.turn() as wait:
        assert wait is None
        [[session]] = rows(shop, "SELECT IS_USED_LOCK(%s)", lock(make))
        execute(shop, f"UPDATE aioworker_worker SET session = {session}")
        async with other.turn() as refused:
            assert refused is not None
            assert refused.reason == Reason(ReasonKind.TURN, "turn: held by host:77")

    async with other.turn() as wait:
        assert wait is None


def lock(make: Fleet) -> str:
    """Return the name of the turn's lock."""
    return tables.lock_name(make.databases[0].address.database, TASK)


async def test_a_start_without_the_turn_is_never_charged(make: Fleet, database: Database) -> None:
    budget = make()
    await budget.check()

    with pytest.raises(TurnLostError):
        await budget.charge(["one"])

    assert (await row(database)).starts == 0


async def test_the_first_commit_of_a_run_stamps_the_row_again(
    make: Fleet, shop: Connection[Cursor]
) -> None:
    """A worker frozen between its charge and its write would else write too near to the next."""
    simple_addons(shop, 2)
    budget = make()
    await budget.check()
    [worker] = make.databases

    async with budget.turn():
        await budget.charge(["one"])
        charged = rows(shop, "SELECT last_start FROM aioworker_budget")
        await worker.execute("UPDATE addons SET current_version = 10001 WHERE id = 1")
        stamped = rows(shop, "SELECT last_start FROM aioworker_budget")
        await worker.execute("UPDATE addons SET current_version = 10002 WHERE id = 2")
        after = rows(shop, "SELECT last_start FROM aioworker_budget")

    assert charged < stamped == after


async def test_a_transaction_that_writes_nothing_does_not_use_up_the_stamp(
    make: Fleet, shop: Connection[Cursor]
) -> None:
    """Else a run that reads first, and is frozen then, would write too near to the next one."""
    simple_addons(shop, 1)
    budget = make()
    await budget.check()
    [worker] = make.databases

    async with budget.turn():
        await budget.charge(["one"])
        async with worker.transaction() as cursor:
            await cursor.execute("SELECT id FROM addons")
            await cursor.execute("UPDATE addons SET current_version = 1 WHERE id = 404")
        read = rows(shop, "SELECT last_start FROM aioworker_budget")
        await worker.execute("UPDATE addons SET current_version = 10001 WHERE id = 1")
        written = rows(shop, "SELECT last_start FROM aioworker_budget")

    assert read < written


async def test_a_run_looks_for_a_pause_once_a_second(
    make: Fleet, shop: Connection[Cursor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself, or of the budget; a look costs one statement, and a start none."""
    budget = make()
    await budget.check()

    async with budget.turn():
        await budget.charge(["one"])
        execute(shop, "UPDATE aioworker_budget SET paused = TRUE, paused_by = 'alice'")
        at_once = await budget.stops_run()
        monkeypatch.setattr("aioworker.budget.shared.LOOK_SECONDS", 0)
        later = await budget.stops_run()
        execute(shop, "UPDATE aioworker_budget SET paused = FALSE")
        resumed = await budget.stops_run()

    assert (at_once, resumed) == (None, None)
    assert later == Reason(ReasonKind.PAUSED, "paused by alice")


async def test_a_rate_taken_back_in_a_turn_is_not_charged_any_more(
    make: Fleet, shop: Connection[Cursor], database: Database
) -> None:
    """The workers' own interval holds from the moment of the reset, not from the next look."""
    budget = make("1/h")
    await budget.check()
    await start(budget)
    execute(shop, "UPDATE aioworker_budget SET gap_us = 1")
    await budget.check()

    async with budget.turn() as wait:
        assert wait is None
        execute(shop, "UPDATE aioworker_budget SET gap_us = NULL")
        refused = await budget.charge(["one"])

    assert refused is not None
    assert refused.reason.words.startswith("budget: next start at ")
    assert (await row(database)).starts == 1


async def test_a_start_that_is_called_off_leaves_the_bulk_lane_its_turn(
    make: Fleet, shop: Connection[Cursor], database: Database
) -> None:
    budget = make("100/s")
    await budget.check()
    async with budget.turn():
        assert await budget.charge(["one"], bulk_next=True) is None

    async with budget.turn():
        execute(shop, "UPDATE aioworker_budget SET paused = 1")
        assert await budget.charge(["two"]) is not None

    assert (await row(database)).bulk_next is True


@pytest.mark.parametrize("gap_us", [3 * 10**18, 2**64 - 1])
async def test_an_interval_beyond_any_calendar_is_a_long_one(
    make: Fleet, shop: Connection[Cursor], gap_us: int
) -> None:
    """A DBA's typing error stops the starts, not the workers."""
    budget = make()
    await budget.check()
    await start(budget)

    execute(shop, f"UPDATE aioworker_budget SET gap_us = {gap_us}")

    assert await looked(budget) == "budget: next start"


async def test_a_run_that_lost_its_turn_writes_nothing(
    make: Fleet, shop: Connection[Cursor]
) -> None:
    simple_addons(shop, 1)
    budget = make()
    await budget.check()
    [worker] = make.databases

    with pytest.raises(TurnLostError):
        async with budget.turn():
            await budget.charge(["one"])
            await worker.query("SELECT RELEASE_LOCK(%s)", (lock(make),))
            await worker.execute("UPDATE addons SET current_version = 10001")

    assert rows(shop, "SELECT current_version FROM addons") == [(None,)]


async def test_a_run_whose_connection_is_killed_cannot_go_on_with_another(
    make: Fleet, shop: Connection[Cursor]
) -> None:
    """The turn went with the connection: somebody else may have it by now."""
    simple_addons(shop, 1)
    budget, other = make(), make()
    await budget.check()
    await other.check()
    worker = make.databases[0]

    with pytest.raises(DatabaseError, match="lost in a run"):
        async with budget.turn():
            session = (await row(worker)).session
            execute(shop, f"KILL {session}")
            with pytest.raises(Exception, match=r"Lost connection|gone away|killed"):
                await worker.query("SELECT 1")
            await worker.execute("UPDATE addons SET current_version = 10001")

    assert rows(shop, "SELECT current_version FROM addons") == [(None,)]
    async with other.turn() as wait:
        assert wait is None


@pytest.mark.parametrize(
    "change", ["last_start = SYSDATE(6) + INTERVAL 10 YEAR", "server = 'another:3306:1'"]
)
async def test_another_clock_costs_one_interval_at_most(
    make: Fleet, shop: Connection[Cursor], change: str
) -> None:
    """A clock set back, or a promoted replica: not ten years, and no start at once."""
    execute(shop, f"UPDATE aioworker_budget SET {change}")
    budget = make("2/s")
    loop = asyncio.get_running_loop()

    assert await looked(budget) == "budget: next start"
    began = loop.time()
    while await budget.check() is not None:  # noqa: ASYNC110 - the server's clock is waited for
        await asyncio.sleep(0.01)
    assert await start(budget) is None

    assert 0.45 < loop.time() - began < 5


UNLIKELY = ["0", "'0000-05-05'", "'0001-01-01'", "'9999-12-31 23:59:59.999999'"]


@pytest.mark.parametrize("column", ["last_start", "last_charge", "last_write"])
@pytest.mark.parametrize("moment", UNLIKELY)
async def test_a_start_beyond_any_calendar_ends_no_worker_and_holds_none_up(
    make: Fleet, shop: Connection[Cursor], run: Run, column: str, moment: str
) -> None:
    """A DBA who lets a start begin writes `last_start = 0`: it was a TypeError, and never due."""
    budget = make("2/s")
    await budget.check()
    assert await start(budget) is None
    execute(
        shop,
        "SET SESSION sql_mode = ''",
        f"UPDATE aioworker_budget SET {column} = {moment}",
        "UPDATE aioworker_budget SET last_start = GREATEST(last_start, last_charge, last_write)",
    )
    if column == "last_start":
        execute(shop, f"UPDATE aioworker_budget SET last_start = {moment}")

    shown = run("status")
    async with asyncio.timeout(5):
        while await budget.check() is not None:  # noqa: ASYNC110 - the server's clock is waited for
            await asyncio.sleep(0.01)
        assert await start(budget) is None

    assert "Error" not in shown.stderr
    assert shown.returncode == 0
    assert await looked(budget) == "budget: next start"
    assert rows(shop, "SELECT last_start > NOW() - INTERVAL 9 SECOND FROM aioworker_budget") == [
        (1,)
    ]


@pytest.mark.parametrize("moment", UNLIKELY)
async def test_a_pause_beyond_any_calendar_is_a_pause(
    make: Fleet, shop: Connection[Cursor], run: Run, moment: str
) -> None:
    """By plain SQL: what is no time cannot be told, and ends nobody."""
    execute(
        shop,
        "SET SESSION sql_mode = ''",
        f"UPDATE aioworker_budget SET paused = 1, paused_at = {moment}, paused_by = 'me',"
        f" set_at = {moment}, set_by = 'me'",
    )

    shown = run("status")
    wait = await make().check()

    assert wait is not None
    assert wait.reason.kind is ReasonKind.PAUSED
    assert wait.reason.words.startswith("paused by me")
    assert shown.returncode == 0


async def test_only_init_makes_a_task_s_row(make: Fleet, shop: Connection[Cursor]) -> None:
    """A worker of another project, or of a task that is gone, leaves no trace here."""
    execute(shop, "DELETE FROM aioworker_budget")

    with pytest.raises(DatabaseError) as refused:
        await make().check()

    assert str(refused.value) == (
        f"task {TASK!r} has no row in aioworker_budget: run `aioworker init`"
    )
    assert rows(shop, "SELECT task FROM aioworker_budget") == []


async def test_a_rate_set_by_plain_sql_wins_and_is_said(
    make: Fleet, shop: Connection[Cursor], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "aioworker")
    budget = make("1/h")
    await budget.check()
    await start(budget)

    execute(
        shop,
        "UPDATE aioworker_budget SET gap_us = 1000, set_by = 'dba', set_why = 'night',"
        " set_at = UTC_TIMESTAMP(6)",
    )
    await asyncio.sleep(0.002)

    assert await looked(budget) == ""
    assert await start(budget) is None
    [record] = caplog.records
    assert record.message == "rate limit changed"
    assert vars(record)["fields"] == {
        "task": TASK,
        "old": "1/h",
        "new": "1000/s",
        "by": "dba",
        "why": "night",
    }


async def test_a_pause_stops_a_start_that_was_just_due(
    make: Fleet, shop: Connection[Cursor], database: Database
) -> None:
    """No start after a pause was committed, not even of a worker that has looked before."""
    budget = make("100/s")
    await budget.check()

    async with budget.turn() as wait:
        assert wait is None
        execute(
            shop,
            "UPDATE aioworker_budget SET paused = 1, paused_by = 'alice', paused_why = 'lag\n1',"
            " paused_at = '2026-01-02 03:04:05', set_by = 'bob'",
        )
        refused = await budget.charge(["one"])

    assert refused is not None
    assert refused.reason.words == "paused by alice since 2026-01-02 03:04:05 UTC: lag 1"
    assert (await row(database)).starts == 0


async def test_a_task_without_a_rate_follows_one_set_at_run_time(
    make: Fleet, shop: Connection[Cursor]
) -> None:
    budget = make(None)
    assert await looked(budget) == ""
    assert not budget.limited

    execute(shop, "UPDATE aioworker_budget SET gap_us = 3600000000")

    await budget.check()
    assert budget.limited


async def test_without_the_table_the_cure_is_named(make: Fleet, shop: Connection[Cursor]) -> None:
    execute(shop, "DROP TABLE aioworker_budget")

    with pytest.raises(DatabaseError) as refused:
        await make().check()

    assert str(refused.value).endswith(": run `aioworker init`, or set AIOWORKER_BUDGET=worker")
    assert "\n" not in str(refused.value)


def test_locks_of_long_names_and_of_two_sites_differ() -> None:
    """They are the whole server's: `prod` and `preview` must not wait for each other."""
    long = "t" * 99

    names = [
        tables.lock_name("prod", TASK),
        tables.lock_name("preview", TASK),
        tables.lock_name("prod", long + "a"),
        tables.lock_name("prod", long + "b"),
    ]

    assert len(set(names)) == 4
    assert max(map(len, names)) <= 64
