"""A user's test of a task on a real database: run as a worker runs it, and undone if asked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from pymysql.err import DataError, MySQLError, OperationalError

from aioworker import Context, Producer, Retry, Task, task
from aioworker.errors import DatabaseError, NestedTransactionError, UsageError
from aioworker.mysql.database import Database
from aioworker.tasks import registry
from aioworker.testing import Message, published, rolled_back, run
from support import servers
from tests.conftest import PREFIX, QUEUES, TASK, Lanes, eventually, execute, rows

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

WRITE = "UPDATE note SET text = %s WHERE id = %s"
ALL = "SELECT id, text FROM note ORDER BY id"
BEFORE = ((1, "one"), (2, "two"))
REFUSED = "expected only what can be rolled back: a statement ended the transaction around all"


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what is registered here, and name no server but those that a test names."""
    monkeypatch.setattr(registry, "_registry", {})
    monkeypatch.setenv("AIOWORKER_AMQP_URL", "amqp://127.0.0.1:1/")
    monkeypatch.setenv("AIOWORKER_MYSQL_URL", "mysql://127.0.0.1:1/none")


@pytest.fixture
def notes(pair: servers.Servers) -> Iterator[Connection[Cursor]]:
    """A connection to a database with two rows and none of aioworker's own tables."""
    connection = servers.connect(pair.mysql_url, create=True)
    execute(
        connection,
        "CREATE TABLE note (id INT PRIMARY KEY, text VARCHAR(5) NOT NULL) ENGINE=InnoDB",
        "INSERT INTO note VALUES (1, 'one'), (2, 'two')",
    )
    yield connection
    connection.close()


@pytest.fixture
def url(pair: servers.Servers) -> str:
    """The address of the database."""
    return pair.mysql_url


@pytest.fixture
async def database(url: str, notes: Connection[Cursor]) -> AsyncIterator[Database]:
    """A connection, all of which is rolled back."""
    async with rolled_back(url) as found:
        yield found


def made(asynchronous: bool) -> Task[..., Any]:
    """Return a task that writes a text into rows, each in a transaction of its own."""
    if asynchronous:

        @task(name="coroutine")
        async def coroutine(ctx: Context, ids: list[int], text: str) -> None:
            for one in ids:
                async with ctx.transaction() as cursor:
                    ctx.counts["changed"] += await cursor.execute(WRITE, (text, one))

        return coroutine

    @task(name="thread")
    def thread(ctx: Context, ids: list[int], text: str) -> None:
        for one in ids:
            with ctx.transaction() as cursor:
                ctx.counts["changed"] += cursor.execute(WRITE, (text, one))

    return thread


both = pytest.mark.parametrize("asynchronous", [True, False], ids=["async def", "def"])


@both
async def test_a_run_writes(url: str, notes: Connection[Cursor], asynchronous: bool) -> None:
    done = await run(made(asynchronous), [1, 3], "new", database=url)

    assert done.counts == {"changed": 1}
    assert rows(notes, ALL) == [(1, "new"), (2, "two")]


@both
def test_a_run_is_rolled_back_if_asked(
    url: str, notes: Connection[Cursor], asynchronous: bool
) -> None:
    """Though each of its transactions has committed; by a test without an event loop."""
    done = asyncio.run(run(made(asynchronous), [1, 2], "new", database=url, rollback=True))

    assert done.counts == {"changed": 2}
    assert tuple(rows(notes, ALL)) == BEFORE


async def test_a_failed_run_is_rolled_back_and_its_error_is_the_tasks(
    url: str, notes: Connection[Cursor]
) -> None:
    @task
    async def fail(ctx: Context) -> None:
        await ctx.database.execute(WRITE, ("new", 1))
        raise error

    error = Retry("later")

    with pytest.raises(Retry) as raised:
        await run(fail, database=url, rollback=True)

    assert raised.value is error
    assert tuple(rows(notes, ALL)) == BEFORE


@both
async def test_rows_are_put_there_run_on_and_looked_at(
    url: str, notes: Connection[Cursor], asynchronous: bool
) -> None:
    async with rolled_back(url) as database:
        await database.execute("INSERT INTO note VALUES (3, 'three')")
        await run(made(asynchronous), [2, 3], "new", database=database)
        async with database.transaction() as cursor:
            await cursor.execute(WRITE, ("more", 1))
        inside = await database.query(ALL)
        outside = rows(notes, ALL)

    assert inside == [(1, "more"), (2, "new"), (3, "new")]
    assert tuple(outside) == tuple(rows(notes, ALL)) == BEFORE


@both
async def test_a_transaction_that_fails_is_undone_alone(
    database: Database, asynchronous: bool
) -> None:
    """What committed before it stays, and so does what comes after it."""
    found = made(asynchronous)

    await run(found, [1], "new", database=database)
    with pytest.raises(DataError):
        await run(found, [2], "much too long", database=database)
    with pytest.raises(ZeroDivisionError):
        async with database.transaction() as cursor:
            await cursor.execute(WRITE, ("half", 2))
            raise ZeroDivisionError
    with pytest.raises(MySQLError):
        await database.execute("INSERT INTO note VALUES (3, 'three'), (1, 'again')")
    await database.execute("INSERT INTO note VALUES (4, 'four')")

    assert await database.query(ALL) == [(1, "new"), (2, "two"), (4, "four")]


async def test_a_transaction_inside_another_is_refused_as_elsewhere(database: Database) -> None:
    @task
    async def nest(ctx: Context) -> None:
        async with ctx.transaction(), ctx.transaction():
            pass

    with pytest.raises(NestedTransactionError):
        await run(nest, database=database)


async def test_the_session_is_the_workers(database: Database, url: str) -> None:
    """Rows are counted as there; a text that is too long is an error, not cut off."""
    asked = "SELECT @@sql_mode, @@time_zone, @@innodb_lock_wait_timeout, @@collation_connection"
    worked: list[tuple[Any, ...]] = []

    @task
    async def ask(ctx: Context) -> None:
        worked.extend(await ctx.database.query(asked))

    await run(ask, database=url)

    assert await database.query(asked) == worked
    assert await database.execute(WRITE, ("one", 1)) == 1  # matched, though not changed


async def test_only_what_is_needed_is_run(database: Database) -> None:
    """`needed` is asked as under a rate limit; without any the function is not called."""
    got: list[list[int]] = []

    @task
    async def shorten(ctx: Context, ids: list[int]) -> None:
        got.append(ids.copy())
        ids.clear()

    @shorten.needed
    async def long(ctx: Context, ids: list[int]) -> list[int]:
        ctx.counts["asked"] += 1
        found = "SELECT id FROM note WHERE text <> 'one' AND id IN %s"
        return [one for (one,) in await ctx.database.query(found, (ids,))]

    some = await run(shorten, [1, 2, 2], database=database)
    none = await run(shorten, [1], database=database)

    assert got == [[2]]
    assert (some.counts, some.needed) == ({"ids": 2, "asked": 1}, [2])
    assert (none.counts, none.needed) == ({"ids": 1, "asked": 1}, [])


async def test_what_a_run_leaves_behind_may_write_no_more(
    url: str, notes: Connection[Cursor]
) -> None:
    """As in a worker, where the connection is another run's by then."""
    later: list[asyncio.Task[int]] = []
    go_on = asyncio.Event()

    @task
    async def leave(ctx: Context) -> None:
        async def write() -> int:
            await go_on.wait()
            return await ctx.database.execute(WRITE, ("late", 1))

        later.append(asyncio.create_task(write()))

    async with rolled_back(url) as database:
        await run(leave, database=database)
        go_on.set()
        with pytest.raises(DatabaseError, match="expected a statement inside its run"):
            await later[0]

    assert tuple(rows(notes, ALL)) == BEFORE


@pytest.mark.parametrize("statement", ["COMMIT", "CREATE TABLE other (id INT)"])
async def test_what_cannot_be_rolled_back_is_said(
    url: str, notes: Connection[Cursor], statement: str
) -> None:
    """Before it has stayed, and must be told; what came after it has not."""
    with pytest.raises(DatabaseError) as raised:
        async with rolled_back(url) as database:
            await database.execute(WRITE, ("stays", 1))
            await database.execute(statement)
            await database.execute(WRITE, ("goes", 2))

    assert str(raised.value).startswith(REFUSED)
    assert rows(notes, ALL) == [(1, "stays"), (2, "two")]


async def test_a_transaction_that_commits_by_itself_is_told_at_its_end(
    url: str, notes: Connection[Cursor]
) -> None:
    @task
    def commit(ctx: Context) -> None:
        with ctx.transaction() as cursor:
            cursor.execute("COMMIT")

    with pytest.raises(DatabaseError) as raised:
        await run(commit, database=url, rollback=True)

    assert str(raised.value).startswith(REFUSED)


async def test_after_a_deadlock_nothing_lasts(url: str, notes: Connection[Cursor]) -> None:
    """It rolls back more than the task's own transaction: what was to be tested is gone."""
    with ThreadPoolExecutor() as pool, pytest.raises(DatabaseError) as raised:
        async with rolled_back(url) as database:
            await database.execute(WRITE, ("new", 1))
            with notes.cursor() as cursor:
                # The one that wrote more is the one that is kept.
                cursor.executemany("INSERT INTO note VALUES (%s, 'x')", list(range(10, 500)))
                cursor.execute(WRITE, ("other", 2))
                theirs = pool.submit(cursor.execute, WRITE, ("other", 1))
                await asyncio.to_thread(eventually, lambda: waits(url), "it waits for the row")
                with pytest.raises(OperationalError, match="Deadlock"):
                    await database.execute(WRITE, ("new", 2))
                theirs.result()
            notes.rollback()
            await database.execute(WRITE, ("late", 1))

    assert str(raised.value).startswith(REFUSED)
    assert tuple(rows(notes, ALL)) == BEFORE


def waits(url: str) -> bool:
    """Whether a statement waits for a row."""
    watcher = servers.connect(url)
    found = rows(
        watcher, "SELECT 1 FROM information_schema.innodb_trx WHERE trx_state = 'LOCK WAIT'"
    )
    watcher.close()
    return bool(found)


async def test_a_lost_connection_is_not_replaced(url: str, notes: Connection[Cursor]) -> None:
    """The rows that the test put there went with it."""
    async with rolled_back(url) as database:
        await database.execute(WRITE, ("new", 1))
        [(number,)] = await database.query("SELECT CONNECTION_ID()")
        execute(notes, f"KILL {number}")
        with pytest.raises(MySQLError):
            await database.query(ALL)
        database.close()
        with pytest.raises(DatabaseError, match="lost, and with it all that was to be rolled back"):
            await database.query(ALL)

    assert tuple(rows(notes, ALL)) == BEFORE


async def test_wrong_usage_is_said(url: str, database: Database) -> None:
    found = made(asynchronous=True)

    with pytest.raises(UsageError, match="expected rollback with the address of a database"):
        await run(found, [1], "new", database=database, rollback=True)
    with pytest.raises(DatabaseError, match=r"^cannot use MySQL at "):
        await run(found, [1], "new", database="mysql://127.0.0.1:1/none")
    with pytest.raises(UsageError, match=r"^expected "):
        async with rolled_back("127.0.0.1"):
            pass


async def test_what_is_collected_is_what_rabbitmq_gets(pair: servers.Servers, lanes: Lanes) -> None:
    """The same lane, headers and body, but for the id."""

    async def publish() -> None:
        async with Producer(pair.amqp_url, queue_prefix=PREFIX) as producer:
            await producer.publish(TASK, [3, 5])
            await producer.publish(TASK, [7], urgent=True, why={1: ("x",)})

    await publish()
    with published() as messages:
        await publish()

    taken = [await lanes.take(lane) for lane in (QUEUES.bulk, QUEUES.urgent)]
    assert messages == [
        Message(TASK, ([3, 5],)),
        Message(TASK, ([7],), {"why": {"1": ["x"]}}, urgent=True),
    ]
    for one, message in zip(taken, messages, strict=True):
        args, kwargs, _embed = json.loads(one.body)
        assert (args, kwargs, one.headers["task"]) == ([*message.args], message.kwargs, TASK)
    assert await lanes.count(QUEUES.bulk) == await lanes.count(QUEUES.urgent) == 0
