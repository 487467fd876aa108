"""Whose a failure is: the database says it, by taking a write of ours or not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any

import pymysql
import pytest
from pymysql.err import MySQLError, OperationalError

from aioworker.errors import DatabaseError
from aioworker.logs import ConsoleFormatter
from aioworker.settling.outcome import Kind
from aioworker.tasks.context import Context
from aioworker.tasks.task import Task
from support.servers import Maria, Servers
from tests.conftest import (
    QUEUES,
    TASK,
    InProcess,
    Lanes,
    execute,
    make_database,
    make_worker,
    rows,
)

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

    from aioworker.mysql.database import Database

Work = Callable[..., Awaitable[None]]
Make = Callable[..., InProcess]
HEADERS = {"task": TASK, "id": "one"}


@pytest.fixture(params=["no limit", "limit", "no rows"])
def make(request: pytest.FixtureRequest, pair: Servers, database: Database, shop: object) -> Make:
    """Make a worker of a function: without and with a rate limit, and without its own row."""

    def worker(work: Work, *, max_retries: int = 5, task_timeout: float = 30) -> InProcess:
        return make_worker(
            pair,
            database,
            task=Task(TASK, work),
            rate_limit="20/s" if request.param == "limit" else None,
            keeps_row=request.param != "no rows",
            max_retries=max_retries,
            task_timeout=task_timeout,
        )

    return worker


async def send(lanes: Lanes, *numbers: float, retries: int = 0, lost: int = 0) -> None:
    for number in numbers:
        body = json.dumps([[number], {}, None]).encode()
        counts = {"retries": retries, "x-aioworker-lost": lost}
        await lanes.send(body, headers=HEADERS | {"id": f"number {number}"} | counts)


@pytest.fixture
def numbers(shop: Connection[Cursor], database: Database) -> Iterator[None]:
    """A table for numbers."""
    execute(
        shop,
        "DROP TABLE IF EXISTS numbers",
        "CREATE TABLE numbers (number DOUBLE, words LONGTEXT) ENGINE=InnoDB",
    )
    yield
    database.close()  # it may hold a lock on it
    execute(shop, "DROP TABLE numbers")


async def test_what_the_driver_cannot_write_counts_as_an_attempt(
    make: Make, lanes: Lanes, stop: asyncio.Event, shop: Connection[Cursor], numbers: None
) -> None:
    """NaN has no error number: it was told as a database that is away, and tried for ever."""

    async def write(ctx: Context, number: float) -> None:
        async with ctx.transaction() as cursor:
            await cursor.execute("INSERT INTO numbers (number) VALUES (%s)", (number,))

    await send(lanes, float("nan"), 2)
    worker = make(write)

    assert not await worker.run(stop)

    assert worker.consumer.settled == {Kind.RETRY: 1, Kind.ACK: 1}
    copy = await lanes.take(QUEUES.retry)
    assert copy.headers["retries"] == 1
    assert "nan can not be used with MySQL" in str(copy.headers["x-aioworker-reason"])
    assert "AIOWORKER_MYSQL_URL" not in str(copy.headers["x-aioworker-reason"])
    assert rows(shop, "SELECT number FROM numbers") == [(2.0,)]


async def test_another_database_that_is_away_is_no_outage_of_the_protected_one(
    make: Make, lanes: Lanes, stop: asyncio.Event
) -> None:
    async def write(ctx: Context, number: float) -> None:
        if number == 1:
            pymysql.connect(host="127.0.0.1", port=1, connect_timeout=1)

    await send(lanes, 1, 2)
    worker = make(write)

    assert not await worker.run(stop)

    assert worker.consumer.settled == {Kind.RETRY: 1, Kind.ACK: 1}
    assert (await lanes.take(QUEUES.retry)).headers["retries"] == 1


@pytest.fixture
def small(maria: Maria, shop: Connection[Cursor]) -> Iterator[None]:
    """A server that takes no large statement."""
    packet = rows(shop, "SELECT @@GLOBAL.max_allowed_packet")[0][0]
    execute(shop, "SET GLOBAL max_allowed_packet = 1048576")
    yield
    execute(shop, f"SET GLOBAL max_allowed_packet = {packet}")


async def idle(ctx: Context, _number: float) -> None:
    async with ctx.transaction() as cursor:
        await cursor.execute("SET SESSION idle_write_transaction_timeout = 1")
        await cursor.execute("INSERT INTO numbers (number) VALUES (1)")
        await asyncio.sleep(1.5)
        await cursor.execute("INSERT INTO numbers (number) VALUES (1)")


async def large(ctx: Context, _number: float) -> None:
    async with ctx.transaction() as cursor:
        await cursor.execute("INSERT INTO numbers (words) VALUES (%s)", ("x" * 40_000_000,))


@pytest.mark.parametrize("lose", [idle, large])
async def test_a_statement_that_loses_its_connection_each_time_is_set_aside_at_the_third(
    make: Make,
    lanes: Lanes,
    stop: asyncio.Event,
    small: None,
    numbers: None,
    lose: Work,
) -> None:
    """It was given back uncounted and came first again; a lost connection is never the first's."""
    settled = []
    for times in range(3):
        await send(lanes, 1, retries=times, lost=times)
        worker = make(lose, max_retries=0)
        assert not await worker.run(stop)
        settled.append(dict(worker.consumer.settled))

    assert settled == [{Kind.RETRY: 1}, {Kind.RETRY: 1}, {Kind.DEAD_LETTER: 1}]
    letter = await lanes.take(QUEUES.dead)
    assert letter.headers["x-aioworker-attempts"] == 3
    assert str(letter.headers["x-aioworker-reason"]).endswith("attempt 3 of 3")


async def test_a_first_lost_connection_sets_no_message_aside(
    make: Make, lanes: Lanes, stop: asyncio.Event
) -> None:
    """Its attempts before failed for reasons of its own."""

    async def lose(ctx: Context, _number: float) -> None:
        await ctx.database.execute("KILL CONNECTION_ID()")

    await send(lanes, 1, retries=5)
    worker = make(lose)

    assert not await worker.run(stop)

    assert worker.consumer.settled == {Kind.RETRY: 1}
    copy = await lanes.take(QUEUES.retry)
    assert (copy.headers["retries"], copy.headers["x-aioworker-lost"]) == (6, 1)


@pytest.fixture
def small_table(shop: Connection[Cursor]) -> Iterator[None]:
    """A table that is full; it is no more than that of the server."""
    execute(
        shop,
        "DROP TABLE IF EXISTS small",
        "SET SESSION max_heap_table_size = 16384",
        "CREATE TABLE small (words CHAR(200)) ENGINE=MEMORY",
    )
    with pytest.raises(OperationalError, match="1114"):
        while True:
            execute(shop, "INSERT INTO small VALUES (REPEAT('x', 200))")
    yield
    execute(shop, "DROP TABLE small")


async def test_a_table_that_is_full_blocks_its_own_message_alone(
    make: Make, lanes: Lanes, stop: asyncio.Event, small_table: None
) -> None:
    """The server says the same of a full disk; another message that succeeds tells them apart."""

    async def write(ctx: Context, number: float) -> None:
        if number == 1:
            await ctx.database.execute("INSERT INTO small VALUES (REPEAT('x', 200))")

    await send(lanes, 1, 2, 3)
    worker = make(write)

    with pytest.raises(DatabaseError, match="The table 'small' is full"):
        await worker.run(stop)
    assert worker.consumer.settled == {Kind.POSTPONED: 1}
    await worker.run(stop)
    assert worker.consumer.settled == {Kind.POSTPONED: 1, Kind.ACK: 2}

    put_off = await lanes.take(QUEUES.retry)
    assert put_off.headers["retries"] == 0
    await lanes.send(put_off.body, headers=dict(put_off.headers))
    await worker.run(stop)
    assert worker.consumer.settled == {Kind.POSTPONED: 1, Kind.ACK: 2, Kind.RETRY: 1}


async def test_a_statement_that_its_time_cuts_off_is_no_lost_connection(
    make: Make, lanes: Lanes, stop: asyncio.Event
) -> None:
    """It gets the attempts that are set, no more."""

    async def sleep(ctx: Context, _number: float) -> None:
        await ctx.database.query("SELECT SLEEP(20)")

    await send(lanes, 1)
    worker = make(sleep, max_retries=0, task_timeout=0.5)

    assert not await worker.run(stop)

    assert worker.consumer.settled == {Kind.DEAD_LETTER: 1}


async def test_a_statement_that_an_option_forbids_counts_as_an_attempt(
    make: Make, lanes: Lanes, stop: asyncio.Event, maria: Maria
) -> None:
    """Number 1290 is that of a server that only reads, too."""

    async def write(ctx: Context, _number: float) -> None:
        async with ctx.transaction() as cursor:
            await cursor.execute("SELECT 1")
        raise OperationalError(1290, "running with the --secure-file-priv option, or --read-only")

    await send(lanes, 1)
    worker = make(write)

    assert not await worker.run(stop)

    assert worker.consumer.settled == {Kind.RETRY: 1}


@pytest.mark.parametrize("number", [9001, 1105, 1180, 1038, 1021, 3100, 1290])
async def test_a_database_that_takes_no_write_of_ours_counts_nothing(
    pair: Servers,
    database: Database,
    shop: Connection[Cursor],
    lanes: Lanes,
    stop: asyncio.Event,
    number: int,
) -> None:
    """A proxy without a server, a full disk, no majority: whatever it is called."""
    refuse = (
        "CREATE TRIGGER refuse BEFORE {} ON aioworker_worker FOR EACH ROW SIGNAL SQLSTATE 'HY000'"
        f" SET MYSQL_ERRNO = {number}, MESSAGE_TEXT = 'not now'"
    )

    async def write(_number: float) -> None:
        for event in ("INSERT", "UPDATE"):
            await asyncio.to_thread(
                execute, shop, refuse.format(event).replace("refuse", f"refuse_{event}", 1)
            )
        raise ValueError("whatever it is called")

    await send(lanes, 1)
    worker = make_worker(pair, database, task=Task(TASK, write), keeps_row=True)

    with pytest.raises(DatabaseError, match=rf"not now \({number}\)"):
        await worker.run(stop)

    assert worker.consumer.settled == {Kind.RELEASED: 1}
    execute(shop, "DROP TRIGGER refuse_INSERT", "DROP TRIGGER refuse_UPDATE")
    again = make_worker(pair, database, task=Task(TASK, _nothing), keeps_row=True)
    assert await again.run(stop)
    assert again.consumer.settled == {Kind.ACK: 1}


async def _nothing(_number: float) -> None:
    pass


@pytest.fixture
async def reading(maria: Maria, pair: Servers, shop: Connection[Cursor]) -> AsyncIterator[Database]:
    """The database as a user has it who may not write while the server only reads."""
    execute(shop, "CREATE OR REPLACE USER plain", "GRANT ALL ON aioworker.* TO plain")
    database = make_database(Servers(pair.amqp_url, maria.url("aioworker", "plain")))
    yield database
    database.close()
    execute(shop, "SET GLOBAL read_only = 0", "DROP USER plain")


@pytest.mark.parametrize("keeps_row", [True, False])
async def test_a_server_that_only_reads_is_left(
    pair: Servers,
    reading: Database,
    shop: Connection[Cursor],
    lanes: Lanes,
    stop: asyncio.Event,
    numbers: None,
    *,
    keeps_row: bool,
) -> None:
    """Its address may lead to another one by now; a worker without rows may only want to read."""
    sessions = []

    async def write(ctx: Context, _number: float) -> None:
        sessions.extend(await ctx.database.query("SELECT CONNECTION_ID()"))
        await asyncio.to_thread(execute, shop, "SET GLOBAL read_only = 1")
        async with ctx.transaction() as cursor:
            await cursor.execute("INSERT INTO numbers (number) VALUES (1)")

    await send(lanes, 1)
    worker = make_worker(pair, reading, task=Task(TASK, write), keeps_row=keeps_row)

    if keeps_row:
        with pytest.raises(DatabaseError, match="this server only reads"):
            await worker.run(stop)
    else:
        assert not await worker.run(stop)

    assert worker.consumer.settled == {Kind.RELEASED if keeps_row else Kind.RETRY: 1}
    assert await reading.query("SELECT CONNECTION_ID()") != sessions


@pytest.mark.parametrize("refused", ["DROP TABLE aioworker_worker", None])
async def test_a_row_of_ours_that_may_not_be_written_is_no_outage(
    pair: Servers,
    database: Database,
    shop: Connection[Cursor],
    lanes: Lanes,
    stop: asyncio.Event,
    refused: str | None,
) -> None:
    """The server answers: a privilege that is missing there says nothing of the message."""

    async def fail(_number: float) -> None:
        await asyncio.to_thread(
            execute,
            shop,
            refused or "RENAME TABLE aioworker_worker TO elsewhere",
        )
        raise ValueError("no such shop")

    await send(lanes, 1)
    worker = make_worker(pair, database, task=Task(TASK, fail), keeps_row=True)

    assert not await worker.run(stop)

    assert worker.consumer.settled == {Kind.RETRY: 1}
    execute(shop, "DROP TABLE IF EXISTS elsewhere")


class UntoldError(Exception):
    """One whose text cannot be made."""

    def __str__(self) -> str:
        return f"no shop {self.shop}"  # type: ignore[attr-defined]  # which is the mistake


async def test_an_error_whose_text_cannot_be_made_is_its_messages_failure(
    make: Make, lanes: Lanes, stop: asyncio.Event
) -> None:
    """It ended the worker, at each start, and named neither the task nor the message."""

    async def fail(_ctx: Context, number: float) -> None:
        if number == 1:
            raise UntoldError

    await send(lanes, 1, 2)
    worker = make(fail)

    assert not await worker.run(stop)

    assert worker.consumer.settled == {Kind.RETRY: 1, Kind.ACK: 1}
    told = "UntoldError, which cannot be told: its own code raises AttributeError"
    assert (await lanes.take(QUEUES.retry)).headers["x-aioworker-reason"] == told


async def test_counts_that_cannot_be_told_end_no_worker(
    make: Make, lanes: Lanes, stop: asyncio.Event, caplog: pytest.LogCaptureFixture
) -> None:
    class Odd:
        def __repr__(self) -> str:
            raise SystemExit

    async def count(ctx: Context, _number: float) -> None:
        counts: dict[Any, Any] = ctx.counts
        counts[Odd()] = 1
        counts["large"] = 10**10_000

    caplog.set_level("INFO", "aioworker")
    await send(lanes, 1)
    worker = make(count)

    assert await worker.run(stop)

    assert worker.consumer.settled == {Kind.ACK: 1}
    [told] = [record for record in caplog.records if record.message == "chunk done"]
    assert " large=" in ConsoleFormatter().format(told)


async def test_a_task_that_cancels_itself_ends_no_worker(
    make: Make, lanes: Lanes, stop: asyncio.Event
) -> None:
    """It would have cancelled whoever awaits it, at each start."""

    async def cancel(_ctx: Context, number: float) -> None:
        running = asyncio.current_task()
        if number < 3 and running is not None:
            running.cancel()
        if number == 1:
            await asyncio.sleep(0)

    await send(lanes, 1, 2, 3)
    worker = make(cancel)

    assert not await worker.run(stop)

    assert worker.consumer.settled == {Kind.RETRY: 2, Kind.ACK: 1}
    reason = (await lanes.take(QUEUES.retry)).headers["x-aioworker-reason"]
    assert str(reason).startswith("the task let out CancelledError")


async def gathered(ctx: Context, number: float) -> None:
    if number == 1:
        async with asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(ctx.database.query("SELECT SLEEP(0.1)"))


LEFT: set[asyncio.Task[Any]] = set()


async def left_behind(ctx: Context, number: float) -> None:
    if number == 1:
        LEFT.add(asyncio.create_task(ctx.database.query("SELECT SLEEP(0.5)")))
        await asyncio.sleep(0.1)
        raise ValueError("mine")


async def locked(ctx: Context, number: float) -> None:
    if number == 1:
        await ctx.database.execute("LOCK TABLES numbers WRITE")
        raise ValueError("mine")


async def reading_only(ctx: Context, number: float) -> None:
    if number == 1:
        await ctx.database.execute("SET SESSION TRANSACTION READ ONLY")
        raise ValueError("mine")


async def elsewhere(ctx: Context, number: float) -> None:
    if number == 1:
        await ctx.database.execute("USE mysql")
        raise ValueError("mine")


@pytest.mark.parametrize("spoil", [gathered, left_behind, locked, reading_only, elsewhere])
async def test_what_a_run_did_to_its_connection_is_no_outage_and_harms_no_other_message(
    make: Make, lanes: Lanes, stop: asyncio.Event, numbers: None, spoil: Work
) -> None:
    """The write that judges went over the same one: it ended the worker, or counted nothing."""
    await send(lanes, 1, 2, 3)
    worker = make(spoil)

    assert not await worker.run(stop)

    assert worker.consumer.settled == {Kind.RETRY: 1, Kind.ACK: 2}
    await asyncio.gather(*LEFT, return_exceptions=True)
    LEFT.clear()


async def test_a_transaction_that_a_run_leaves_open_is_no_other_message_s(
    make: Make, lanes: Lanes, stop: asyncio.Event, numbers: None
) -> None:
    async def hold(ctx: Context) -> None:
        async with ctx.transaction() as cursor:
            await cursor.execute("SELECT 1")
            await asyncio.sleep(0.3)

    async def work(ctx: Context, number: float) -> None:
        if number == 1:
            LEFT.add(asyncio.create_task(hold(ctx)))
            await asyncio.sleep(0.1)
            return
        async with ctx.transaction() as cursor:
            await cursor.execute("INSERT INTO numbers (number) VALUES (%s)", (number,))

    await send(lanes, 1, 2, 3)
    worker = make(work)

    assert await worker.run(stop)

    assert worker.consumer.settled == {Kind.ACK: 3}
    await asyncio.gather(*LEFT, return_exceptions=True)
    LEFT.clear()


async def leave_a_query(ctx: Context) -> None:
    LEFT.add(asyncio.create_task(ctx.database.query("SELECT SLEEP(0.5)")))
    await asyncio.sleep(0.1)


async def leave_a_write(ctx: Context) -> None:
    insert = "INSERT INTO numbers (number) SELECT SLEEP(0.5)"
    LEFT.add(asyncio.create_task(ctx.database.execute(insert)))
    await asyncio.sleep(0.1)


async def leave_one_that_begins_after_it(ctx: Context) -> None:
    LEFT.add(asyncio.create_task(ctx.database.query("SELECT SLEEP(0.5)")))


@pytest.mark.parametrize(
    "leave",
    [leave_a_query, leave_a_write, leave_one_that_begins_after_it],
    ids=lambda one: one.__name__,
)
async def test_a_statement_that_a_run_leaves_behind_is_no_other_message_s(
    make: Make,
    lanes: Lanes,
    stop: asyncio.Event,
    shop: Connection[Cursor],
    numbers: None,
    leave: Callable[[Context], Awaitable[None]],
) -> None:
    """Two at once on one connection: the worker ended by RuntimeError, at each such message."""

    async def work(ctx: Context, number: float) -> None:
        if number == 1:
            await leave(ctx)
            return
        await ctx.database.execute("INSERT INTO numbers (number) VALUES (%s)", (number,))

    await send(lanes, 1, 2, 3)
    worker = make(work)

    assert await worker.run(stop)

    assert worker.consumer.settled == {Kind.ACK: 3}
    assert rows(shop, "SELECT number FROM numbers WHERE number > 1") == [(2.0,), (3.0,)]
    [left] = await asyncio.gather(*LEFT, return_exceptions=True)
    LEFT.clear()
    assert isinstance(left, MySQLError | DatabaseError)


async def test_a_statement_of_the_workers_own_harms_no_run_beside_it(
    pair: Servers, shop: object
) -> None:
    """Where several messages run at once, one ends while the worker's row is written."""
    database = make_database(pair)
    writing = asyncio.create_task(database.query("SELECT SLEEP(0.2), 1"))
    await asyncio.sleep(0.1)

    async with asyncio.timeout(5) as limit:
        with database.bounded(limit):
            await asyncio.sleep(0)
    database.end_run()

    assert await writing == [(0, 1)]
    database.close()
