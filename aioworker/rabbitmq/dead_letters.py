"""Dead letters, read so that none is lost, however often somebody reads.

A letter can only be seen by taking it, and RabbitMQ counts how often each is taken and given
back: under a policy `delivery-limit` it would end one that was looked at too often. So none is
given back. Each is taken alone, a copy of it confirmed where it goes, then it is acknowledged:
one that stays goes behind the others, and when all were seen they lie in their old order.
Only a queue over a limit with `reject-publish` takes no copy: there the letter in hand goes back.

Two looks that begin at once can both become consumers, and the one that steps back puts its letter
behind copies of the other's. So each copy carries the look that made it: it shows none twice.
"""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import Awaitable, Callable, Collection
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from typing import TypeVar

from aio_pika.abc import (
    AbstractChannel,
    AbstractConnection,
    AbstractIncomingMessage,
    AbstractQueue,
)

from aioworker.errors import BrokerError, NotTakenError, QueueMissingError
from aioworker.rabbitmq import copies
from aioworker.rabbitmq.connection import close
from aioworker.rabbitmq.errors import explain, forbids, in_time, uncounted
from aioworker.rabbitmq.letter import Filter, Letter
from aioworker.rabbitmq.message import LOOK
from aioworker.rabbitmq.publisher import Publisher
from aioworker.rabbitmq.queues import Queues, counted
from aioworker.words import command

# Where a letter goes: the name of a queue, its own for one that stays; None for nowhere.
Decide = Callable[[Letter, AbstractIncomingMessage], str | None]
# Shows how far a look is: told how many letters there are, then how many were looked at.
Progress = Callable[[int], AbstractContextManager[Callable[[int], None]]]

_Result = TypeVar("_Result")
QUIET_SECONDS = 0.05  # without a letter, and the queue is asked whether there are more
RETRY_SECONDS = 0.3  # at most, between tries to be the only one who looks


def no_progress(_total: int) -> AbstractContextManager[Callable[[int], None]]:
    """Show nobody how far a look is."""
    return nullcontext(lambda _seen: None)


class DeadLetters:
    """A look at each of a task's dead letters, one at a time, by nobody else meanwhile.

    Args:
        queues: The task's.
        users: Who publishes the copies, by any of its connections' names.
        connection: Where the letters are read.
        publisher: Where their copies go.
        timeout: Seconds for each step, and to become the only one who looks.

    Attributes:
        queues: The same.
        seen: How many were looked at.
        gone: How many left for good, RabbitMQ having answered since.
        unsure: Whether RabbitMQ has not answered since the last one was acknowledged.
        came: How many came meanwhile.
    """

    def __init__(
        self,
        queues: Queues,
        users: Collection[str],
        connection: AbstractConnection,
        publisher: Publisher,
        timeout: float,
    ) -> None:
        self.queues = queues
        self.seen = self.gone = self.came = 0
        self.unsure = False
        self._users = users
        self._timeout = timeout
        self._connection = connection
        self._publisher = publisher
        self._look: str | None = None  # what the copies of this look carry, once it is one
        self._total = 0  # as many as lay there at the beginning are seen
        self._leaves = False  # whether the last one does
        self._stopping = False
        self._deliveries: asyncio.Queue[AbstractIncomingMessage] = asyncio.Queue()
        self._consumer = ""  # its tag, while there is one

    @property
    def perhaps_gone(self) -> int:
        """How many more may have left for good: 0 or 1."""
        return int(self.unsure and self._leaves)

    async def open(self) -> None:
        """See that there is such a queue."""
        self._channel: AbstractChannel = await self._in_time(self._connection.channel())
        await self._in_time(self._channel.set_qos(1))
        self._queue: AbstractQueue = await self._channel.get_queue(self.queues.dead, ensure=False)
        self._total, _consumers = await self._counts()

    async def close(self) -> None:
        """End it; a letter still in hand goes back to where it lay."""
        await close(self._channel)

    async def read(
        self, wanted: Filter, decide: Decide, progress: Progress, *, copies: bool = True
    ) -> None:
        """Look at as many as are there now; those that nobody means stay.

        Cut short, it lets the one in hand go where it was to go before it ends.

        Args:
            wanted: Which are meant.
            decide: Says of each that is meant where it goes.
            progress: Shows how far it is.
            copies: Whether any may stay or be moved.

        Raises:
            BrokerError: RabbitMQ cannot be asked, or takes no copy, or somebody else looks.
        """
        if copies:
            # Where RabbitMQ, short of memory, takes no copies, no letter is touched.
            await self._publisher.probe(self.queues.dead)
        work = asyncio.create_task(self._read(wanted, decide, progress))
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            self._stopping = True
            await work
            raise

    async def count(self) -> int | None:
        """Return how many letters lie there; none is gone afterwards.

        Raises:
            BrokerError: The queue does not answer.
        """

        async def count() -> int:
            return (await self._counts())[0]

        return await counted(count, partial(self._is_empty, copies=False), self.queues.dead)

    async def _is_empty(self, *, copies: bool = True) -> bool:
        """Whether the queue itself says so; RabbitMQ also counts nothing where it does not answer.

        A letter that comes right then stays.

        Args:
            copies: Whether it fails where RabbitMQ takes no copy of that letter. Otherwise it
                gives the letter back then: who only counts may publish nothing.
        """
        delivery = await self._in_time(self._queue.get(fail=False, timeout=self._timeout))
        if delivery is None:
            return True
        try:
            await self._settle(delivery, self.queues.dead)
        except BrokerError as error:
            if copies or not forbids(error):
                raise
            await self._in_time(delivery.nack())
        return False

    async def _read(self, wanted: Filter, decide: Decide, progress: Progress) -> None:
        if not await self._become_only_consumer():
            return
        with progress(self._total) as show:
            while self._consumer and (delivery := await self._unseen()) is not None:
                self.seen += 1
                await self._handle(delivery, wanted, decide)
                show(self.seen)
        self.came = max(0, await self._end() - (self.seen - self.gone))

    async def _become_only_consumer(self) -> bool:
        """Become the only consumer of the queue; return whether there is anything to look at.

        A quorum queue knows no exclusive consumer. So each counts the consumers once it is one
        itself, and steps back where it is not the only one.
        """
        until = self._until()
        while not self._stopping:
            self._total, consumers = await self._counts()
            if not consumers and not self._total and await self._is_empty():
                return False
            if not consumers and self._total:
                self._consumer = await self._in_time(self._queue.consume(self._deliveries.put))
                if (await self._counts())[1] == 1:
                    self._look = uuid.uuid4().hex
                    return True
                await self._step_back()
            if _now() >= until:
                raise self._none_came(consumers)
            await asyncio.sleep(RETRY_SECONDS * random.random())
        return False

    async def _step_back(self) -> None:
        """Put the letter back that arrived; the other look waits for it.

        It may be a copy of the other's, so it goes on carrying that look.
        """
        if (delivery := await self._next(wait_for_others=False)) is not None:
            await self._settle(delivery, self.queues.dead, last=True)
        else:
            await self._end()

    async def _unseen(self) -> AbstractIncomingMessage | None:
        """Return the next letter that was not seen, None when there are no more.

        Raises:
            BrokerError: Those that were not seen do not come.
        """
        until, again = self._until(), 0
        while (delivery := await self._next()) is not None:
            if delivery.headers.get(LOOK) != self._look:
                return delivery
            ready, consumers = await self._counts()
            alone = consumers == 1
            again = again + 1 if alone else 0
            # This is a copy of ours. If fewer than we kept lie behind it, they are ours as well.
            none_left = alone and ready < self.seen - self.gone
            round_again = again > ready + 1
            if alone:
                until = self._until()
            else:
                await asyncio.sleep(QUIET_SECONDS)  # the other puts its letter back meanwhile
            last = none_left or round_again or _now() >= until or self._stopping
            await self._settle(delivery, self.queues.dead, last=last)
            if none_left or self._stopping:
                return None
            if round_again:
                raise BrokerError(
                    f"RabbitMQ delivers the same dead letters in {self.queues.dead} again, and"
                    f" {self._total - self.seen} of {self._total} not at all: they have expired,"
                    " or the queue has priorities"
                )
            if last:
                raise self._none_came(consumers - 1)
        return None

    async def _handle(
        self, delivery: AbstractIncomingMessage, wanted: Filter, decide: Decide
    ) -> None:
        to: str | None = self.queues.dead
        try:
            if not self._stopping and wanted.matches(letter := Letter.of(delivery)):
                to = decide(letter, delivery)
        except BaseException:
            self._stopping = True
            raise
        finally:
            last = self._stopping or self.seen >= self._total
            await self._settle(delivery, to, last=last)

    async def _settle(
        self, delivery: AbstractIncomingMessage, to: str | None, *, last: bool = False
    ) -> None:
        """Let a letter go where it is to go; behind the last one nothing more is sent."""
        self._leaves = to != self.queues.dead
        if to is not None:
            await self._copy(delivery, to)
        self.unsure = True
        if last:
            await self._cancel()
        await self._in_time(delivery.ack())

    async def _copy(self, delivery: AbstractIncomingMessage, to: str) -> None:
        if self._leaves:
            await self._publisher.publish(to, copies.revived(delivery))
            return
        try:
            await self._publisher.publish(to, copies.kept(delivery, self._users, self._look))
        except NotTakenError as error:
            # No probe can tell before: it would push a letter out where a limit has no
            # reject-publish.
            raise NotTakenError(
                f"RabbitMQ did not take the copy of a dead letter for queue {to}: it is over its"
                " limit, or most of its nodes are down; raise the limit, or free the queue by"
                f" `{command('dead requeue')}` or `{command('dead drop --yes')}`"
                " without a filter: until then each look counts as a delivery of the first"
                " letter, and a policy delivery-limit ends it"
            ) from error

    async def _next(self, *, wait_for_others: bool = True) -> AbstractIncomingMessage | None:
        """Return the next letter, None when there are no more.

        Args:
            wait_for_others: Whether to wait for letters that another look has in hand.

        Raises:
            BrokerError: None comes, though there are some.
        """
        until = self._until()
        empty = False
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(QUIET_SECONDS):
                    delivery = await self._deliveries.get()
                    self._answered()
                    return delivery
            if empty or self._stopping:
                return None
            ready, consumers = await self._counts()
            if empty := not ready and not (wait_for_others and consumers > 1):
                # The answer can overtake a letter on its way here; the next cannot.
                await self._counts()
            elif _now() >= until:
                raise self._none_came(consumers - 1)

    async def _counts(self) -> tuple[int, int]:
        """Return how many letters and consumers there are; none that has arrived is counted.

        Raises:
            BrokerError: RabbitMQ cannot be asked; or it counts no consumer while this is one: the
                queue did not answer it.
        """
        sender = await self._in_time(self._channel.get_underlay_channel())
        found = await self._in_time(sender.queue_declare(self.queues.dead, passive=True))
        if self._consumer and not found.consumer_count:
            raise uncounted(self.queues.dead)
        self._answered()
        return found.message_count or 0, found.consumer_count or 0

    def _answered(self) -> None:
        """Note that what was acknowledged before is gone for good."""
        self.gone += self.perhaps_gone
        self.unsure = False

    async def _cancel(self) -> None:
        if self._consumer:
            tag, self._consumer = self._consumer, ""
            await self._in_time(self._queue.cancel(tag))

    async def _end(self) -> int:
        """Consume no more, and put back what came right then; return how many letters lie there."""
        await self._cancel()
        lie, _consumers = await self._counts()
        while not self._deliveries.empty():  # came right then
            await self._settle(self._deliveries.get_nowait(), self.queues.dead)
            lie += 1
        return lie

    def _none_came(self, others: int) -> BrokerError:
        """Return the error for a look that has waited too long for the next letter."""
        if not others:
            return explain(TimeoutError(), self.queues.dead)
        return BrokerError(
            f"somebody else looks at the dead letters in {self.queues.dead}, or another program"
            " consumes them: try again when that has ended"
        )

    def _until(self) -> float:
        """Return the time by which the next letter is to come, by the event loop's clock."""
        return _now() + self._timeout

    async def _in_time(self, step: Awaitable[_Result]) -> _Result:
        async with in_time(self.queues.dead, self._timeout):
            return await step


def _now() -> float:
    return asyncio.get_running_loop().time()


async def count_letters(letters: DeadLetters) -> int | None:
    """Open them, and return how many dead letters there are, None when there is no such queue.

    Raises:
        BrokerError: RabbitMQ cannot be asked, or the queue does not answer.
    """
    try:
        await letters.open()
    except QueueMissingError:
        return None
    try:
        return await letters.count()
    finally:
        await letters.close()
