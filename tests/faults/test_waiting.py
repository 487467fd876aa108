"""What takes minutes to be seen: RabbitMQ's acknowledgement timeout, a host that dies."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import aio_pika
import pytest

from support import servers
from tests.conftest import (
    QUEUES,
    Lanes,
    Worker,
    current_versions,
    eventually,
    execute,
    rows,
    simple_addons,
)

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

Start = Callable[..., Worker]
CONSUMER_TIMEOUT_MS = 60_000
WATCHED_SECONDS = 180
SESSION_SECONDS = 31  # the task timeout, and thirty more


@pytest.fixture
def impatient(private: servers.Servers) -> Iterator[servers.Broker]:
    """The broker, closing channels that keep a delivery unsettled for a minute."""
    assert private.broker is not None
    setting = "application:set_env(rabbit, consumer_timeout, {})."
    private.broker.control("eval", setting.format(CONSUMER_TIMEOUT_MS))
    yield private.broker
    private.broker.control("eval", setting.format(1_800_000))


def channels(broker: servers.Broker) -> set[str]:
    """Return the open channels, by their process in the broker."""
    return set(broker.control("list_channels", "pid").split()[1:])


def settled(broker: servers.Broker) -> dict[str, tuple[int, int]]:
    """Return how many messages of each queue are ready, and how many unacknowledged."""
    listed = json.loads(
        broker.control(
            "list_queues",
            "--formatter",
            "json",
            "name",
            "messages_ready",
            "messages_unacknowledged",
        )
    )
    return {one["name"]: (one["messages_ready"], one["messages_unacknowledged"]) for one in listed}


@pytest.mark.timeout(300)
async def test_a_rate_of_one_an_hour_never_meets_the_acknowledgement_timeout(
    start: Start, shop: Connection[Cursor], lanes: Lanes, impatient: servers.Broker
) -> None:
    """A worker that held what waits would lose its channel, and start over and over again."""
    simple_addons(shop, 3)
    # One who does hold a delivery shows that the broker means it.
    holding = await aio_pika.connect(impatient.url())
    channel = await holding.channel()
    own = await channel.declare_queue("held", durable=True, arguments={"x-queue-type": "quorum"})
    await channel.default_exchange.publish(aio_pika.Message(b"x"), "held")
    await own.get(timeout=10)
    before = channels(impatient)
    start("consume", "--rate-limit", "1/h")
    deadline = time.monotonic() + 20
    while len(channels(impatient)) == len(before):
        assert time.monotonic() < deadline
    workers = channels(impatient) - before
    await lanes.send(json.dumps([[[1]], {}, None]).encode())
    eventually(lambda: current_versions(shop)[1], "its start is over")
    for addon in (2, 3):
        await lanes.send(json.dumps([[[addon]], {}, None]).encode())

    await asyncio.sleep(WATCHED_SECONDS)  # the time itself is what is tested

    assert channel.is_closed, "the broker closes no channel: the test shows nothing"
    assert workers <= channels(impatient)
    assert settled(impatient)[QUEUES.bulk] == (2, 0)
    assert rows(shop, "SELECT starts FROM aioworker_budget") == [(1,)]
    assert list(current_versions(shop).values()) == [10_001, None, None]
    await holding.close()


@pytest.mark.timeout(180)
async def test_the_turn_of_a_host_that_died_is_free_after_the_session_timeout(
    start: Start, shop: Connection[Cursor], lanes: Lanes
) -> None:
    """Its connection stands as far as the server knows; without a timeout for eight hours."""
    simple_addons(shop, 250)
    execute(
        shop,
        "CREATE TRIGGER slow BEFORE UPDATE ON addons FOR EACH ROW"
        " SET NEW.modified = IF(SLEEP(0.01), NEW.modified, NEW.modified)",
    )
    await lanes.send(json.dumps([[list(range(1, 251))], {}, None]).encode())
    options = {"AIOWORKER_TASK_TIMEOUT": "1", "AIOWORKER_LOG_LEVEL": "debug"}
    dead = start("consume", "--rate-limit", "100/s", **options)
    deadline = time.monotonic() + 20
    while not rows(shop, "SELECT 1 FROM aioworker_budget WHERE starts = 1"):
        assert time.monotonic() < deadline
    os.kill(dead.process.pid, signal.SIGSTOP)
    began = time.monotonic()
    await lanes.send(json.dumps([[[250]], {}, None]).encode())

    start("consume", "--rate-limit", "100/s", **options)

    while current_versions(shop)[250] is None:
        assert time.monotonic() - began < 3 * SESSION_SECONDS, "the turn was never given back"
    assert time.monotonic() - began > SESSION_SECONDS / 2, "there was no turn to wait for"
    os.kill(dead.process.pid, signal.SIGCONT)
