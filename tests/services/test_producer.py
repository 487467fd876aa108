"""A Producer: what it is made with, and the event loop that it belongs to."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from aioworker import Producer
from aioworker.errors import UsageError
from support import servers
from tests.conftest import QUEUES, TASK, Lanes


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), "5", True])
def test_a_timeout_that_is_none_is_refused_at_once(timeout: Any) -> None:
    with pytest.raises(UsageError) as refusal:
        Producer("amqp://127.0.0.1/", timeout=timeout)

    assert str(refusal.value) == f"expected timeout from 0.1 to 3600 seconds, got: {timeout!r}"


async def test_a_producer_serves_one_event_loop(pair: servers.Servers, lanes: Lanes) -> None:
    """The connection of one that has ended answers nobody: two seconds, and noise, each time."""
    producer = Producer(pair.amqp_url, timeout=10)
    await producer.publish(TASK, [1])

    with pytest.raises(UsageError, match=r"^expected a Producer of this event loop, got another"):
        await asyncio.to_thread(asyncio.run, producer.publish(TASK, [2]))

    await producer.publish(TASK, [3])
    await producer.__aexit__()
    assert await lanes.holds(QUEUES.bulk, 2)


async def test_a_producer_that_was_left_serves_another_event_loop(
    pair: servers.Servers, lanes: Lanes
) -> None:
    producer = Producer(pair.amqp_url, timeout=10)

    async def publish() -> None:
        async with producer:
            await producer.publish(TASK, [1])

    for _ in range(2):
        await asyncio.to_thread(asyncio.run, publish())

    assert await lanes.holds(QUEUES.bulk, 2)
