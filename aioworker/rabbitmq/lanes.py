"""A task's queues over one connection: taken from the two lanes, put off and set aside.

A message is taken by `get` once it may start, or up to 0.1 s before. A consumer's prefetch would
hold messages unacknowledged for as long as the rate makes them wait, and RabbitMQ closes the
channel after 30 minutes of that.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from datetime import UTC, datetime
from typing import Protocol

import aio_pika
from aio_pika.abc import (
    AbstractChannel,
    AbstractConnection,
    AbstractQueue,
)
from aio_pika.exceptions import ChannelPreconditionFailed
from aiormq.abc import DeliveredMessage

from aioworker.errors import BrokerError
from aioworker.rabbitmq.connection import close
from aioworker.rabbitmq.delivery import Answers, Delivery, GroupedAnswers
from aioworker.rabbitmq.errors import describe, in_time
from aioworker.rabbitmq.frames import PlainConnection
from aioworker.rabbitmq.publisher import Publisher
from aioworker.rabbitmq.queues import Queues, check

# For so long after a `get` that found nothing, a lane is empty if RabbitMQ counts nothing in it.
# An idle worker leaves a node that is cut off within 10 s: after this, the next look, and the wait
# for the answer to a `get`, which takes 1 ms where all is well.
EMPTY_SECONDS = 5.0
ANSWER_SECONDS = 3.0
# So many messages are taken one by one behind a large one. It went back perhaps, and another worker
# may hold it just then, and give it back, too.
BEHIND_LARGE = 16
CHANNELS = 8  # of a session, at most
_LONG_AGO = datetime.min.replace(tzinfo=UTC)  # nobody knows when


class Lanes(Protocol):
    """Where a worker's deliveries come from, and where copies of them go.

    Each method raises a `BrokerError` if a queue is gone or does not answer, or if the connection
    is lost.
    """

    async def hold_something(self, *, sure: bool = False) -> bool:
        """Return whether a message waits in either lane; nothing is kept."""

    async def take(self, *, bulk_first: bool = False) -> Delivery | None:
        """Take one message, from the urgent or the bulk lane first; None when both are empty."""

    async def take_more(self, most: int) -> list[Delivery]:
        """Take up to so many messages at once, the oldest first.

        They come from the urgent lane if one came from there last; else one of them does, if it
        can, and the others come from the bulk lane. At most one of them is large.
        """

    async def take_beside(
        self, running: Sequence[Delivery], *, bulk_first: bool = False
    ) -> Delivery | None:
        """Take one message while others run, over a channel that none of those came over.

        None if both lanes are empty, the next one may be large, or there is no other channel.
        """

    def consume(
        self, at_once: int, arrive: Callable[[Delivery], None], end: Callable[[], None]
    ) -> AbstractAsyncContextManager[None]:
        """Inside, messages come by themselves."""

    async def count_queued(self) -> tuple[int, int]:
        """Return how many messages wait in the urgent lane, and in the bulk lane."""

    async def count_put_off(self) -> int:
        """Return how many messages wait in the retry queue."""

    async def put_behind(self, lane: str, message: aio_pika.Message) -> None:
        """Put a copy to the end of a lane, `urgent` or `bulk`, confirmed."""

    async def put_off(self, message: aio_pika.Message) -> None:
        """Have a copy wait in the retry queue, confirmed."""

    async def set_aside(self, message: aio_pika.Message) -> None:
        """Put a copy into the dead letters, confirmed."""

    async def unblocked(self) -> None:
        """Return when RabbitMQ, short of memory or disk before, takes copies again."""


class OpenLanes:
    """The lanes of one connection; copies of messages go by another connection.

    Args:
        connection: For a channel of its own, where messages flow.
        channel: What both lanes are used over. Others are used beside it only where messages are
            taken at once, since a channel's answers come one after the other, or beside a run.
        publisher: Publishes the copies.
        queues: The task's.
        lanes: The two to take from, the one that is taken from first before the other.
        timeout: Seconds for each step.
        several: Whether more channels may be opened.
    """

    def __init__(
        self,
        connection: PlainConnection,
        channel: AbstractChannel,
        publisher: Publisher,
        queues: Queues,
        lanes: tuple[AbstractQueue, AbstractQueue],
        timeout: float,
        *,
        several: bool = True,
    ) -> None:
        self._connection = connection
        self._channel = channel
        self._publisher = publisher
        self._names = queues
        self._queues = lanes
        self._timeout = timeout
        self._several = several
        self._refusal: ChannelPreconditionFailed | None = None
        self._sides = [lanes]  # both lanes as each channel has them, this one's first
        self._answers: dict[AbstractChannel, Answers] = defaultdict(Answers)
        self._flowing = lanes[0].name  # where the last message came from
        self._left = math.inf  # how many lay behind it, by RabbitMQ's count; not known yet
        self._alone = 0  # how many messages are still to be taken one by one
        self._empty_at = -math.inf  # when RabbitMQ last answered that both are, by a clock
        channel.close_callbacks.add(self._closed)

    @classmethod
    async def open(
        cls,
        connection: PlainConnection,
        publisher: Publisher,
        queues: Queues,
        timeout: float,
        *,
        several: bool = True,
    ) -> OpenLanes:
        """Open them, as `OpenLanes` says.

        Raises:
            QueueMissingError: One of the task's queues is not there.
            BrokerError: RabbitMQ refuses, or the connection is lost.
        """
        names = (queues.urgent, queues.bulk, queues.retry, queues.dead)
        await check(connection, names, timeout)
        channel, lanes = await _open(connection, queues, timeout)
        return cls(connection, channel, publisher, queues, lanes, timeout, several=several)

    def _closed(self, _channel: object, error: BaseException | None) -> None:
        if isinstance(error, ChannelPreconditionFailed):
            self._refusal = error

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Say why RabbitMQ itself closed a channel, where a step failed for that.

        Raises:
            BrokerError: A run took longer than RabbitMQ's `consumer_timeout`.
        """
        try:
            yield
        except BrokerError as error:
            if self._refusal is None:
                raise
            why = describe(self._refusal)
            raise BrokerError(f"RabbitMQ closed the channel: {why}") from error

    async def hold_something(self, *, sure: bool = False) -> bool:
        """Return whether a message waits in either lane; nothing is kept.

        RabbitMQ also counts nothing in a queue that does not answer it. So that is believed for
        a while after a `get` found nothing. One that finds a message gives it back.

        Args:
            sure: Whether it is not believed without a `get` now. That may take as long as any
                other step; else it is given up after `ANSWER_SECONDS`.

        Raises:
            BrokerError: A lane is gone or does not answer, or the connection is lost.
        """
        for queue in self._queues:
            if await self._count(queue.name):
                return True
        if not sure and time.monotonic() - self._empty_at < EMPTY_SECONDS:
            return False
        seconds = self._timeout if sure else min(self._timeout, ANSWER_SECONDS)
        delivery = await self._take(seconds)
        if delivery is not None:
            await delivery.give_back()
        return delivery is not None

    async def count_queued(self) -> tuple[int, int]:
        """Return how many messages wait in the urgent and in the bulk lane, by RabbitMQ's count.

        Raises:
            BrokerError: A lane is gone, or the connection is lost.
        """
        urgent, bulk = self._queues
        return await self._count(urgent.name), await self._count(bulk.name)

    async def count_put_off(self) -> int:
        """Return how many messages wait in the retry queue, by RabbitMQ's count.

        Raises:
            BrokerError: The queue is gone, or the connection is lost.
        """
        return await self._count(self._names.retry)

    async def put_behind(self, lane: str, message: aio_pika.Message) -> None:
        """Put a copy to the end of a lane, `urgent` or `bulk`; it is confirmed.

        Raises:
            BrokerError: It is not: then it may be there all the same.
        """
        name = self._names.urgent if lane == "urgent" else self._names.bulk
        await self._publisher.publish(name, message)

    async def put_off(self, message: aio_pika.Message) -> None:
        """Have a copy wait in the retry queue; it is confirmed.

        Raises:
            BrokerError: It is not: then it may be there all the same.
        """
        await self._publisher.publish(self._names.retry, message)

    async def set_aside(self, message: aio_pika.Message) -> None:
        """Put a copy into the dead letters; it is confirmed.

        Raises:
            BrokerError: It is not: then it may be there all the same.
        """
        await self._publisher.publish(self._names.dead, message)

    async def unblocked(self) -> None:
        """Return when RabbitMQ, short of memory or disk before, takes copies again."""
        await self._publisher.unblocked()

    async def _count(self, name: str) -> int:
        async with in_time(name, self._timeout):
            declared = await self._channel.declare_queue(name, passive=True)
        return declared.declaration_result.message_count or 0

    async def take(self, *, bulk_first: bool = False) -> Delivery | None:
        """Take one message, from the urgent lane first, or the bulk lane; None if both are empty.

        Raises:
            BrokerError: A lane is gone or does not answer, or the connection is lost.
        """
        return await self._take(self._timeout, bulk_first=bulk_first)

    async def _take(self, seconds: float, *, bulk_first: bool = False) -> Delivery | None:
        for queue in reversed(self._queues) if bulk_first else self._queues:
            if (delivery := await self._get(queue, seconds)) is not None:
                self._alone = BEHIND_LARGE if delivery.large else max(0, self._alone - 1)
                return delivery
        self._empty_at = time.monotonic()
        return None

    async def _get(self, queue: AbstractQueue, seconds: float) -> Delivery | None:
        async with in_time(queue.name, seconds):
            message = await queue.get(fail=False, timeout=None)
        if message is None:
            return None
        self._flowing, self._left = queue.name, message.message_count or 0
        return Delivery.of(message, self._timeout, self._answers[queue.channel])

    async def take_more(self, most: int) -> list[Delivery]:
        """Take up to so many messages at once, the oldest first.

        They come from the urgent lane if one came from there last; else one of them does, if it
        can, and the others come from the bulk lane. Nearly all of a `get` is a wait for its answer.
        At most one of them is large. Each other large one goes back and is asked for alone.

        Raises:
            BrokerError: A lane is gone or does not answer, or the connection is lost.
        """
        # None is asked for that is not there; and where one is large, others may be.
        most = 1 if self._alone else int(min(most, self._left))
        while len(self._sides) < most and self._may_open:
            await self._open_side()
        if min(most, len(self._sides)) <= 1:
            one = await self.take()
            return [] if one is None else [one]
        asked = [urgent if self._flowing == urgent.name else bulk for urgent, bulk in self._sides]
        asked[0] = self._queues[0]
        gets = (self._get(queue, self._timeout) for queue in asked[:most])
        found = await asyncio.gather(*gets)
        if found[0] is not None:
            self._flowing = self._queues[0].name  # there may be more that go first
        came = sorted(filter(None, found), key=_place)
        if any(one.large for one in came):
            self._alone = BEHIND_LARGE
        for one in came:
            if one.withheld:
                await one.give_back()
        came = [one for one in came if not one.withheld]
        if not came and (one := await self.take()) is not None:
            came.append(one)
        return came

    async def take_beside(
        self, running: Sequence[Delivery], *, bulk_first: bool = False
    ) -> Delivery | None:
        """Take one message while others run, over a channel that none of those came over.

        A `get` that RabbitMQ refuses closes its channel, and what runs could not be acknowledged
        any more. A large message goes back.

        Raises:
            BrokerError: A lane is gone or does not answer, or the connection is lost.
        """
        if self._alone:
            return None
        used = {id(one.answers) for one in running}
        sides = [one for one in self._sides[1:] if id(self._answers[one[0].channel]) not in used]
        if not sides and not (self._may_open and len(self._sides) < CHANNELS):
            return None
        side = sides[0] if sides else await self._open_side()
        for queue in reversed(side) if bulk_first else side:
            if (delivery := await self._get(queue, self._timeout)) is None:
                continue
            if not delivery.withheld:
                return delivery
            self._alone = BEHIND_LARGE
            await delivery.give_back()
            return None
        self._empty_at = time.monotonic()
        return None

    async def _open_side(self) -> tuple[AbstractQueue, AbstractQueue]:
        """Open one more channel, which takes small messages, and return both lanes over it."""
        channel, lanes = await _open(self._connection, self._names, self._timeout)
        channel.close_callbacks.add(self._closed)
        self._connection.keep_small(channel)
        self._sides.append(lanes)
        return lanes

    @property
    def _may_open(self) -> bool:
        """Whether one more channel may be opened; beyond a limit RabbitMQ ends the connection."""
        if not self._several:
            return False
        if self._connection.transport is None:
            return True  # to be told that it is lost
        opened = self._connection.transport.connection
        most = opened.connection_tune.channel_max  # 0 is no limit
        return not most or len(opened.channels) < most

    @asynccontextmanager
    async def consume(
        self, at_once: int, arrive: Callable[[Delivery], None], end: Callable[[], None]
    ) -> AsyncIterator[None]:
        """Have RabbitMQ send what is in the lanes, each message as soon as there is room for it.

        What was not settled inside goes back into its lane.

        Args:
            at_once: Messages of each lane that may be unsettled at once.
            arrive: Called with each.
            end: Called when RabbitMQ sends no more: a lane was deleted, or a run took longer
                than its `consumer_timeout`.

        Raises:
            BrokerError: A lane is gone, or the connection is lost.
        """

        def ended(*_: object) -> None:
            end()

        answers = GroupedAnswers()

        async def came(delivered: DeliveredMessage) -> None:
            arrive(Delivery.of(_Message(delivered), self._timeout, answers))

        bulk = self._queues[-1].name
        async with in_time(bulk, self._timeout):
            channel = await self._connection.channel()
        try:
            channel.close_callbacks.add(self._closed)
            channel.close_callbacks.add(ended)
            self._channel.close_callbacks.add(ended)
            async with in_time(bulk, self._timeout):
                await channel.set_qos(at_once)
                sender = await channel.get_underlay_channel()
            sender.on_consumer_cancel_callbacks.add(ended)
            for lane in self._queues:
                async with in_time(lane.name, self._timeout):
                    await sender.basic_consume(lane.name, came)
            yield
        finally:
            self._channel.close_callbacks.discard(ended)
            await close(channel, self._timeout)


class _Message(aio_pika.IncomingMessage):
    """A message that anybody may change, also once it is acknowledged.

    aio-pika's asks before it sets each of 28 attributes, and takes three times as long to make.
    """

    __slots__ = ()
    __setattr__ = object.__setattr__  # type: ignore[assignment]  # takes any object


def _place(one: Delivery) -> tuple[bool, datetime]:
    """Return what goes before what, of messages that came over several channels, in any order."""
    return one.lane == "bulk", one.published or _LONG_AGO


async def _open(
    connection: AbstractConnection, queues: Queues, timeout: float
) -> tuple[AbstractChannel, tuple[AbstractQueue, AbstractQueue]]:
    """Return a new channel, and both lanes over it, the urgent one first."""
    async with in_time(queues.bulk, timeout):
        channel = await connection.channel()
        urgent = await channel.get_queue(queues.urgent, ensure=False)
        bulk = await channel.get_queue(queues.bulk, ensure=False)
    return channel, (urgent, bulk)
