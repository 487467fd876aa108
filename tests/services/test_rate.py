"""The rate kept: whatever a run takes, charges and first writes are an interval apart, no more.

Judged by rows that the runs write, each with the server's time.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

from aioworker import Context
from aioworker.budget import tables
from aioworker.budget.first_write import NOTED, Usual
from aioworker.budget.shared import SharedBudget
from aioworker.limits import RateLimit
from aioworker.mysql import login
from aioworker.mysql.database import _reads
from aioworker.settling.outcome import Kind
from aioworker.tasks.task import Task
from tests.conftest import TASK, Lanes, database_name, execute, make_database, make_worker, rows

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

    from support.servers import Servers

Work = Callable[..., Any]
INTERVALS = 10
PART = 0.6
INSERT = "INSERT INTO written (at) VALUES (SYSDATE(6))"
# What a worker of an earlier version knows of the row.
OLD_CHARGE = f"""UPDATE aioworker_budget
SET last_start = SYSDATE(6), starts = starts + 1, holder = 'old', running = NULL
WHERE task = '{TASK}' AND NOT paused AND server = {tables.SERVER}
AND IS_USED_LOCK('{{lock}}') = CONNECTION_ID()
AND last_start <= SYSDATE(6) - INTERVAL COALESCE(gap_us, {{gap}}) MICROSECOND"""
OLD_STAMP = f"""UPDATE aioworker_budget SET last_start = SYSDATE(6)
WHERE task = '{TASK}' AND IS_USED_LOCK('{{lock}}') = CONNECTION_ID()"""


@pytest.fixture
def site(shop: Connection[Cursor]) -> Connection[Cursor]:
    """A table that the runs write to."""
    execute(shop, "CREATE TABLE written (id INT AUTO_INCREMENT PRIMARY KEY, at DATETIME(6))")
    return shop


@pytest.fixture
def work(pair: Servers, lanes: Lanes, site: object, stop: asyncio.Event) -> Work:
    """Send messages of a task, each with its arguments, and work until they are done."""

    async def until_done(
        function: Any, rate: str, messages: list[list[Any]], timeout: float = 30
    ) -> dict[Kind, int]:
        for number, args in enumerate(messages):
            await lanes.send(
                json.dumps([args, {}, None]).encode(), headers={"task": TASK, "id": str(number)}
            )
        database = make_database(pair, timeout=timeout)
        task = Task(TASK, function)
        worker = make_worker(pair, database, task=task, rate_limit=rate, task_timeout=timeout)
        await worker.run(stop)
        database.close()
        return dict(worker.consumer.settled)

    return until_done


def written(site: Connection[Cursor]) -> list[float]:
    """Return the seconds of all first writes, by the server's clock."""
    found = rows(site, "SELECT UNIX_TIMESTAMP(at) FROM written ORDER BY at")
    return [float(seconds) for [seconds] in found]


def least(seconds: list[float]) -> float:
    """Return the least distance of two."""
    return min(other - one for one, other in pairwise(seconds))


async def spend(ctx: Context, before: float, reading: float, writing: float) -> None:
    """Take time before a transaction, in it before the first write, and after that."""
    await asyncio.sleep(before)
    async with ctx.transaction() as cursor:
        await cursor.execute("SELECT 1")
        await asyncio.sleep(reading)
        await cursor.execute(INSERT)
        await asyncio.sleep(writing)


def spend_in_thread(ctx: Context, before: float, reading: float, writing: float) -> None:
    """The same in a function that is no coroutine."""
    time.sleep(before)
    with ctx.transaction() as cursor:
        cursor.execute("SELECT 1")
        time.sleep(reading)
        cursor.execute(INSERT)
        time.sleep(writing)


@pytest.mark.parametrize(
    ("function", "spent"),
    [
        pytest.param(spend, [PART, 0, 0], id="before the transaction"),
        pytest.param(spend, [0, PART, 0], id="in it, before the first write"),
        pytest.param(spend, [0, 0, PART], id="in it, after the first write"),
        pytest.param(spend_in_thread, [PART, 0, 0], id="before it, in a thread"),
    ],
)
async def test_what_a_run_takes_does_not_slow_the_rate(
    work: Work, site: Connection[Cursor], function: Any, spent: list[float]
) -> None:
    """At 1/s a run of 0.6 s started every 1.6 s, since its stamp was the moment of its commit."""
    await work(function, "1/s", [spent] * (INTERVALS + 1))

    seconds = written(site)
    assert INTERVALS / (seconds[-1] - seconds[0]) >= 0.8
    assert least(seconds) >= 1


async def read_nothing(ctx: Context) -> None:
    async with ctx.transaction() as cursor:
        await cursor.execute("SELECT 1")


async def read_before(ctx: Context, between: float) -> None:
    """Take time between a transaction that only reads and the one that writes."""
    await read_nothing(ctx)
    await spend(ctx, between, 0, 0)


async def read_often_before(ctx: Context, between: float) -> None:
    """The same, spread over more transactions that only read than habits are kept of."""
    for _ in range(NOTED + 4):
        await read_nothing(ctx)
        await asyncio.sleep(between / (NOTED + 4))
    await spend(ctx, 0, 0, 0)


async def perhaps_read_before(ctx: Context, between: float) -> None:
    """The same, or write at once."""
    if between:
        await read_before(ctx, between)
    else:
        await ctx.database.execute(INSERT)


@pytest.mark.parametrize(
    ("function", "parts"),
    [
        pytest.param(read_before, [PART], id="each run"),
        pytest.param(read_often_before, [PART], id="each run, often"),
        pytest.param(perhaps_read_before, [PART, 0], id="every second run"),
    ],
)
async def test_the_time_after_a_transaction_that_only_reads_does_not_slow_the_rate(
    work: Work, site: Connection[Cursor], function: Any, parts: list[float]
) -> None:
    """The whole wait came before that one, and that time on top: 1.6 s at 1/s."""
    interval = 0.5

    await work(function, "2/s", [[part * interval] for part in parts] * (INTERVALS + 1))

    seconds = written(site)[len(parts) :]  # the first ones show the worker what they take
    assert (len(seconds) - 1) * interval / (seconds[-1] - seconds[0]) >= 0.9
    assert least(seconds) >= 0.98 * interval


@pytest.mark.parametrize("quick", [1, 5, 15])
def test_slow_runs_among_quick_ones_are_late_by_less_than_a_twentieth(quick: int) -> None:
    """With 0.9 of the interval in every second run 0.947 of the starts began."""
    usual = Usual()
    usual.took(1)

    for _ in range(quick):
        usual.took(0)

    assert (1 - usual.seconds) / (quick + 1) < 0.05


async def test_a_run_that_is_soon_at_its_write_waits_for_the_first_write_before_it(
    work: Work, site: Connection[Cursor]
) -> None:
    """Charges an interval apart say nothing of writes: a slow run and a quick one wrote as one."""
    slow, quick = [0.4, 0, 0], [0, 0, 0]

    await work(spend, "2/s", [slow, quick, quick, slow, quick])

    seconds = written(site)
    assert len(seconds) == 5
    assert least(seconds) >= 0.5


PROCEDURES = (
    f"CREATE PROCEDURE insert_one() {INSERT}",
    f"CREATE PROCEDURE insert_and_read() BEGIN {INSERT}; SELECT 1; END",
    f"CREATE PROCEDURE insert_and_miss() BEGIN {INSERT}; DELETE FROM written WHERE id = 0; END",
)


async def insert_returning(ctx: Context) -> None:
    await ctx.database.query(f"{INSERT} RETURNING id")


async def call_a_procedure(ctx: Context) -> None:
    async with ctx.transaction() as cursor:
        await cursor.callproc("insert_one")


async def call_one_that_reads_too(ctx: Context) -> None:
    async with ctx.transaction() as cursor:
        await cursor.execute("CALL insert_and_read()")
        while await cursor.nextset():
            pass


async def call_one_that_ends_with_no_row(ctx: Context) -> None:
    await ctx.database.execute("CALL insert_and_miss()")


async def miss_and_insert_at_once(ctx: Context) -> None:
    async with ctx.transaction() as cursor:
        await cursor.execute(f"DELETE FROM written WHERE id = 0; {INSERT}")
        while await cursor.nextset():
            pass


async def hide_behind_comments(ctx: Context) -> None:
    await ctx.database.query("/* a */ INSERT INTO written (at) /* b */ SELECT SYSDATE(6)")


async def read_and_insert_at_once(ctx: Context) -> None:
    async with ctx.transaction() as cursor:
        await cursor.execute(f"SELECT 1; {INSERT}")
        while await cursor.nextset():
            pass


@pytest.mark.parametrize(
    "write",
    [
        insert_returning,
        call_a_procedure,
        call_one_that_reads_too,
        call_one_that_ends_with_no_row,
        hide_behind_comments,
        miss_and_insert_at_once,
        read_and_insert_at_once,
    ],
)
async def test_a_write_that_looks_like_none_waits_for_the_first_write_before_it(
    work: Work, site: Connection[Cursor], write: Callable[[Context], Any]
) -> None:
    """Statements that return rows, or write by a procedure, are writes, too."""
    if write is insert_returning and "MariaDB" not in rows(site, "SELECT VERSION()")[0][0]:
        pytest.skip("MySQL has no INSERT … RETURNING")
    execute(site, *PROCEDURES)

    async def take(ctx: Context, before: float) -> None:
        await asyncio.sleep(before)
        await write(ctx)

    done = await work(take, "2/s", [[0.4], [0.0]] * 3)

    execute(site, *(f"DROP PROCEDURE {one.split()[2][:-2]}" for one in PROCEDURES))
    assert done == {Kind.ACK: 6}
    assert least(written(site)) >= 0.98 * 0.5


async def test_a_transaction_that_only_reads_uses_up_no_wait(
    work: Work, site: Connection[Cursor]
) -> None:
    """Nor does a statement that writes no row: the first write is the first row."""

    async def read_first(ctx: Context, seconds: float) -> None:
        await asyncio.sleep(seconds)
        async with ctx.transaction() as cursor:
            await cursor.execute("(SELECT id FROM written)")
            await cursor.execute("UPDATE written SET at = at WHERE id = 404")
        async with ctx.transaction() as cursor:
            await cursor.execute(INSERT)

    await work(read_first, "2/s", [[0.4], [0], [0]])

    assert least(written(site)) >= 0.5


async def call_a_reader(ctx: Context) -> None:
    async with ctx.transaction() as cursor:
        await cursor.callproc("only_read")
        while await cursor.nextset():
            pass


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT 1;",
        "-- of the shop\nSELECT 1",
        "# of the shop\nSELECT 1",
        "WITH one AS (SELECT 1) SELECT * FROM one",
        "SELECT ';'",
        "WITH one AS (SELECT 'delete') SELECT * FROM one",
        None,
    ],
)
async def test_a_read_before_it_leaves_the_first_write_its_wait(
    work: Work, site: Connection[Cursor], statement: str | None
) -> None:
    """What returns rows was taken for the first write: the real one waited for nothing."""
    execute(site, "CREATE PROCEDURE only_read() SELECT 1")

    async def read_first(ctx: Context, seconds: float) -> None:
        if statement is None:
            await call_a_reader(ctx)
        else:
            await ctx.database.query(statement)
        await asyncio.sleep(seconds)
        await ctx.database.execute(INSERT)

    done = await work(read_first, "2/s", [[0.4], [0], [0]])

    execute(site, "DROP PROCEDURE only_read")
    assert done == {Kind.ACK: 3}
    assert least(written(site)) >= 0.5


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT 1;",
        " ( SELECT 1 ) ; ; ",
        "-- a\n# b\n/* c */ select 1",
        "WITH a AS (SELECT updated FROM b) SELECT * FROM a",
        "VALUES (1)",
        "TABLE a",
        "SHOW TABLES",
    ],
)
def test_a_statement_that_only_reads_is_seen_to(statement: str) -> None:
    assert _reads(statement)


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT 1; DELETE FROM a",
        "-- SELECT 1\nDELETE FROM a",
        "--SELECT 1",
        "# SELECT 1\nDELETE FROM a",
        "/* a */ INSERT INTO a /* b */ SELECT 1",
        "/*! INSERT INTO a */ SELECT 1",
        "WITH a AS (SELECT 1) DELETE FROM b",
        "INSERT INTO a SELECT 1",
        "SELECTED",
        "CALL a()",
    ],
)
def test_a_statement_that_may_write_is_not_taken_for_a_read(statement: str) -> None:
    """One that hid a write behind two comments was: it waited for nothing."""
    assert not _reads(statement)


@pytest.mark.parametrize("function", [spend, spend_in_thread])
@pytest.mark.parametrize("slow", [[2, 0, 0], [0, 2, 0]], ids=["before", "in"])
async def test_the_wait_for_a_first_write_is_no_part_of_the_tasks_timeout(
    work: Work, site: Connection[Cursor], function: Any, slow: list[float]
) -> None:
    """The second run waits 2 s and works 1.5 s: more than its 3 s, which it did not take."""
    quick = [0, 0, 1.5]

    settled = await work(function, "20/m", [slow, quick], timeout=3)

    assert settled == {Kind.ACK: 2}
    assert least(written(site)) >= 3


@pytest.mark.parametrize("moment", ["2000-01-01", "SYSDATE(6) - INTERVAL 10 MINUTE"])
async def test_a_last_start_that_somebody_else_wrote_stands_for_charge_and_first_write(
    pair: Servers, site: Connection[Cursor], moment: str
) -> None:
    """An older worker knows no other column, nor may a DBA who lets a start begin."""
    database = make_database(pair)
    hourly = SharedBudget(database, TASK, RateLimit.parse("1/h"), "new")
    await hourly.check()
    async with hourly.turn():
        assert await hourly.charge(["one"]) is None
        await database.execute(INSERT)
    value = moment if "SYSDATE" in moment else f"'{moment}'"
    execute(site, f"UPDATE aioworker_budget SET last_start = {value}")

    row = await tables.read(database, TASK)

    assert abs(row.charge_age_us - row.age_us) < 1000
    assert abs(row.write_age_us - row.age_us) < 1000
    database.close()


async def test_an_older_worker_beside_a_new_one_keeps_the_spacing(
    pair: Servers, site: Connection[Cursor]
) -> None:
    """It reads and writes `last_start` alone, which is the later of charge and first write."""
    rate = RateLimit.parse("5/s")
    old, new = make_database(pair), make_database(pair)
    budget = SharedBudget(new, TASK, rate, "new")
    lock = tables.lock_name(database_name(pair), TASK)
    words = {"lock": lock, "gap": rate.gap_us}

    async def old_start() -> bool:
        [[got]] = await old.query("SELECT GET_LOCK(%s, 1)", (lock,))
        if got != 1:
            return False
        charged = await old.execute(OLD_CHARGE.format(**words))
        if charged:
            async with old.transaction() as cursor:
                await cursor.execute(INSERT)
                await cursor.execute(OLD_STAMP.format(**words))
        await old.query("SELECT RELEASE_LOCK(%s)", (lock,))
        return bool(charged)

    async def new_start() -> bool:
        if await budget.check() is not None:
            return False
        async with budget.turn() as wait:
            if wait is not None or await budget.charge(["one"]) is not None:
                return False
            await new.execute(INSERT)
        return True

    async with asyncio.timeout(60):
        for start in [old_start, new_start] * 5:
            while not await start():  # noqa: ASYNC110 - the server is waited for
                await asyncio.sleep(0.001)

    seconds = written(site)
    assert len(seconds) == 10
    assert least(seconds) >= rate.interval
    old.close()
    new.close()


async def test_the_row_is_free_while_a_run_is_in_its_transaction(
    pair: Servers, site: Connection[Cursor]
) -> None:
    """Stamped right after the first write, it would be locked to the commit: a pause got 1205."""
    database = make_database(pair)
    budget = SharedBudget(database, TASK, RateLimit.parse("1/h"), "new")
    await budget.check()

    async with budget.turn():
        await budget.charge(["one"])
        async with database.transaction() as cursor:
            await cursor.execute(INSERT)
            execute(
                site,
                "SET SESSION innodb_lock_wait_timeout = 1",
                "UPDATE aioworker_budget SET paused = TRUE",
            )

    [(start, charge, write, first)] = rows(
        site,
        "SELECT last_start, last_charge, last_write, (SELECT at FROM written)"
        " FROM aioworker_budget",
    )
    assert charge < first <= write == start
    database.close()


async def test_a_start_of_one_insert_takes_eight_round_trips_to_the_database(
    work: Work, site: Connection[Cursor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Look, turn, charge; open, write, stamp, commit; give back: there were thirteen."""
    sent: list[str] = []
    really = login.Connection._execute_command

    async def noted(self: login.Connection, command: int, sql: Any) -> Any:
        sent.append(sql if isinstance(sql, str) else bytes(sql).decode())
        return await really(self, command, sql)

    monkeypatch.setattr(login.Connection, "_execute_command", noted)
    messages = 40
    await work(spend, "100000/s", [[0, 0, 0]] * messages)

    # One more, the task's own, reads in its transaction.
    inserted = [number for number, sql in enumerate(sent) if "INTO written" in sql]
    assert len(inserted) == messages
    assert inserted[-1] - inserted[-11] == 10 * (8 + 1)
