"""Lanes in memory: what RabbitMQ keeps of a task, and does with what a worker answers.

`tests/services/test_lanes.py` holds them to the real ones.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from contextlib import asynccontextmanager
from copy import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import aio_pika
from aio_pika.exceptions import ChannelInvalidStateError
from aiormq.abc import DeliveredMessage
from pamqp.commands import Basic
from pamqp.header import ContentHeader

from aioworker.errors import ConnectionLostError
from aioworker.rabbitmq.delivery import Answers, Delivery, GroupedAnswers
from aioworker.rabbitmq.lanes import BEHIND_LARGE, CHANNELS
from aioworker.rabbitmq.queues import Queues

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from aioworker.errors import BrokerError

QUEUES = Queues.of("shop", "aioworker")


@dataclass(frozen=True)
class Kept:
    """A message as it lies in a queue.

    Args:
        body: Its body.
        properties: Its properties, headers among them.
        deliveries: How often it was delivered.
    """

    body: bytes
    properties: Basic.Properties
    deliveries: int = 0


class MemoryBroker:
    """The four queues of a task, over which any number of connections go.

    Attributes:
        queues: What lies in each queue.
        acknowledged: The ids of what was acknowledged, in that order.
        refusal: Raised in place of confirming a copy, if there is one.
        takes: Set while it takes copies; as long as it is not, it is short of memory.
        changed: Set when something lies elsewhere than before.
    """

    def __init__(self) -> None:
        names = (QUEUES.urgent, QUEUES.bulk, QUEUES.retry, QUEUES.dead)
        self.queues: dict[str, deque[Kept]] = {name: deque() for name in names}
        self.acknowledged: list[str] = []
        self.refusal: BrokerError | None = None
        self.takes = asyncio.Event()
        self.takes.set()
        self.changed = asyncio.Event()

    def send(
        self, body: bytes = b"[[], {}, null]", lane: str = QUEUES.bulk, **headers: Any
    ) -> None:
        """Publish a message."""
        self.publish(lane, aio_pika.Message(body, headers={"task": "shop", "id": "one"} | headers))

    def publish(self, queue: str, message: aio_pika.Message) -> None:
        """Take a message, as it comes out of its frames."""
        header = ContentHeader()
        header.unmarshal(
            ContentHeader(body_size=len(message.body), properties=message.properties).marshal()
        )
        self.queues[queue].append(Kept(message.body, header.properties))
        self.changed.set()

    def headers(self, queue: str) -> list[dict[str, Any]]:
        """Return the headers of what lies in a queue, the oldest first."""
        return [dict(kept.properties.headers or {}) for kept in self.queues[queue]]

    def expire(self) -> None:
        """Let what was put off go back to its lane, as after its time."""
        while self.queues[QUEUES.retry]:
            self.queues[QUEUES.bulk].append(self.queues[QUEUES.retry].popleft())


class MemoryLanes:
    """One connection's lanes.

    Args:
        broker: Where the messages lie.
        at: Called at each step with its name: a test may count them, or fail one.
    """

    def __init__(
        self, broker: MemoryBroker, at: Callable[[str], None] = lambda _step: None
    ) -> None:
        self.broker = broker
        self.held: dict[int, tuple[str, Kept]] = {}
        self.lost = False
        self._at = at
        self._number = 0  # of the last delivery, whatever its channel
        self._tags: Counter[Answers] = Counter()  # of the last one of each channel
        self._channels: dict[int, Answers] = {}
        self._answers = Answers()
        self._sides: list[Answers] = []  # of the other channels
        self._flowing = QUEUES.urgent  # where the last message came from
        self._alone = 0  # how many messages are still to be taken one by one

    async def hold_something(self, *, sure: bool = False) -> bool:
        """Return whether a message waits in either lane."""
        self._step("hold_something, surely" if sure else "hold_something")
        return any(self.broker.queues[lane] for lane in (QUEUES.urgent, QUEUES.bulk))

    async def take(self, *, bulk_first: bool = False) -> Delivery | None:
        """Take one message, from the urgent or the bulk lane first; None when both are empty."""
        self._step("take")
        lanes = (QUEUES.urgent, QUEUES.bulk)
        for lane in reversed(lanes) if bulk_first else lanes:
            if self.broker.queues[lane]:
                one = self._deliver(lane)
                self._alone = BEHIND_LARGE if one.large else max(0, self._alone - 1)
                return one
        return None

    async def take_beside(
        self, running: Sequence[Delivery], *, bulk_first: bool = False
    ) -> Delivery | None:
        """Take one small message while others run."""
        self._step("take_beside")
        lanes = (QUEUES.urgent, QUEUES.bulk)
        used = [one.answers for one in running]
        side = next((one for one in self._sides if one not in used), None)
        if side is None and len(self._sides) + 1 >= CHANNELS:
            return None
        if side is None:
            self._sides.append(side := Answers())
        for lane in reversed(lanes) if bulk_first else lanes:
            if self._alone or not self.broker.queues[lane]:
                continue
            one = self._deliver(lane, side)
            if not one.large:
                return one
            self._alone = BEHIND_LARGE
            await one.give_back()
        return None

    async def take_more(self, most: int) -> list[Delivery]:
        """Take up to so many messages at once."""
        self._step("take_more")
        lanes = [QUEUES.urgent, *[self._flowing] * (most - 1)]
        came: list[Delivery] = []
        withheld: list[Delivery] = []
        for number, lane in enumerate([] if self._alone else lanes):
            if self.broker.queues[lane]:
                delivery = self._deliver(lane)
                (withheld if delivery.large and number else came).append(delivery)
        if any(one.large for one in [*came, *withheld]):
            self._alone = BEHIND_LARGE
        for delivery in withheld:
            await delivery.give_back()
        if came:
            self._flowing = came[0].message.routing_key or ""
        if not came and (one := await self.take()) is not None:
            came.append(one)
        return came

    @asynccontextmanager
    async def consume(
        self, at_once: int, arrive: Callable[[Delivery], None], end: Callable[[], None]
    ) -> AsyncIterator[None]:
        """Inside, messages come by themselves; what is held at the end goes back."""
        self._step("consume")

        async def push() -> None:
            while True:
                for lane in (QUEUES.urgent, QUEUES.bulk):
                    held = [tag for tag, (queue, _) in self.held.items() if queue == lane]
                    room = at_once - len(set(held) - before)
                    for _ in range(min(room, len(self.broker.queues[lane]))):
                        arrive(self._deliver(lane, answers))
                self.broker.changed.clear()
                await self.broker.changed.wait()

        before, answers = set(self.held), GroupedAnswers()
        pushing = asyncio.create_task(push())
        try:
            yield
        finally:
            pushing.cancel()
            await asyncio.gather(pushing, return_exceptions=True)
            for tag in sorted(set(self.held) - before):
                self._put_back(tag)

    async def count_queued(self) -> tuple[int, int]:
        """Return how many messages wait in the urgent lane, and in the bulk lane."""
        self._step("count_queued")
        return len(self.broker.queues[QUEUES.urgent]), len(self.broker.queues[QUEUES.bulk])

    async def count_put_off(self) -> int:
        """Return how many messages wait in the retry queue."""
        self._step("count_put_off")
        return len(self.broker.queues[QUEUES.retry])

    async def put_behind(self, lane: str, message: aio_pika.Message) -> None:
        """Put a copy to the end of a lane."""
        self._copy(QUEUES.urgent if lane == "urgent" else QUEUES.bulk, message)

    async def put_off(self, message: aio_pika.Message) -> None:
        """Have a copy wait in the retry queue."""
        self._copy(QUEUES.retry, message)

    async def set_aside(self, message: aio_pika.Message) -> None:
        """Put a copy into the dead letters."""
        self._copy(QUEUES.dead, message)

    async def unblocked(self) -> None:
        """Return when copies are taken again."""
        await self.broker.takes.wait()

    def lose(self) -> None:
        """Lose the connection: what is held goes back."""
        self.lost = True
        for tag in sorted(self.held):
            self._put_back(tag)

    def settle(self, number: int, *, give_back: bool, with_earlier: bool = False) -> None:
        """Take what a worker answers for a message that it holds, or for all up to that one."""
        if number not in self.held:
            raise ChannelInvalidStateError("closed")  # as aio-pika does
        self._at("give_back" if give_back else "acknowledge")
        self.broker.changed.set()
        if give_back:
            self._put_back(number)
        else:
            earlier = [one for one in self.held if one < number and with_earlier]
            channel = self._channels[number]
            for one in [*(one for one in earlier if self._channels[one] is channel), number]:
                _queue, kept = self.held.pop(one)
                self.broker.acknowledged.append(str((kept.properties.headers or {}).get("id")))

    def _step(self, name: str) -> None:
        self._at(name)
        if self.lost:
            raise ConnectionLostError("connection to RabbitMQ lost")

    def _copy(self, queue: str, message: aio_pika.Message) -> None:
        self._step("copy")
        if self.broker.refusal is not None:
            raise self.broker.refusal
        self.broker.publish(queue, message)

    def _deliver(self, lane: str, answers: Answers | None = None) -> Delivery:
        kept = self.broker.queues[lane].popleft()
        self._flowing = lane
        channel = answers or self._answers
        self._number += 1
        self._tags[channel] += 1
        self.held[self._number], self._channels[self._number] = (lane, kept), channel
        properties = kept.properties
        if kept.deliveries:
            properties = copy(properties)
            properties.headers = {**(properties.headers or {}), "x-delivery-count": kept.deliveries}
        header = ContentHeader(body_size=len(kept.body), properties=properties)
        method = Basic.GetOk(
            delivery_tag=self._tags[channel],
            exchange="",
            routing_key=lane,
            redelivered=bool(kept.deliveries),
        )
        delivered = DeliveredMessage(delivery=method, header=header, body=kept.body, channel=None)  # type: ignore[arg-type]
        return Delivery.of(_Message(self, delivered, self._number), answers=channel)

    def _put_back(self, tag: int) -> None:
        queue, kept = self.held.pop(tag)
        lane = self.broker.queues[queue]
        # Before all that was never taken, and behind what came back before.
        place = sum(one.deliveries > 0 for one in lane)
        lane.insert(place, replace(kept, deliveries=kept.deliveries + 1))


class _Message(aio_pika.IncomingMessage):
    """A message that is settled in memory."""

    def __init__(self, lanes: MemoryLanes, delivered: DeliveredMessage, number: int) -> None:
        super().__init__(delivered)
        self._lanes = lanes
        self._number = number

    async def ack(self, multiple: bool = False) -> None:
        self._lanes.settle(self._number, give_back=False, with_earlier=multiple)

    async def nack(self, multiple: bool = False, requeue: bool = True) -> None:
        self._lanes.settle(self._number, give_back=True)
