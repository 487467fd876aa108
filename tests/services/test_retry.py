"""What fails for a reason that may pass: tried again later, counted, and bounded."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from pymysql.err import DataError, OperationalError

from aioworker.errors import AioworkerError, DatabaseError
from aioworker.settling.outcome import Kind
from aioworker.settling.settler import MOST_RETURNS
from aioworker.tasks.context import Context
from aioworker.tasks.task import AnyTask, Task
from aioworker.worker import session
from support.servers import Servers
from tests.conftest import (
    QUEUES,
    TASK,
    Lanes,
    current_versions,
    execute,
    make_database,
    make_worker,
    simple_addons,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

    from aioworker.mysql.database import Database


def chunk(ids: list[int]) -> bytes:
    return json.dumps([[ids], {}, None]).encode()


def headers(retries: int) -> dict[str, Any]:
    return {"task": TASK, "id": "one", "retries": retries, "x-death": [{"count": 3}]}


@contextmanager
def held(shop: Connection[Cursor]) -> Iterator[None]:
    """Hold a row that the worker wants to write; it waits a second for it."""
    with shop.cursor() as cursor:
        cursor.execute("SELECT id FROM addons WHERE id = 1 FOR UPDATE")
    yield
    shop.rollback()


async def no_keys(_ctx: Context, _after: int) -> AsyncIterator[list[int]]:
    """No sweep."""
    none: list[list[int]] = []
    for page in none:
        yield page


def failing(error: Exception) -> AnyTask:
    """Make a task that raises when it has anything to do."""

    async def fail(_ctx: Context, ids: list[int]) -> None:
        if ids:
            raise error

    return Task(TASK, fail, keys=no_keys)


async def test_a_locked_row_is_tried_again_in_a_minute(
    pair: Servers,
    shop: Connection[Cursor],
    lanes: Lanes,
    database: Database,
    stop: asyncio.Event,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The copy counts the attempt; what RabbitMQ noted about the original stays behind."""
    caplog.set_level(logging.WARNING, "aioworker")
    simple_addons(shop, 300)  # in a table of two rows the server would lock both
    await lanes.send(chunk([1]), headers=headers(0))
    await lanes.send(chunk([2]))
    worker = make_worker(pair, database)

    with held(shop):
        assert not await worker.run(stop)

    assert worker.consumer.settled == {Kind.RETRY: 1, Kind.ACK: 1}
    versions = current_versions(shop)
    assert (versions[1], versions[2]) == (None, 10_002)
    [record] = caplog.records
    told = vars(record)["fields"]
    assert record.message == "chunk failed"
    assert (told["outcome"], told["attempt"], told["of"], told["retry_seconds"]) == (
        "retry",
        1,
        6,
        60.0,
    )
    copy = await lanes.take(QUEUES.retry)
    assert copy.body == chunk([1])
    assert (copy.headers["retries"], copy.headers["id"]) == (1, "one")
    assert "1205" in str(copy.headers["x-aioworker-reason"])
    assert "x-death" not in copy.headers


@pytest.fixture
def lonely(pair: Servers, shop: Connection[Cursor]) -> Iterator[Database]:
    """The database as a user has it who may connect once at a time."""
    execute(
        shop,
        "CREATE USER lonely@'%' WITH MAX_USER_CONNECTIONS 1",
        "GRANT SELECT ON *.* TO lonely@'%'",
    )
    lone = Servers(pair.amqp_url, pair.mysql_url.replace("root@", "lonely@"))
    database = make_database(lone)
    yield database
    database.close()
    execute(shop, "DROP USER lonely@'%'")


async def test_a_statement_that_the_server_refuses_to_end_is_told(
    pair: Servers,
    lanes: Lanes,
    lonely: Database,
    stop: asyncio.Event,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nobody is let in until it ends by itself: nothing can be known of the message."""
    caplog.set_level(logging.WARNING, "aioworker")

    async def sleep(ctx: Context, _ids: list[int]) -> None:
        async with ctx.transaction() as cursor:
            await cursor.execute("SELECT SLEEP(5)")

    await lanes.send(chunk([1]), headers=headers(0))
    worker = make_worker(pair, lonely, task=Task(TASK, sleep, keys=no_keys), task_timeout=0.5)

    with pytest.raises(DatabaseError, match="max_user_connections"):
        await worker.run(stop)

    assert worker.consumer.settled == {Kind.RELEASED: 1}
    [refused] = [one for one in caplog.records if one.message.startswith("statement runs on")]
    assert "'max_user_connections'" in vars(refused)["fields"]["reason"]
    [given_back] = [one for one in caplog.records if one.message == "chunk failed"]
    reason = vars(given_back)["fields"]["reason"]
    assert reason.startswith("TimeoutError: the run took longer than 0.5 s and was cut off; cannot")


async def test_the_last_attempt_ends_as_a_dead_letter(
    pair: Servers, lanes: Lanes, database: Database, shop: object, stop: asyncio.Event
) -> None:
    """Five retries are six attempts, and no seventh."""
    await lanes.send(chunk([1]), headers=headers(4))
    await lanes.send(chunk([1]), headers=headers(5))
    worker = make_worker(pair, database, task=failing(ValueError("no such shop")))

    assert not await worker.run(stop)

    assert worker.consumer.settled == {Kind.RETRY: 1, Kind.DEAD_LETTER: 1}
    letter = await lanes.take(QUEUES.dead)
    assert letter.headers["x-aioworker-reason"] == "ValueError: no such shop; attempt 6 of 6"
    assert letter.headers["x-aioworker-attempts"] == 6
    assert str(letter.headers["x-aioworker-traceback"]).endswith("ValueError: no such shop")
    assert (await lanes.take(QUEUES.retry)).headers["retries"] == 5


async def test_a_missing_table_does_not_drain_the_queue(
    pair: Servers, shop: Connection[Cursor], lanes: Lanes, database: Database, stop: asyncio.Event
) -> None:
    """A bad deploy: the messages are fine, and stay where they are, uncounted."""
    simple_addons(shop, 1)
    await lanes.send(chunk([1]))
    worker = make_worker(pair, database)
    execute(shop, "RENAME TABLE files TO elsewhere")

    with pytest.raises(Exception, match="1146"):
        await worker.run(stop)

    assert await lanes.holds(QUEUES.bulk, 1)
    assert await lanes.count(QUEUES.retry) == await lanes.count(QUEUES.dead) == 0


async def test_a_copy_that_is_not_confirmed_is_no_copy(
    pair: Servers, lanes: Lanes, database: Database, shop: object, stop: asyncio.Event
) -> None:
    """The message stays in its lane."""
    await lanes.send(chunk([1]))

    async def lose_the_queue(_ctx: Context, ids: list[int]) -> None:
        if ids:
            queue = await lanes.channel.get_queue(QUEUES.retry, ensure=False)
            await queue.delete(if_unused=False, if_empty=False)
            raise ValueError("no")

    worker = make_worker(pair, database, task=Task(TASK, lose_the_queue, keys=no_keys))

    assert not await worker.run(stop)

    assert worker.consumer.settled == {Kind.RELEASED: 1}
    assert await lanes.holds(QUEUES.bulk, 1)


async def test_three_messages_in_a_row_that_fail_for_good_open_the_breaker(
    pair: Servers, lanes: Lanes, database: Database, shop: object, stop: asyncio.Event
) -> None:
    """A bad deploy must not drain the queue into the dead letters: all go behind."""
    for number in range(6):
        await lanes.send(chunk([number + 1]), headers=headers(5) | {"id": f"message {number}"})
    worker = make_worker(pair, database, task=failing(ValueError("no such shop")))

    assert not await worker.run(stop)

    assert worker.consumer.settled == {Kind.POSTPONED: 4}  # the last one was the first test
    assert worker.consumer.breaker.reason == (
        "3 messages in a row failed for good, the last: ValueError: no such shop"
    )
    put_off = await lanes.take(QUEUES.retry)
    assert (put_off.headers["id"], put_off.headers["retries"]) == ("message 0", 5)
    assert put_off.headers["x-aioworker-reason"] == "ValueError: no such shop"
    assert await lanes.holds(QUEUES.bulk, 2)


async def test_at_their_first_failure_no_more_than_two_are_set_aside(
    pair: Servers, lanes: Lanes, database: Database, shop: object, stop: asyncio.Event
) -> None:
    """Without retries nobody can know whether anything succeeded since."""
    for number in range(6):
        await lanes.send(chunk([number + 1]), headers=headers(0) | {"id": f"message {number}"})
    refused = DataError(1366, "Incorrect integer value")
    worker = make_worker(pair, database, task=failing(refused))

    assert not await worker.run(stop)

    assert worker.consumer.settled == {Kind.DEAD_LETTER: 2, Kind.POSTPONED: 2}
    assert await lanes.holds(QUEUES.bulk, 2)


async def test_what_failed_for_good_is_set_aside_once_another_message_succeeded(
    pair: Servers, lanes: Lanes, database: Database, shop: object, stop: asyncio.Event
) -> None:
    """Bad messages come back from the retry queue side by side, and stop no healthy one."""

    async def odd(_ctx: Context, ids: list[int]) -> None:
        if ids and ids[0] % 5:
            raise ValueError(ids[0])

    an_hour_ago = (datetime.now(UTC) - timedelta(hours=1)).isoformat()
    failed = headers(5) | {"x-aioworker-first-failed-at": an_hour_ago}
    await lanes.send(chunk([5]), headers=headers(0) | {"id": "good"})
    for number in range(1, 5):
        await lanes.send(chunk([number]), headers=failed | {"id": f"message {number}"})
    await lanes.send(chunk([10]), headers=headers(0) | {"id": "good, too"})
    worker = make_worker(pair, database, task=Task(TASK, odd, keys=no_keys))

    assert not await worker.run(stop)

    assert worker.consumer.settled == {Kind.DEAD_LETTER: 4, Kind.ACK: 2}


async def test_a_failure_of_every_message_counts_once_another_message_succeeded(
    pair: Servers, lanes: Lanes, database: Database, shop: object, stop: asyncio.Event
) -> None:
    """One missing table of many: the first message's tenant was dropped, the others' are there."""

    async def of_tenant(ctx: Context, ids: list[int]) -> None:
        async with ctx.transaction() as cursor:
            table = "no_such_tenant" if ids == [1] else "addons"
            await cursor.execute(f"UPDATE {table} SET status = 4 WHERE id = 0")

    for number in range(1, 4):
        await lanes.send(chunk([number]), headers=headers(0) | {"id": f"message {number}"})
    worker = make_worker(pair, database, task=Task(TASK, of_tenant, keys=no_keys))

    assert not await worker.run(stop)
    assert worker.consumer.settled == {Kind.POSTPONED: 1, Kind.ACK: 2}
    behind = await lanes.take(QUEUES.retry)
    assert behind.headers["retries"] == 0
    await lanes.send(behind.body, headers=dict(behind.headers))
    assert not await worker.run(stop)

    assert worker.consumer.settled[Kind.RETRY] == 1
    assert (await lanes.take(QUEUES.retry)).headers["retries"] == 1


async def test_malformed_messages_are_no_doubt_about_the_task(
    pair: Servers, lanes: Lanes, database: Database, shop: object, stop: asyncio.Event
) -> None:
    for _ in range(5):
        await lanes.send(chunk([0]))
    worker = make_worker(pair, database)

    assert not await worker.run(stop)

    assert worker.consumer.settled == {Kind.DEAD_LETTER: 5}


async def test_bad_rows_among_good_ones_are_no_doubt_about_the_task(
    pair: Servers, shop: Connection[Cursor], lanes: Lanes, database: Database, stop: asyncio.Event
) -> None:
    """Four chunks with a bad row each: four dead letters, and every good row is written."""
    simple_addons(shop, 8)
    execute(
        shop,
        "CREATE TRIGGER odd BEFORE UPDATE ON addons FOR EACH ROW IF NEW.id % 2 = 0 THEN"
        " SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'even'; END IF",
    )
    for addon in (1, 3, 5, 7):
        await lanes.send(chunk([addon, addon + 1]), headers=headers(0) | {"id": f"chunk {addon}"})
    worker = make_worker(pair, database)

    assert not await worker.run(stop)

    assert worker.consumer.settled == {Kind.DEAD_LETTER: 4}
    assert current_versions(shop) == {n: n + 10_000 if n % 2 else None for n in range(1, 9)}


async def test_a_message_that_is_alone_is_set_aside_as_usual(
    pair: Servers, lanes: Lanes, database: Database, shop: object, stop: asyncio.Event
) -> None:
    """If nothing else is queued no other message can clear the doubt."""
    for number in range(2):
        await lanes.send(chunk([number + 1]), headers=headers(5) | {"id": f"message {number}"})
    worker = make_worker(pair, database, task=failing(ValueError("no such shop")))

    await worker.run(stop)
    assert worker.consumer.settled == {Kind.POSTPONED: 1, Kind.DEAD_LETTER: 1}
    put_off = await lanes.take(QUEUES.retry)
    await lanes.send(put_off.body, headers=dict(put_off.headers))
    await worker.run(stop)

    assert worker.consumer.settled == {Kind.POSTPONED: 1, Kind.DEAD_LETTER: 2}


async def test_a_pause_is_followed_while_chunks_need_nothing(
    pair: Servers,
    lanes: Lanes,
    database: Database,
    shop: Connection[Cursor],
    stop: asyncio.Event,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They need no start, so no charge is refused."""
    monkeypatch.setattr(session, "POLL_SECONDS", 0)
    task = failing(ValueError("nobody asked for it"))

    @task.needed
    async def pause(_ctx: Context, _ids: list[int]) -> list[int]:
        execute(shop, "UPDATE aioworker_budget SET paused = 1")
        return []

    for number in range(3):
        await lanes.send(chunk([number + 1]))
    worker = make_worker(pair, database, task=task, rate_limit="100/s")

    with pytest.raises(AioworkerError, match="paused"):
        await worker.run(stop)

    assert worker.consumer.settled == {Kind.ACK: 1}


async def test_what_is_given_back_too_often_is_moved_and_counted_from_the_beginning(
    pair: Servers,
    lanes: Lanes,
    database: Database,
    shop: object,
    stop: asyncio.Event,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An outage must not make a dead letter of it at the hundredth time.

    RabbitMQ 4.3 counts a reject, but no nack: there no outage does.
    """
    await lanes.send(chunk([1]), headers=headers(2))
    queue = await lanes.channel.get_queue(QUEUES.bulk, ensure=False)
    for _ in range(MOST_RETURNS):
        await (await queue.get(timeout=10)).reject(requeue=True)
    worker = make_worker(pair, database, task=failing(OperationalError(1114, "full")))
    full = [False, True]  # at the start, and after the run

    async def write() -> None:
        if full.pop(0):
            raise DatabaseError("the table 'aioworker_worker' is full")

    monkeypatch.setattr(worker.worker.probe, "check_database", write)

    with pytest.raises(DatabaseError):
        await worker.run(stop)

    assert worker.consumer.settled == {Kind.MOVED: 1}
    assert await lanes.count(QUEUES.retry) == 0
    copy = await lanes.take(QUEUES.bulk)
    assert copy.headers["retries"] == 2, "no attempt is counted"
    assert copy.headers.get("x-delivery-count", 0) == 0
