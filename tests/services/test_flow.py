"""Tasks without a limit that need no database: several messages at once, none of them lost."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from aioworker.rabbitmq.delivery import SUSPECT_RETURNS
from aioworker.settling.outcome import Kind
from aioworker.tasks.task import Task
from aioworker.worker.session import AT_ONCE
from tests.conftest import QUEUES, TASK, InProcess, Lanes, make_worker

if TYPE_CHECKING:
    from aioworker.mysql.database import Database
    from support.servers import Broker, Servers

Make = Callable[..., InProcess]
SECONDS = 20
SLOTS = AT_ONCE + 1  # the first one is looked at before the others are sent


@pytest.fixture
def make(pair: Servers, database: Database, shop: object) -> Make:
    """Make a worker of a function that takes one number, and goes on until it is stopped."""

    def worker(function: Callable[..., Any], *, burst: bool = False) -> InProcess:
        return make_worker(pair, database, task=Task(TASK, function), burst=burst)

    return worker


async def send(lanes: Lanes, *numbers: int, lane: str = QUEUES.bulk) -> None:
    for number in numbers:
        await lanes.send(json.dumps([[number], {}, None]).encode(), lane)


async def send_last(lanes: Lanes, number: int) -> None:
    """Send a message that has one attempt left."""
    headers: dict[str, Any] = {
        "task": TASK,
        "id": f"number {number}",
        "retries": 5,
        "x-aioworker-first-failed-at": "2026-01-01T00:00:00+00:00",
    }
    await lanes.send(json.dumps([[number], {}, None]).encode(), headers=headers)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not holds():  # noqa: ASYNC110 - whatever it is, it is not ours to notify
            await asyncio.sleep(0.01)


async def test_several_run_at_once_and_an_urgent_one_needs_not_wait(
    make: Make, lanes: Lanes, stop: asyncio.Event
) -> None:
    """The bulk lane has its slots full of slow ones; the urgent lane has slots of its own."""
    running: set[int] = set()
    release = asyncio.Event()

    async def slow(number: int) -> None:
        running.add(number)
        if number:
            await release.wait()

    await send(lanes, *range(1, 41))
    worker = make(slow)
    serving = asyncio.create_task(worker.run(stop))
    await until(lambda: len(running) == SLOTS)

    await send(lanes, 0, lane=QUEUES.urgent)

    await until(lambda: 0 in running)
    assert len(running) == SLOTS + 1
    release.set()
    await until(lambda: worker.consumer.settled[Kind.ACK] == 41)
    stop.set()
    assert await serving


async def test_a_stop_finishes_what_runs_and_leaves_the_rest(
    make: Make, lanes: Lanes, stop: asyncio.Event
) -> None:
    done: list[int] = []
    release = asyncio.Event()
    started = 0

    async def slow(number: int) -> None:
        nonlocal started
        started += 1
        await release.wait()
        done.append(number)

    await send(lanes, *range(40))
    worker = make(slow)
    serving = asyncio.create_task(worker.run(stop))
    await until(lambda: started == SLOTS)

    stop.set()
    release.set()
    assert await serving

    assert worker.consumer.settled == {Kind.ACK: len(done)}
    assert started == len(done) == SLOTS
    async with asyncio.timeout(SECONDS):
        while await lanes.count(QUEUES.bulk) != 40 - SLOTS:  # noqa: ASYNC110 - the broker's
            await asyncio.sleep(0.05)


async def test_what_fails_is_put_off_and_stops_nobody(
    make: Make, lanes: Lanes, stop: asyncio.Event
) -> None:
    async def odd(number: int) -> None:
        if number % 2:
            raise ValueError(number)

    await send(lanes, *range(20))
    worker = make(odd, burst=True)

    assert not await worker.run(stop)

    assert worker.consumer.settled == {Kind.ACK: 10, Kind.RETRY: 10}
    assert await lanes.holds(QUEUES.retry, 10)


async def test_connections_that_are_closed_lose_nothing(
    make: Make, lanes: Lanes, broker: Broker, stop: asyncio.Event
) -> None:
    """What ran is delivered again: at least once."""
    done: set[int] = set()
    release = asyncio.Event()

    async def slow(number: int) -> None:
        await release.wait()
        done.add(number)

    await send(lanes, *range(40))
    worker = make(slow)
    serving = asyncio.create_task(worker.run(stop))
    await until(lambda: worker.consumer.starts == SLOTS)

    await asyncio.to_thread(broker.control, "close_all_connections", "maintenance")
    release.set()

    await until(lambda: done == set(range(40)))
    await until(lambda: worker.consumer.settled[Kind.ACK] == 40)
    stop.set()
    assert await serving


async def test_a_lane_that_is_deleted_is_told_in_a_flow_and_heard_once_it_is_there_again(
    make: Make, lanes: Lanes, stop: asyncio.Event, caplog: pytest.LogCaptureFixture
) -> None:
    """RabbitMQ tells a consumer of that once, and sends nothing more."""
    urgent: list[int] = []

    async def slow(number: int) -> None:
        if number < 0:
            urgent.append(await lanes.count(QUEUES.bulk))
        await asyncio.sleep(0.1)

    await send(lanes, *range(1000))
    worker = make(slow)
    serving = asyncio.create_task(worker.run(stop))
    await until(lambda: worker.consumer.starts > SLOTS)

    queue = await lanes.channel.get_queue(QUEUES.urgent, ensure=False)
    await queue.delete(if_unused=False, if_empty=False)
    told = f"queue {QUEUES.urgent} does not exist: run `aioworker init`"
    await until(lambda: told in [wait["reason"] for wait in waits(caplog)])
    arguments = QUEUES.arguments("quorum")[QUEUES.urgent]
    await lanes.channel.declare_queue(QUEUES.urgent, durable=True, arguments=arguments)
    await send(lanes, -1, lane=QUEUES.urgent)

    await until(lambda: bool(urgent))
    assert urgent[0] > 0, "it ran once the other lane was empty"
    stop.set()
    assert await serving


@pytest.fixture
def impatient(broker: Broker) -> Iterator[None]:
    """The broker takes back what is not settled within a second, on channels opened by now."""
    setting = "application:set_env(rabbit, consumer_timeout, {}),"
    setting += "application:set_env(rabbit, channel_tick_interval, {})."
    broker.control("eval", setting.format(1_000, 500))
    yield
    broker.control("eval", setting.format(1_800_000, 60_000))


async def test_what_rabbitmq_takes_back_does_not_run_twice_at_once(
    make: Make,
    lanes: Lanes,
    broker: Broker,
    impatient: None,
    stop: asyncio.Event,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A run that takes longer than its acknowledgement timeout is delivered again meanwhile."""
    running: list[int] = []
    most = 0
    release = asyncio.Event()

    async def slow(number: int) -> None:
        nonlocal most
        running.append(number)
        most = max(most, len(running))
        await release.wait()
        running.remove(number)

    def channels() -> int:
        return len(broker.control("list_channels", "pid").split())

    await send(lanes, 1)
    worker = make(slow)
    serving = asyncio.create_task(worker.run(stop))
    await until(lambda: len(running) == 1)
    opened = await asyncio.to_thread(channels)
    async with asyncio.timeout(SECONDS):
        while await asyncio.to_thread(channels) >= opened:
            pass
    assert (worker.consumer.starts, most) == (1, 1)
    release.set()

    await until(lambda: worker.consumer.settled[Kind.ACK] == 1)
    stop.set()
    assert await serving

    assert (worker.consumer.starts, most) == (1, 1), "how its run ended is not forgotten"
    told = [fields["reason"] for fields in waits(caplog) if "closed" in fields["reason"]]
    assert len(told) == 1
    assert told[0].startswith("RabbitMQ closed the channel: PRECONDITION_FAILED - delivery ack")


def waits(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """Return what was told of each wait."""
    return [one.__dict__["fields"] for one in caplog.records if one.message == "waiting"]


async def test_what_comes_back_again_and_again_is_served_alone(
    make: Make, lanes: Lanes, stop: asyncio.Event
) -> None:
    """When a worker dies RabbitMQ counts all that it held: only the killer may be held then."""
    running = most = 0

    async def note(_number: int) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.02)
        running -= 1

    await send(lanes, *range(5))
    queue = await lanes.channel.get_queue(QUEUES.bulk, ensure=False)
    for _ in range(SUSPECT_RETURNS):
        held = [await queue.get(timeout=10) for _ in range(5)]
        for delivery in held:
            await delivery.reject(requeue=True)

    assert await make(note, burst=True).run(stop)

    assert most == 1


async def test_of_many_that_fail_for_good_at_once_none_is_set_aside(
    make: Make, lanes: Lanes, stop: asyncio.Event
) -> None:
    """None is alone, though none is in a lane: it is a bad deploy."""
    all_of_them = asyncio.Barrier(4)

    async def bad(_number: int) -> None:
        await all_of_them.wait()
        raise ValueError

    for number in range(4):
        await send_last(lanes, number)
    worker = make(bad, burst=True)

    assert not await worker.run(stop)

    assert worker.consumer.settled == {Kind.POSTPONED: 4}


async def test_two_that_fail_for_good_at_once_are_not_put_off_for_ever(
    make: Make, lanes: Lanes, stop: asyncio.Event
) -> None:
    """One that has failed too cannot show that the task works."""
    both = asyncio.Barrier(2)

    async def bad(_number: int) -> None:
        await both.wait()
        raise ValueError

    for number in range(2):
        await send_last(lanes, number)
    worker = make(bad, burst=True)

    assert not await worker.run(stop)

    assert worker.consumer.settled == {Kind.POSTPONED: 1, Kind.DEAD_LETTER: 1}
