"""Dead letters: what was set aside for a person, seen, brought back, taken away.

RabbitMQ sends all that are there; what is not settled goes back into the queue when its
channel closes. Until then nobody else sees it: so nothing waits for a person meanwhile.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, TypeVar

from aioworker import broker, console, meant, outcome, topology
from aioworker.console import count, say
from aioworker.errors import AioworkerError, QueueMissingError, UnknownTaskError
from aioworker.letters import Filter, Letter, text

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractIncomingMessage

    from aioworker.settings import Settings

_Result = TypeVar("_Result")
# Unsettled letters that one channel may hold. A quorum queue sends 2,000 at most to one that
# does not say; few at first, as each may be of megabytes and `requeue` cannot take them faster
# than it publishes.
FIRST_HOLDS, MOST_HOLDS = 50, 1000
SURE_EVERY = 100  # acknowledgements, which have no answer of their own
QUIET_SECONDS = 0.05  # without a letter, and the queue is asked whether there are more
RETURN_LOOKS = 40  # for letters that are on their way back


class _Box:
    """The dead letters of a task, as far as nobody else looks at them.

    Args:
        connection: Where they are read.
        name: The task's.
        prefix: What its queues' names begin with.
        timeout: Seconds for each step.

    Attributes:
        ready: How many waited at the last look, none of those that have arrived.
        shared: Whether somebody else was seen to look at them.
        read: How many have arrived and been looked at.
        settled: How many were taken out for good, RabbitMQ having answered since.
        unsure: How many more were acknowledged.
    """

    def __init__(
        self, connection: AbstractConnection, name: str, prefix: str, timeout: float
    ) -> None:
        self.name = name
        self.queues = topology.Queues.of(name, prefix)
        self.ready = self.read = self.settled = self.unsure = 0
        self.shared = False
        self._connection = connection
        self._timeout = timeout
        self._arrived: asyncio.Queue[AbstractIncomingMessage] = asyncio.Queue()
        self._channels: list[AbstractChannel] = []
        self._holds = FIRST_HOLDS
        self._first = 0  # how many waited at the beginning
        self._consumers = 0  # of ours
        self._held = 0  # by the last channel, of those that were looked at

    async def open(self) -> None:
        """Look how many there are, and have RabbitMQ send them."""
        await self._open_channel()
        self._first = self.ready

    async def letters(
        self, wanted: Filter, at_most: int | None = None
    ) -> AsyncIterator[tuple[Letter, AbstractIncomingMessage]]:
        """Yield those that are meant, as they lie, until there are no more.

        Args:
            wanted: Which are meant.
            at_most: Look at so many; None for all.
        """
        while at_most is None or self.read < at_most:
            delivery = await self._next()
            if delivery is None:
                return
            self.read += 1
            self._held += 1
            letter = Letter.of(delivery)
            if wanted.matches(letter):
                yield letter, delivery
            if self._held == self._holds:
                await self._open_channel()

    async def settle(self, delivery: AbstractIncomingMessage) -> None:
        """Take one out for good."""
        self.unsure += 1
        self._held -= 1
        await self._bounded(delivery.ack())
        if self.unsure >= SURE_EVERY:
            await self.look()

    async def look(self) -> None:
        """Ask for what is there now; the answer says that what was sent before has arrived."""
        queue = self._channels[-1].declare_queue(self.queues.dead, passive=True)
        found = (await self._bounded(queue)).declaration_result
        self.ready = (found.message_count or 0) + self._arrived.qsize()
        self.shared |= (found.consumer_count or 0) > self._consumers
        self.settled += self.unsure
        self.unsure = 0

    async def end(self) -> None:
        """Be sure of all that was settled, and say what somebody else may hold."""
        await self.look()
        if self.shared:
            console.tell(
                f"another command looks at the dead letters of {self.name} too: what it holds"
                " is not seen here"
            )

    async def give_back(self) -> None:
        """Put all back now, and see it lie there, as far as nobody else takes it."""
        for channel in self._channels:
            await self._bounded(channel.close())
        for _ in range(RETURN_LOOKS):
            if (await topology.count(self._connection, self.queues.dead, self._timeout) or 0) >= (
                self.read
            ):
                return
            await asyncio.sleep(QUIET_SECONDS)

    async def _next(self) -> AbstractIncomingMessage | None:
        """Return the next letter, None when there are no more."""
        if not self._arrived.empty():
            return self._arrived.get_nowait()
        empty = False
        try:
            async with asyncio.timeout(self._timeout):
                while True:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(QUIET_SECONDS):
                            return await self._arrived.get()
                    if empty:
                        self.shared |= self.read < self._first
                        return None
                    await self.look()
                    if empty := not self.ready:
                        # The answer can overtake letters on their way here; the next cannot.
                        await self.look()
        except TimeoutError as error:
            raise broker.explain(error, self.queues.dead) from error

    async def _open_channel(self) -> None:
        """Have RabbitMQ send more; a channel that is full gets nothing any more."""
        if self._channels:
            await self.look()
            self._holds = min(2 * self._holds, MOST_HOLDS)
        self._channels.append(channel := await self._bounded(self._connection.channel()))
        await self.look()
        await self._bounded(channel.set_qos(self._holds))
        queue = await channel.get_queue(self.queues.dead, ensure=False)
        await self._bounded(queue.consume(self._arrived.put))
        self._consumers += 1
        self._held = 0

    async def _bounded(self, step: Awaitable[_Result]) -> _Result:
        try:
            async with asyncio.timeout(self._timeout):
                return await step
        except broker.FAILURES as error:
            raise broker.explain(error, self.queues.dead) from error


async def show_list(
    settings: Settings, name: str, wanted: Filter, *, as_json: bool, of_several: bool = False
) -> None:
    """Print the dead letters of a task, one a line.

    Args:
        settings: The settings.
        name: The task's name.
        wanted: Which are meant.
        as_json: Print JSON.
        of_several: Begin each line with the task, since those of others are listed too.

    Raises:
        BrokerError: RabbitMQ cannot be asked; a note says how many were listed before.
    """
    listed = 0
    async with _open(settings, name) as box:
        with _noting(lambda: f"listed {count(listed, 'dead letter')} before that"):
            async for letter, _delivery in box.letters(wanted):
                line = f"{name}: {letter.line}" if of_several else letter.line
                say(json.dumps({"task": name, **asdict(letter)}) if as_json else line)
                listed += 1
            await box.end()
    if not as_json:
        console.tell(f"{count(listed, 'dead letter')} of {name}")


async def show_one(settings: Settings, name: str, message_id: str, *, as_json: bool) -> None:
    """Print all that is known of the letters with an id: headers and body.

    Raises:
        AioworkerError: There is none.
        BrokerError: RabbitMQ cannot be asked.
    """
    found = False
    async with _open(settings, name) as box:
        async for letter, delivery in box.letters(Filter(ids=frozenset({message_id}))):
            found = True
            body = delivery.body.decode("utf-8", "backslashreplace")
            if as_json:
                headers = {name: text(value) for name, value in delivery.headers.items()}
                say(json.dumps({"task": name, **asdict(letter), "headers": headers, "body": body}))
                continue
            say(letter.line)
            for header, value in sorted(delivery.headers.items()):
                say(f"{header}: {text(value)}")
            say("")
            say(body)
        await box.end()
    if not found:
        raise AioworkerError(f"no dead letter of {name} has the id {message_id!r}")


async def requeue(settings: Settings, name: str, wanted: Filter) -> None:
    """Publish letters to their lanes again, each confirmed before it leaves the dead letters.

    Their attempts are counted anew. No more are looked at than there were at the beginning:
    a worker may set them aside again as fast as they come.

    Raises:
        BrokerError: One is not confirmed: it stays, with those behind it; a note says how many
            went before.
    """
    done = 0
    own = "aioworker dead requeue"

    def note() -> str:
        also = f", of which the last {box.unsure} may lie here as well" if box.unsure else ""
        return f"requeued {count(done, 'dead letter')} before that{also}"

    async with (
        _open(settings, name) as box,
        broker.Publisher(settings.nodes(), settings.connect_timeout, own) as publisher,
    ):
        with _noting(note):
            async for letter, delivery in box.letters(wanted, at_most=box.ready):
                lane = box.queues.urgent if letter.lane == "urgent" else box.queues.bulk
                await publisher.publish(lane, outcome.revived(delivery))
                done += 1
                await box.settle(delivery)
            await box.end()
    say(f"requeued {count(done, 'dead letter')} of {name}")
    if box.ready:
        console.tell(f"{count(box.ready, 'dead letter')} came meanwhile, and stayed")


async def look(settings: Settings, name: str, wanted: Filter) -> Counter[Letter]:
    """Tell a person which letters are meant; all lie there again when this returns.

    Raises:
        BrokerError: RabbitMQ cannot be asked.
    """
    async with _open(settings, name) as box:
        shown = Counter([letter async for letter, _delivery in box.letters(wanted)])
        await box.end()
        await box.give_back()
    for letter in shown.elements():
        console.tell(letter.line)
    return shown


async def drop(
    settings: Settings, name: str, wanted: Filter, shown: Counter[Letter] | None = None
) -> None:
    """Take letters away for good.

    Args:
        settings: The settings.
        name: The task's name.
        wanted: Which are meant.
        shown: What somebody was shown of them: nothing else goes. None for all.

    Raises:
        BrokerError: RabbitMQ did not answer; a note says how many went before.
    """

    def note() -> str:
        perhaps = f", and perhaps {box.unsure} more" if box.unsure else ""
        return f"dropped {count(box.settled, 'dead letter')} before that{perhaps}"

    left = None if shown is None else Counter(shown)
    async with _open(settings, name) as box:
        with _noting(note):
            async for letter, delivery in box.letters(wanted):
                if left is not None:
                    if not left:
                        break
                    if letter not in left:
                        continue
                    left -= Counter((letter,))
                await box.settle(delivery)
            await box.end()
    say(f"dropped {count(box.settled, 'dead letter')} of {name}")
    if left is not None and (gone := left.total()):
        console.tell(f"{count(gone, 'dead letter')} of those shown did not lie there any more")


@contextmanager
def _noting(note: Callable[[], str]) -> Iterator[None]:
    """Add to an error, and to an end by a signal, how far the work was."""
    try:
        yield
    except (AioworkerError, asyncio.CancelledError) as error:
        error.add_note(note())
        raise


@asynccontextmanager
async def _open(settings: Settings, name: str) -> AsyncIterator[_Box]:
    """Look at the dead letters of a task, registered or not.

    Raises:
        UnknownTaskError: Neither the task nor its queue is known; the text has the nearest name.
        BrokerError: RabbitMQ cannot be asked.
    """
    timeout = settings.connect_timeout
    async with broker.connection(
        settings.nodes(), timeout, "aioworker dead", careful=True
    ) as connection:
        box = _Box(connection, name, settings.queue_prefix, timeout)
        try:
            await box.open()
        except QueueMissingError as error:
            if unknown := await meant.is_unknown(settings, name):
                raise UnknownTaskError(
                    f"queue {box.queues.dead} does not exist: {unknown}"
                ) from error
            raise
        yield box
