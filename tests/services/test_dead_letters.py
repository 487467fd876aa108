"""Looks at the dead letters that begin at the same moment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

import aio_pika
import pytest
from aio_pika.abc import AbstractIncomingMessage, AbstractQueue

from aioworker.addresses import BrokerAddress, Nodes
from aioworker.errors import BrokerError
from aioworker.rabbitmq.connection import connected
from aioworker.rabbitmq.dead_letters import DeadLetters, no_progress
from aioworker.rabbitmq.letter import Filter
from aioworker.rabbitmq.publisher import Publisher
from aioworker.rabbitmq.queues import Queues
from tests.conftest import PREFIX, declare

if TYPE_CHECKING:
    from support.servers import Servers
    from tests.conftest import Lanes

LETTERS = [f"m{number}" for number in range(5)]
SECONDS = 20


class Gated(Publisher):
    """A publisher whose copies wait until they may go."""

    def __init__(self, publisher: Publisher, gate: Callable[[int], asyncio.Event]) -> None:
        self._publisher = publisher
        self._gate = gate
        self.copies = 0

    async def probe(self, queue: str) -> None:
        """See that copies are taken."""
        await self._publisher.probe(queue)

    async def publish(self, queue: str, outgoing: aio_pika.Message) -> None:
        """Publish a copy once its gate is open."""
        await self._gate(self.copies).wait()
        await self._publisher.publish(queue, outgoing)
        self.copies += 1


class Late:
    """A queue that is consumed later than somebody meant to."""

    def __init__(
        self, queue: AbstractQueue, meant: asyncio.Event, begun: asyncio.Event, took: asyncio.Event
    ) -> None:
        self._queue = queue
        self._meant = meant
        self._begun = begun
        self._took = took

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)

    async def consume(self, put: Callable[[AbstractIncomingMessage], Awaitable[None]]) -> str:
        """Become a consumer once the other look has begun, and say when a letter came."""

        async def arrive(delivery: AbstractIncomingMessage) -> None:
            await put(delivery)
            self._took.set()

        self._meant.set()
        await self._begun.wait()
        return await self._queue.consume(arrive)


@asynccontextmanager
async def looks(
    pair: Servers, queues: Queues, number: int, timeout: float
) -> AsyncIterator[list[DeadLetters]]:
    """Open looks, each over connections of its own."""
    nodes = Nodes(BrokerAddress.parse_all(pair.amqp_url))
    async with AsyncExitStack() as stack:
        opened = []
        for _ in range(number):
            connection = await stack.enter_async_context(connected(nodes, 10, "test"))
            publisher = await stack.enter_async_context(Publisher(nodes, 10, "test"))
            look = DeadLetters(queues, {"guest"}, connection, publisher, timeout)
            await look.open()
            stack.push_async_callback(look.close)
            opened.append(look)
        yield opened


async def shown(look: DeadLetters, to: str) -> list[str]:
    """Look at all letters; return their ids as they were shown."""
    ids: list[str] = []

    def decide(letter: Any, _delivery: object) -> str:
        ids.append(letter.id)
        return to

    await look.read(Filter(), decide, no_progress)
    return ids


@pytest.fixture(params=["quorum", "classic"])
def queue_type(request: pytest.FixtureRequest) -> str:
    """The type of the queue in which they lie."""
    return str(request.param)


@pytest.fixture
def queues(queue_type: str) -> Queues:
    """Those of a task of this type."""
    return Queues.of(f"looks-{queue_type}", PREFIX)


@pytest.fixture
async def letters(lanes: Lanes, queues: Queues, queue_type: str) -> Lanes:
    """Five of them."""
    await declare(lanes.connection, queues, queue_type)
    for name in (queues.dead, queues.bulk):
        await (await lanes.channel.get_queue(name, ensure=False)).purge()
    for name in LETTERS:
        await lanes.send(b"[[], {}, null]", queues.dead, headers={"id": name, "task": "t"})
    return lanes


@pytest.mark.parametrize(
    ("moved", "behind"), [(False, 0), (False, 1), (False, 4), (False, 7), (True, 0), (True, 4)]
)
async def test_one_that_steps_back_hides_no_letter_and_shows_none_twice(
    pair: Servers, queues: Queues, letters: Lanes, moved: bool, behind: int
) -> None:
    """It counted no consumer, became one when the first had begun, and put its letter behind.

    The first one has put so many letters away before that; seven are its own copies too.
    """
    async with looks(pair, queues, 2, SECONDS) as (first, second):
        counted, begun, took, goes_back = (asyncio.Event() for _ in range(4))

        def of_first(copies: int) -> asyncio.Event:
            begun.set()
            if copies == behind:
                goes_back.set()
            return took

        counts, asked = first._counts, 0

        async def of_last() -> tuple[int, int]:
            """Leave the last one where it is until that look has asked for it three times."""
            nonlocal asked
            asked += first.seen == len(LETTERS) - 1
            if moved and asked == 3:
                goes_back.set()
            return await counts()

        first._counts = of_last  # type: ignore[method-assign]
        first._publisher = Gated(first._publisher, of_first)
        second._publisher = Gated(second._publisher, lambda _copies: goes_back)
        second._queue = cast(AbstractQueue, Late(second._queue, counted, begun, took))
        later = asyncio.create_task(shown(second, queues.dead))
        await counted.wait()

        ids = await shown(first, queues.bulk if moved else queues.dead)

        assert sorted(ids) == LETTERS
        assert sorted(await later) == ([] if moved else LETTERS)
        assert await letters.count(queues.dead) == (0 if moved else len(LETTERS))


async def test_another_program_that_holds_a_letter_ends_the_look(
    pair: Servers, queues: Queues, letters: Lanes
) -> None:
    """The look read its own copies round and round, or said that these were all."""
    async with looks(pair, queues, 1, 0.5) as (look,):
        took = asyncio.Event()

        async def hold() -> None:
            async def arrive(_message: object) -> None:
                took.set()

            queue = await letters.channel.get_queue(queues.dead, ensure=False)
            await letters.channel.set_qos(1)
            await queue.consume(arrive)

        def gate(copies: int) -> asyncio.Event:
            if not copies:
                holding.append(asyncio.create_task(hold()))
            return took

        holding: list[asyncio.Task[None]] = []
        look._publisher = Gated(look._publisher, gate)

        with pytest.raises(BrokerError, match="or another program consumes them"):
            await shown(look, queues.dead)

        await holding[0]
        assert look.seen == len(LETTERS) - 1
        assert await letters.holds(queues.dead, len(LETTERS) - 1)
