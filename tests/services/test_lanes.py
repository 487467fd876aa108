"""What a worker relies on of its lanes: by RabbitMQ, and by the lanes in memory that stand in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import aio_pika
import pytest
from aio_pika.abc import AbstractQueue

from aioworker.addresses import BrokerAddress, Nodes
from aioworker.clock import own_time
from aioworker.errors import BrokerError, QueueMissingError
from aioworker.rabbitmq import copies
from aioworker.rabbitmq.connection import connected
from aioworker.rabbitmq.delivery import Delivery
from aioworker.rabbitmq.lanes import BEHIND_LARGE, CHANNELS, Lanes, OpenLanes
from aioworker.rabbitmq.message import PUBLISHED, SMALL_BYTES, WITHHELD
from aioworker.rabbitmq.publisher import Publisher
from tests.conftest import QUEUES, declare
from tests.doubles import lanes as memory

if TYPE_CHECKING:
    from support.servers import Broker, Servers

BODY = b"[[], {}, null]"
LARGE = SMALL_BYTES + 1
MOST_RETURNS = 5
SECONDS = 20


class Real:
    """Lanes of RabbitMQ."""

    queues = QUEUES

    def __init__(self, pair: Servers) -> None:
        self._pair = pair
        self._stack = AsyncExitStack()

    async def open(self) -> Lanes:
        """Open them, declared and empty."""
        self._nodes = Nodes(BrokerAddress.parse_all(self._pair.amqp_url))
        self._own = await self._stack.enter_async_context(connected(self._nodes, 10, "test"))
        await declare(self._own)
        self._channel = await self._own.channel()
        for name in (QUEUES.urgent, QUEUES.bulk, QUEUES.retry, QUEUES.dead):
            await (await self._channel.get_queue(name, ensure=False)).purge()
        return await self.again()

    async def again(self) -> Lanes:
        """Open them over a new connection."""
        self._theirs = await self._stack.enter_async_context(connected(self._nodes, 10, "test"))
        publisher = Publisher(self._nodes, 10, "test")
        await self._stack.enter_async_context(publisher)
        return await OpenLanes.open(self._theirs, publisher, QUEUES, 10)

    async def send(self, lane: str, message: str, second: int = 0, body: bytes = BODY) -> None:
        """Publish a message, in some second of an hour."""
        await self._channel.default_exchange.publish(outgoing(message, second, body), lane)

    async def lie(self, queue: str) -> list[str]:
        """Take all that lies in a queue; return its ids."""
        found = []
        taken = await self._channel.get_queue(queue, ensure=False)
        while (message := await taken.get(no_ack=True, fail=False)) is not None:
            found.append(str(message.message_id))
        return found

    async def lose(self) -> None:
        """Lose the connection."""
        await self._theirs.close()

    async def close(self) -> None:
        """Close all connections."""
        await self._stack.aclose()


class Memory:
    """Lanes in memory."""

    queues = memory.QUEUES

    def __init__(self) -> None:
        self._broker = memory.MemoryBroker()

    async def open(self) -> Lanes:
        """Open them."""
        return await self.again()

    async def again(self) -> Lanes:
        """Open them over a new connection."""
        self._lanes = memory.MemoryLanes(self._broker)
        return self._lanes

    async def send(self, lane: str, message: str, second: int = 0, body: bytes = BODY) -> None:
        """Publish a message, in some second of an hour."""
        self._broker.publish(lane, outgoing(message, second, body))

    async def lie(self, queue: str) -> list[str]:
        """Take all that lies in a queue; return its ids."""
        found = [str(headers["id"]) for headers in self._broker.headers(queue)]
        self._broker.queues[queue].clear()
        return found

    async def lose(self) -> None:
        """Lose the connection."""
        self._lanes.lose()

    async def close(self) -> None:
        """There is nothing to close."""


Place = Real | Memory


def outgoing(message: str, second: int, body: bytes) -> aio_pika.Message:
    """Return a message that is published in some second of an hour."""
    headers = {"id": message, PUBLISHED: f"2026-01-01T00:{second // 60:02}:{second % 60:02}Z"}
    return aio_pika.Message(body, headers=dict(headers), message_id=message)


@pytest.fixture(params=["RabbitMQ", "memory"])
async def place(request: pytest.FixtureRequest) -> AsyncIterator[Place]:
    """Where the lanes are."""
    pair = request.getfixturevalue("pair") if request.param == "RabbitMQ" else None
    made: Place = Memory() if pair is None else Real(pair)
    yield made
    await made.close()


@pytest.fixture
async def lanes(place: Place) -> Lanes:
    """The lanes of a connection."""
    return await place.open()


async def take(lanes: Lanes) -> Delivery:
    """Take a message that is there."""
    async with asyncio.timeout(SECONDS):
        while (delivery := await lanes.take()) is None:  # noqa: ASYNC110 - a moment later it is
            await asyncio.sleep(0.01)
    return delivery


async def beside(lanes: Lanes, running: list[Delivery], *, bulk_first: bool = False) -> Delivery:
    """Take a message that is there while others run."""
    async with asyncio.timeout(SECONDS):
        while (delivery := await lanes.take_beside(running, bulk_first=bulk_first)) is None:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return delivery


async def test_empty_lanes_hold_nothing(lanes: Lanes) -> None:
    assert await lanes.take() is None
    assert not await lanes.hold_something()
    assert not await lanes.hold_something(sure=True)
    assert await lanes.count_put_off() == 0
    async with asyncio.timeout(SECONDS):
        await lanes.unblocked()


async def test_the_urgent_lane_is_taken_from_first(place: Place, lanes: Lanes) -> None:
    await place.send(place.queues.bulk, "bulk")
    await place.send(place.queues.urgent, "urgent")

    taken = [await take(lanes), await take(lanes)]

    assert [(one.id, one.lane) for one in taken] == [("urgent", "urgent"), ("bulk", "bulk")]


async def test_the_bulk_lane_is_taken_from_first_if_somebody_asks(
    place: Place, lanes: Lanes
) -> None:
    await place.send(place.queues.bulk, "bulk")
    await take_until(lanes)
    await place.send(place.queues.urgent, "urgent")

    first = await lanes.take(bulk_first=True)

    assert [first and first.lane, (await take(lanes)).lane] == ["bulk", "urgent"]


async def test_several_are_taken_at_once(place: Place, lanes: Lanes) -> None:
    for number in range(6):
        await place.send(place.queues.urgent, str(number))
    await take_until(lanes)
    first = await take(lanes)

    came = [await lanes.take_more(3), await lanes.take_more(3), await lanes.take_more(3)]

    assert [len(some) for some in came] == [3, 2, 0]
    taken = [first, *came[0], *came[1]]
    assert sorted(one.id for one in taken) == list("012345")
    for one in taken:
        await one.acknowledge()
    await place.lose()
    assert await place.lie(place.queues.urgent) == []


async def test_several_come_from_the_lane_of_the_last_one_and_the_urgent_one(
    place: Place, lanes: Lanes
) -> None:
    for number in range(6):
        await place.send(place.queues.bulk, str(number))
    await take(lanes)

    first = await lanes.take_more(3)
    await place.send(place.queues.urgent, "urgent")
    await take_until(lanes)
    second = await lanes.take_more(3)

    assert [one.lane for one in first] == ["bulk", "bulk"]
    assert [one.lane for one in second] == ["urgent", "bulk", "bulk"]


async def test_behind_an_urgent_one_several_come_from_the_urgent_lane(
    place: Place, lanes: Lanes
) -> None:
    for number in range(6):
        await place.send(place.queues.bulk, str(number))
        await place.send(place.queues.urgent, str(number))
    await take_until(lanes)
    await lanes.take(bulk_first=True)

    first, second = await lanes.take_more(3), await lanes.take_more(3)

    assert [one.lane for one in first] == ["urgent", "bulk", "bulk"]
    assert [one.lane for one in second] == ["urgent"] * 3


async def test_several_are_in_the_order_of_their_publication(place: Place, lanes: Lanes) -> None:
    for number in range(161):
        await place.send(place.queues.urgent, f"{number:03}", number)
    await take(lanes)

    for first in range(1, 161, 4):
        came = [one.id for one in await lanes.take_more(4)]
        assert came == [f"{number:03}" for number in range(first, first + 4)]


@pytest.mark.parametrize("most", [1, 4])
async def test_for_one_message_each_lane_is_asked_once(
    pair: Servers, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """Also behind one of which RabbitMQ said that it was the last in its lane."""
    place = Real(pair)
    lanes = await place.open()
    await place.send(QUEUES.urgent, "last")
    await place.send(QUEUES.bulk, "one")
    await take_until(lanes)
    await take(lanes)
    asked = []
    get = OpenLanes._get

    async def counted(self: OpenLanes, queue: AbstractQueue, seconds: float) -> Delivery | None:
        asked.append(queue.name)
        return await get(self, queue, seconds)

    monkeypatch.setattr(OpenLanes, "_get", counted)

    assert len(await lanes.take_more(most)) == 1
    assert asked == [QUEUES.urgent, QUEUES.bulk]
    await place.close()


@pytest.mark.parametrize("queue", ["urgent", "bulk"])
@pytest.mark.parametrize(
    "sizes",
    ["sssLssss", "LLLLLLLLLLLL", "sLsLsLsLsLsLs", "ssssssssLLLLssssssss"],
    ids=["one among small ones", "only large ones", "every second one", "some in a row"],
)
async def test_one_large_message_comes_at_a_time_and_goes_back_once_at_most(
    place: Place, lanes: Lanes, queue: str, sizes: str
) -> None:
    lane = getattr(place.queues, queue)
    bodies = {
        f"{number:02}": (b"L" if size == "L" else b"s") * (LARGE if size == "L" else SMALL_BYTES)
        for number, size in enumerate(sizes)
    }
    for number, (message, body) in enumerate(bodies.items()):
        await place.send(lane, message, number, body)
    await take_until(lanes)

    taken = [await take(lanes)]
    while came := await lanes.take_more(8):
        assert sum(len(one.message.body) > SMALL_BYTES for one in came) <= 1
        taken += came
        for one in came:
            await one.acknowledge()

    assert {one.id: one.message.body for one in taken} == bodies
    assert len(taken) == len(bodies)
    assert max(one.returns for one in taken) <= 1


async def test_behind_a_large_message_several_come_again(place: Place, lanes: Lanes) -> None:
    await place.send(place.queues.bulk, "large", 0, bytes(LARGE))
    for number in range(1, 41):
        await place.send(place.queues.bulk, str(number), number)
    await take_until(lanes)
    assert (await take(lanes)).id == "large"

    came = []
    while some := await lanes.take_more(8):
        came.append(len(some))

    assert came[:BEHIND_LARGE] == [1] * BEHIND_LARGE
    assert max(came) == 7
    assert sum(came) == 40


async def test_several_workers_give_a_large_message_back_few_times(pair: Servers) -> None:
    """Each may have given it back, and take small ones while another one holds it."""
    place = Real(pair)
    first = await place.open()
    for number in range(300):
        body = bytes(LARGE) if number % 10 == 9 else BODY
        await place.send(QUEUES.bulk, f"{number:03}", number, body)
    await take_until(first)

    taken: list[Delivery] = []

    async def work(lanes: Lanes) -> None:
        while came := await lanes.take_more(8):
            taken.extend(came)
            for one in came:
                await one.acknowledge()

    await asyncio.gather(
        *[work(lanes) for lanes in (first, await place.again(), await place.again())]
    )

    assert sorted(one.id for one in taken) == [f"{number:03}" for number in range(300)]
    assert max(one.returns for one in taken) <= MOST_RETURNS
    await place.close()


async def test_a_channel_that_has_the_number_of_a_closed_one_takes_large_messages(
    pair: Servers,
) -> None:
    place = Real(pair)
    lanes = await place.open()
    for number in range(9):
        await place.send(QUEUES.urgent, str(number), number)
    await take_until(lanes)
    for one in [await take(lanes), *await lanes.take_more(8)]:
        await one.acknowledge()
    opened = place._theirs.transport
    assert opened is not None
    numbers = opened.connection.channels
    closed = numbers[max(numbers)]
    assert closed is not None
    await closed.close()

    channel = await place._theirs.channel()
    await place.send(QUEUES.urgent, "large", 9, bytes(LARGE))

    assert channel.number == closed.number
    queue = await channel.get_queue(QUEUES.urgent, ensure=False)
    async with asyncio.timeout(SECONDS):
        while (message := await queue.get(fail=False)) is None:  # noqa: ASYNC110 - it comes
            await asyncio.sleep(0.01)
    assert message.body == bytes(LARGE)
    await place.close()


async def test_a_message_that_says_so_itself_comes_with_its_body(pair: Servers) -> None:
    """A publisher may choose any header."""
    place = Real(pair)
    lanes = await place.open()
    for number in range(9):
        message = outgoing(str(number), number, BODY)
        if number:
            message.headers[WITHHELD] = True
        await place._channel.default_exchange.publish(message, QUEUES.urgent)
    await take_until(lanes)

    taken = [await take(lanes)]
    while came := await lanes.take_more(8):
        taken += came

    assert sorted(one.id for one in taken) == [str(number) for number in range(9)]
    assert {one.message.body for one in taken} == {BODY}
    await place.close()


async def test_of_several_none_is_kept_when_the_connection_is_lost(
    place: Place, lanes: Lanes
) -> None:
    for number in range(3):
        await place.send(place.queues.urgent, str(number))
    await take_until(lanes)
    held = await lanes.take_more(3)

    await place.lose()

    for one in held:
        with pytest.raises(BrokerError):
            await one.acknowledge()
    with pytest.raises(BrokerError):
        await lanes.take_more(3)
    assert len(await (await place.again()).take_more(3)) == 3


@pytest.mark.parametrize("channels", [2, 3, 4])
async def test_no_more_channels_are_opened_than_rabbitmq_lets(
    pair: Servers, broker: Broker, channels: int
) -> None:
    set_most = "application:set_env(rabbit, channel_max, {})."
    broker.control("eval", set_most.format(channels))
    place = Real(pair)
    try:
        lanes = await place.open()
    finally:
        broker.control("eval", set_most.format(2047))
    for number in range(8):
        await place.send(QUEUES.urgent, str(number))
    await take_until(lanes)

    came = [await lanes.take_more(4), await lanes.take_more(4)]

    assert [len(some) for some in came] == [channels, min(8 - channels, channels)]
    await place.close()


async def test_a_message_is_first_of_all_delivered_once(place: Place, lanes: Lanes) -> None:
    await place.send(place.queues.bulk, "one")

    delivery = await take(lanes)

    assert (delivery.attempt, delivery.returns, delivery.losses) == (1, 0, 0)
    assert (delivery.first_failed, delivery.message.redelivered) == (None, False)
    assert delivery.message.body == BODY


async def test_one_answer_may_acknowledge_all_that_came_before(place: Place, lanes: Lanes) -> None:
    for number in range(4):
        await place.send(place.queues.urgent, str(number))
    taken = [await take(lanes) for _ in range(4)]

    await taken[2].acknowledge(with_earlier=True)

    assert taken[3].answers.reach({4}) == 4
    await place.lose()
    assert await place.lie(place.queues.urgent) == ["3"]


async def test_what_comes_over_another_channel_has_answers_of_its_own(pair: Servers) -> None:
    place = Real(pair)
    lanes = await place.open()
    for number in range(9):
        await place.send(QUEUES.urgent, str(number))
    await take_until(lanes)
    first, several = await take(lanes), await lanes.take_more(4)

    [same] = [one for one in several if one.answers is first.answers]
    assert same.tag == first.tag + 1
    assert [one.tag for one in several if one is not same] == [1, 1, 1]
    await same.acknowledge(with_earlier=True)

    await place.lose()
    assert len(await place.lie(QUEUES.urgent)) == 7
    await place.close()


async def test_what_is_acknowledged_is_gone(place: Place, lanes: Lanes) -> None:
    await place.send(place.queues.bulk, "one")

    await (await take(lanes)).acknowledge()
    await place.lose()

    assert await place.lie(place.queues.bulk) == []


async def test_what_is_given_back_comes_again_before_what_lay_behind_it(
    place: Place, lanes: Lanes
) -> None:
    await place.send(place.queues.bulk, "one")
    await place.send(place.queues.bulk, "two")

    await (await take(lanes)).give_back()
    again = await take(lanes)

    assert (again.id, again.message.redelivered, again.attempt) == ("one", True, 1)


async def test_what_is_given_back_first_comes_again_first(place: Place, lanes: Lanes) -> None:
    for number in range(5):
        await place.send(place.queues.bulk, str(number))
    held = [await take(lanes) for _ in range(4)]

    for one in held[:3]:
        await one.give_back()
    again = [(await take(lanes)).id for _ in range(3)]
    await held[3].give_back()

    assert again == ["0", "1", "2"]
    assert [(await take(lanes)).id for _ in range(2)] == ["3", "4"]


async def test_to_ask_keeps_nothing(place: Place, lanes: Lanes) -> None:
    await place.send(place.queues.bulk, "one")
    await take_until(lanes)

    assert (await take(lanes)).id == "one"


async def take_until(lanes: Lanes) -> None:
    """Ask until the lanes say that they hold something."""
    async with asyncio.timeout(SECONDS):
        while not await lanes.hold_something():  # noqa: ASYNC110 - RabbitMQ counts a moment later
            await asyncio.sleep(0.01)


async def test_what_is_held_when_the_connection_is_lost_comes_again(
    place: Place, lanes: Lanes
) -> None:
    await place.send(place.queues.bulk, "one")
    held = await take(lanes)

    await place.lose()

    with pytest.raises(BrokerError):
        await held.acknowledge()
    with pytest.raises(BrokerError):
        await held.give_back()
    with pytest.raises(BrokerError):
        await lanes.take()
    again = await take(await place.again())
    assert (again.id, again.message.redelivered, again.returns) == ("one", True, 1)


async def test_a_copy_waits_in_the_retry_queue_and_carries_its_attempt(
    place: Place, lanes: Lanes
) -> None:
    await place.send(place.queues.bulk, "one")
    delivery = await take(lanes)

    await lanes.put_off(copies.retry(delivery, "why", None, counts=True, lost=False))
    await delivery.acknowledge()

    async with asyncio.timeout(SECONDS):
        while not await lanes.count_put_off():  # noqa: ASYNC110 - RabbitMQ counts a moment later
            await asyncio.sleep(0.01)
    assert await lanes.count_put_off() == 1
    assert await place.lie(place.queues.retry) == ["one"]
    assert await lanes.take() is None


@pytest.mark.parametrize("lane", ["bulk", "urgent"])
async def test_what_is_moved_lies_at_the_end_of_its_own_lane(
    place: Place, lanes: Lanes, lane: str
) -> None:
    queue = getattr(place.queues, lane)
    await place.send(queue, "one")
    await place.send(queue, "two")
    delivery = await take(lanes)

    await lanes.put_behind(lane, copies.moved(delivery, 4))
    await delivery.acknowledge()

    taken = [await take(lanes), await take(lanes)]
    assert [(one.id, one.lane, one.together) for one in taken] == [
        ("two", lane, None),
        ("one", lane, 4),
    ]
    assert taken[1].returns == 0, "its copy is counted from the beginning"


async def test_a_dead_letter_lies_with_the_others(place: Place, lanes: Lanes) -> None:
    await place.send(place.queues.urgent, "one")
    delivery = await take(lanes)

    letter = copies.dead_letter(delivery, "why", "KeyError", "", "test", own_time())
    await lanes.set_aside(letter)
    await delivery.acknowledge()

    assert await place.lie(place.queues.dead) == ["one"]


async def test_a_flow_brings_as_many_of_each_lane_as_there_is_room_for(
    place: Place, lanes: Lanes
) -> None:
    arrived: asyncio.Queue[Delivery] = asyncio.Queue()
    for number in range(3):
        await place.send(place.queues.bulk, f"bulk {number}")
        await place.send(place.queues.urgent, f"urgent {number}")

    async with lanes.consume(2, arrived.put_nowait, lambda: None), asyncio.timeout(SECONDS):
        first = [await arrived.get() for _ in range(4)]
        for delivery in first:
            if delivery.id == "bulk 0":
                await delivery.acknowledge()
        more = await arrived.get()
        assert arrived.empty()

    assert sorted(one.id for one in first) == ["bulk 0", "bulk 1", "urgent 0", "urgent 1"]
    assert more.id == "bulk 2"


async def test_what_a_flow_leaves_goes_back(place: Place, lanes: Lanes) -> None:
    arrived: asyncio.Queue[Delivery] = asyncio.Queue()
    await place.send(place.queues.bulk, "one")
    await place.send(place.queues.bulk, "two")

    async with lanes.consume(2, arrived.put_nowait, lambda: None), asyncio.timeout(SECONDS):
        await (await arrived.get()).acknowledge()
        await arrived.get()

    again = await take(lanes)
    assert (again.id, again.message.redelivered) == ("two", True)


async def test_one_that_is_taken_beside_others_comes_over_another_channel(
    place: Place, lanes: Lanes
) -> None:
    for number in range(4):
        await place.send(place.queues.bulk, str(number))
    running = [await take(lanes)]

    for _ in range(3):
        another = await beside(lanes, running)
        assert all(another.answers is not one.answers for one in running)
        running.append(another)

    assert [one.id for one in running] == ["0", "1", "2", "3"]
    assert await lanes.take_beside(running) is None
    await running[0].acknowledge(with_earlier=True)
    await place.lose()
    assert sorted(await place.lie(place.queues.bulk)) == ["1", "2", "3"]


async def test_no_more_channels_are_opened_beside_others_than_are_used_at_once(
    place: Place, lanes: Lanes
) -> None:
    """RabbitMQ may allow a user so many, and ends the connection beyond that."""
    for number in range(CHANNELS + 1):
        await place.send(place.queues.bulk, str(number))
    running = [await take(lanes)]
    for _ in range(CHANNELS - 1):
        running.append(await beside(lanes, running))

    assert await lanes.take_beside(running) is None

    assert (await take(lanes)).id == str(CHANNELS)


async def test_a_channel_is_used_again_beside_others(place: Place, lanes: Lanes) -> None:
    for number in range(4):
        await place.send(place.queues.bulk, str(number))
    first = await take(lanes)
    second = await beside(lanes, [first])
    third = await beside(lanes, [second])

    fourth = await beside(lanes, [third])

    assert fourth.answers is second.answers


async def test_beside_others_the_urgent_lane_goes_first_or_the_bulk_lane(
    place: Place, lanes: Lanes
) -> None:
    for lane in (place.queues.bulk, place.queues.urgent):
        for number in range(3):
            await place.send(lane, f"{lane}-{number}")
    first = await take(lanes)

    urgent = await beside(lanes, [first])
    bulk = await beside(lanes, [first], bulk_first=True)

    assert (urgent.lane, bulk.lane) == ("urgent", "bulk")


async def test_no_large_message_is_held_beside_others(place: Place, lanes: Lanes) -> None:
    await place.send(place.queues.bulk, "small")
    await place.send(place.queues.bulk, "large", body=b" " * LARGE)
    await place.send(place.queues.bulk, "behind")
    running = [await take(lanes)]

    assert await lanes.take_beside(running) is None
    assert await lanes.take_beside(running) is None

    large = await take(lanes)
    assert (large.id, len(large.message.body)) == ("large", LARGE)
    assert await lanes.take_beside([large]) is None


async def test_what_runs_can_be_acknowledged_where_a_lane_is_gone(pair: Servers) -> None:
    """A `get` that RabbitMQ refuses closes the channel over which it was asked for."""
    place = Real(pair)
    lanes = await place.open()
    await place.send(QUEUES.bulk, "one")
    running = await take(lanes)
    async with connected(Nodes(BrokerAddress.parse_all(pair.amqp_url)), 10, "test") as other:
        channel = await other.channel()
        await (await channel.get_queue(QUEUES.urgent, ensure=False)).delete(
            if_unused=False, if_empty=False
        )

    with pytest.raises(QueueMissingError):
        await lanes.take_beside([running])
    await running.acknowledge()

    assert await place.lie(QUEUES.bulk) == []
    await place.close()
