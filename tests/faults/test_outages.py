"""A database that dies, a row that is locked: the work goes on, and nothing is lost.

Judged by the rows, the budget's row and RabbitMQ's counts, never by the worker's own log.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import aio_pika
import pytest

from aioworker import topology
from support import servers
from tests.conftest import (
    QUEUES,
    Lanes,
    Worker,
    eventually,
    rows,
    simple_addons,
)

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

Start = Callable[..., Worker]
RATE = ("consume", "--rate-limit", "10/s")
CHUNKS = 30
RETRY_SECONDS = 60


@pytest.fixture
async def safe(private: servers.Servers, lanes: Lanes) -> Lanes:
    """Queues that outlive a crash of the broker; its connection may be lost by the test."""
    await topology.wait_until_safe(lanes.connection, QUEUES, 10)
    return lanes


async def backlog(shop: Connection[Cursor], lanes: Lanes) -> None:
    """Queue a chunk for each of thirty add-ons: three seconds of work."""
    simple_addons(shop, CHUNKS)
    for addon in range(1, CHUNKS + 1):
        await lanes.send(json.dumps([[[addon]], {}, None]).encode())


def done(shop: Connection[Cursor]) -> int:
    """Return how many rows are right."""
    return len(rows(shop, "SELECT 1 FROM addons WHERE current_version = id + 10000"))


async def waiting(private: servers.Servers) -> dict[str, int | None]:
    """Return how many messages wait in each queue, over a connection of its own."""
    connection = await aio_pika.connect(private.amqp_url, timeout=10)
    names = (QUEUES.bulk, QUEUES.urgent, QUEUES.retry, QUEUES.dead)
    found = {name: await topology.count(connection, name, 10) for name in names}
    await connection.close()
    return found


NOTHING = dict.fromkeys((QUEUES.bulk, QUEUES.urgent, QUEUES.retry, QUEUES.dead), 0)


@pytest.mark.timeout(120)
async def test_a_database_that_is_killed_and_comes_back(
    start: Start,
    pair: servers.Servers,
    shop: Connection[Cursor],
    safe: Lanes,
    private: servers.Servers,
) -> None:
    """No attempt is counted, nothing becomes a dead letter."""
    assert private.maria is not None
    await backlog(shop, safe)
    start(*RATE)
    eventually(lambda: done(shop) >= 5, "it works")

    private.maria.kill()
    time.sleep(1)  # noqa: ASYNC251 - an outage, however short
    private.maria.start()

    again = servers.connect(pair.mysql_url)
    eventually(lambda: done(again) == CHUNKS, "all is done")
    again.close()
    assert await waiting(private) == NOTHING


@pytest.mark.timeout(150)
async def test_a_locked_row_is_written_by_the_second_attempt(
    start: Start, shop: Connection[Cursor], safe: Lanes, private: servers.Servers
) -> None:
    """A minute later, from the retry queue through the bulk lane."""
    simple_addons(shop, 300)
    with shop.cursor() as cursor:
        cursor.execute("SELECT id FROM addons WHERE id = 1 FOR UPDATE")
    await safe.send(json.dumps([[[1]], {}, None]).encode())
    start(*RATE)
    deadline = time.monotonic() + 30
    while (await waiting(private))[QUEUES.retry] != 1:
        assert time.monotonic() < deadline, "no copy in the retry queue"
    shop.rollback()

    deadline = time.monotonic() + RETRY_SECONDS + 20
    while not done(shop):
        assert time.monotonic() < deadline, "it never came back"
        time.sleep(0.5)  # noqa: ASYNC251 - nothing else runs in this loop

    assert rows(shop, "SELECT starts FROM aioworker_budget") == [(2,)]
    assert await waiting(private) == NOTHING
