"""A message as RabbitMQ delivered it: what its headers say is read once, and by nobody else."""

from __future__ import annotations

import asyncio
import hashlib
from datetime import datetime
from typing import NamedTuple, TypeAlias

from aio_pika.abc import AbstractIncomingMessage

from aioworker.rabbitmq.errors import in_time
from aioworker.rabbitmq.message import (
    PUBLISHED,
    REASON,
    SMALL_BYTES,
    TOGETHER,
    WITHHELD,
    aware,
    moment,
    retries,
)

Message: TypeAlias = AbstractIncomingMessage  # for those who import no aio_pika
KEY_LENGTH = 64
SUSPECT_RETURNS = 3  # deliveries that were not settled, and a message is served alone
ID_BYTES = 200  # of what others call their messages: AMQP has room for 255


class Answers:
    """Which deliveries of one channel wait for an answer; RabbitMQ numbers them from 1."""

    def __init__(self) -> None:
        self._last = 0
        self._waiting: set[int] = set()

    def expect(self, tag: int) -> None:
        """Note a delivery. One that aiormq dropped unseen before it waits, too."""
        self._waiting.update(range(self._last + 1, tag + 1))
        self._last = max(self._last, tag)

    def note(self, tag: int, *, with_earlier: bool = False) -> None:
        """Note an answer to a delivery, or to all until that one."""
        self._waiting.discard(tag)
        if with_earlier:
            self._waiting = {other for other in self._waiting if other > tag}

    def reach(self, tags: set[int]) -> int:
        """Return until which delivery none waits for its answer but these."""
        return min(self._waiting - tags, default=self._last + 1) - 1

    async def acknowledge(self, delivery: Delivery, *, with_earlier: bool = False) -> None:
        """Acknowledge a delivery, or all until that one.

        Raises:
            BrokerError: The connection is lost.
        """
        message = delivery.message
        async with in_time(message.routing_key or "", delivery.timeout):
            await message.ack(multiple=with_earlier)
        self.note(delivery.tag, with_earlier=with_earlier)


class GroupedAnswers(Answers):
    """Acknowledges in one step what is done in the same round of the event loop."""

    def __init__(self) -> None:
        super().__init__()
        self._done: list[tuple[Delivery, asyncio.Future[None]]] = []
        self._sending: asyncio.Task[None] | None = None

    async def acknowledge(self, delivery: Delivery, *, with_earlier: bool = False) -> None:
        """Acknowledge a delivery, with others that are done; or all until that one."""
        if with_earlier:
            await super().acknowledge(delivery, with_earlier=True)
            return
        sent: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._done.append((delivery, sent))
        if len(self._done) == 1:
            self._sending = asyncio.create_task(self._send())
        await sent

    async def _send(self) -> None:
        # What was done in the same round has come by now.
        done, self._done = sorted(self._done, key=lambda one: one[0].tag), []
        reach = self.reach({delivery.tag for delivery, _ in done})
        together = [one for one in done if one[0].tag <= reach]
        steps = [together, *([one] for one in done[len(together) :])]
        try:
            for step in filter(None, steps):
                await super().acknowledge(step[-1][0], with_earlier=len(step) > 1)
                for _, sent in step:
                    if not sent.done():  # who waited may be cut off
                        sent.set_result(None)
        except BaseException as error:
            for _, sent in done:
                if not sent.done():
                    sent.set_exception(error)
            if not isinstance(error, Exception):
                raise


class Delivery(NamedTuple):
    """One delivery of a message.

    Args:
        message: The message itself, as it came.
        id: Its id; of one without, a name made of its body.
        has_id: Whether whoever published it gave it an id.
        key: What it is known by while it runs, up to 64 printable characters of ASCII: its id, or
            a digest where that will not do.
        lane: `urgent` or `bulk`, where it was taken from.
        attempt: Which run of the message this is, from 1, as far as its headers can tell.
        returns: How often it was delivered before, as quorum queues count it. As of RabbitMQ 4.3
            what a worker gives back is not counted, only what it held when it died or lost its
            connection.
        losses: How many attempts lost their connection before this one.
        first_failed: When it failed first; None if it has not failed yet.
        retried: Whether it comes from the retry queue: it failed before.
        together: With how many it may run at most, since more of them failed; None for any number.
        published: When it was published, by the clock of whoever did; None if that is not known.
        timeout: Seconds for RabbitMQ to take an answer.
        answers: Which deliveries of its channel were answered.
    """

    message: Message
    id: str
    has_id: bool
    key: str
    lane: str
    attempt: int
    returns: int
    losses: int
    first_failed: datetime | None
    retried: bool
    together: int | None
    published: datetime | None
    timeout: float
    answers: Answers

    @classmethod
    def of(
        cls, message: Message, timeout: float = 10.0, answers: Answers | None = None
    ) -> Delivery:
        """Read a message's headers, whatever their values are.

        Args:
            message: The message.
            timeout: Seconds for RabbitMQ to take an answer.
            answers: Which deliveries of its channel were answered; None if each is answered by
                itself.
        """
        headers = message.headers
        known = message_id(message)
        if answers is None:
            answers = Answers()
        else:
            answers.expect(message.delivery_tag or 0)
        return cls(
            message=message,
            id=known,
            has_id=bool(headers.get("id") or message.message_id),
            key=_key(known, message.body),
            lane="urgent" if (message.routing_key or "").endswith(".urgent") else "bulk",
            attempt=(retries(headers) or 0) + 1,
            returns=_number(headers.get("x-delivery-count")),
            losses=_number(headers.get("x-aioworker-lost")),
            first_failed=moment(headers.get("x-aioworker-first-failed-at")),
            retried=REASON in headers,
            together=max(_number(headers.get(TOGETHER)), 0) or None,
            published=moment(headers.get(PUBLISHED)) or aware(message.timestamp),
            timeout=timeout,
            answers=answers,
        )

    @property
    def tag(self) -> int:
        """The number of the delivery, in its channel."""
        return self.message.delivery_tag or 0

    @property
    def withheld(self) -> bool:
        """Whether it came without its body, which is too large for the channel."""
        return WITHHELD in self.message.headers

    @property
    def large(self) -> bool:
        """Whether its body is too large for a channel that takes small ones."""
        return self.withheld or len(self.message.body) > SMALL_BYTES

    @property
    def copied(self) -> bool:
        """Whether a worker has put it back: it lies behind messages that were published later."""
        return self.retried or self.together is not None

    def repeats(self, other: Delivery) -> bool:
        """Whether this delivery, by RabbitMQ a second one, is of the message of another one."""
        known = (self.key, self.attempt) == (other.key, other.attempt)
        return known and self.message.body == other.message.body

    async def acknowledge(self, *, with_earlier: bool = False) -> None:
        """Let RabbitMQ forget the message: all that it asked for is done, or a copy is confirmed.

        Args:
            with_earlier: Whether it forgets all that came over the channel before, too.

        Raises:
            BrokerError: The connection is lost: RabbitMQ will deliver it again.
        """
        await self.answers.acknowledge(self, with_earlier=with_earlier)

    async def give_back(self) -> None:
        """Let the message go back to its lane, as it came.

        Raises:
            BrokerError: The connection is lost: RabbitMQ will deliver it again.
        """
        async with in_time(self.message.routing_key or "", self.timeout):
            await self.message.nack(requeue=True)
        self.answers.note(self.tag)


def message_id(message: Message) -> str:
    """Return a message's id; of one without, a name made of its body."""
    known = message.headers.get("id") or message.message_id
    if not known:
        return f"unknown-{hashlib.sha256(message.body).hexdigest()[:16]}"
    return str(known).encode(errors="replace")[:ID_BYTES].decode(errors="ignore")


def _key(known: str, body: bytes) -> str:
    if len(known) <= KEY_LENGTH and known.isascii() and known.isprintable():
        return known
    return hashlib.sha256(known.encode(errors="replace") + body).hexdigest()


def _number(value: object) -> int:
    return value if type(value) is int else 0
