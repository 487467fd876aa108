"""Looks that compete for the same dead letters, or to which some do not come."""

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

Held = Callable[[], Awaitable[None]]
Before = Callable[[int], Awaitable[object]]
LETTERS = [f"m{number}" for number in range(5)]
SECONDS = 20


class Watched(Publisher):
    """A publisher before whose copies something happens, by how many there were before."""

    def __init__(self, publisher: Publisher, before: Before) -> None:
        self._publisher = publisher
        self._before = before
        self._copies = 0

    async def probe(self, queue: str) -> None:
        """See that copies are taken."""
        await self._publisher.probe(queue)

    async def publish(self, queue: str, outgoing: aio_pika.Message) -> None:
        """Publish a copy."""
        await self._before(self._copies)
        await self._publisher.publish(queue, outgoing)
        self._copies += 1


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


class Deaf:
    """A queue whose letters do not come."""

    def __init__(self, queue: AbstractQueue) -> None:
        self._queue = queue

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)

    async def consume(self, _put: object) -> str:
        """Become a consumer that hears of nothing."""

        async def ignore(_delivery: object) -> None:
            pass

        return await self._queue.consume(ignore)


async def hold(letters: Lanes, queue: str) -> Held:
    """Hold one letter, as another program does that consumes them; return how to let it go."""
    arrived: asyncio.Queue[AbstractIncomingMessage] = asyncio.Queue()
    channel = await letters.connection.channel()
    await channel.set_qos(1)
    consumed = await channel.get_queue(queue, ensure=False)
    tag = await consumed.consume(arrived.put)
    message = await arrived.get()

    async def put_back() -> None:
        await letters.send(message.body, queue, headers=message.headers)
        await consumed.cancel(tag)
        await message.ack()

    return put_back


def holding_first(letters: Lanes, queue: str) -> Before:
    """Hold a letter from the first copy on."""

    async def before(copies: int) -> None:
        if not copies:
            await hold(letters, queue)

    return before


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

        async def of_first(copies: int) -> None:
            begun.set()
            if copies == behind:
                goes_back.set()
            await took.wait()

        counts, asked = first._counts, 0

        async def of_last() -> tuple[int, int]:
            """Leave the last one where it is until that look has asked for it three times."""
            nonlocal asked
            asked += first.seen == len(LETTERS) - 1
            if moved and asked == 3:
                goes_back.set()
            return await counts()

        first._counts = of_last  # type: ignore[method-assign]
        first._publisher = Watched(first._publisher, of_first)
        second._publisher = Watched(second._publisher, lambda _copies: goes_back.wait())
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
        look._publisher = Watched(look._publisher, holding_first(letters, queues.dead))

        with pytest.raises(BrokerError, match="or another program consumes them"):
            await shown(look, queues.dead)

        assert look.seen == len(LETTERS) - 1
        assert await letters.holds(queues.dead, len(LETTERS) - 1)


async def test_letters_that_do_not_come_are_no_letters_that_come_again(
    pair: Servers, queues: Queues, letters: Lanes
) -> None:
    async with looks(pair, queues, 1, 0.5) as (look,):
        look._queue = cast(AbstractQueue, Deaf(look._queue))

        with pytest.raises(BrokerError, match="did not answer in time about queue"):
            await shown(look, queues.dead)

    assert await letters.holds(queues.dead, len(LETTERS))


async def test_a_look_that_waits_for_another_one_ends_at_once_when_it_is_told_to(
    pair: Servers, queues: Queues, letters: Lanes
) -> None:
    """It waited as long as the connect timeout, and ended with an error about somebody else."""
    async with looks(pair, queues, 1, 10 * SECONDS) as (look,):
        look._publisher = Watched(look._publisher, holding_first(letters, queues.dead))
        moving = asyncio.create_task(shown(look, queues.bulk))
        assert await letters.holds(queues.bulk, len(LETTERS) - 1)

        moving.cancel()

        with pytest.raises(asyncio.CancelledError):
            async with asyncio.timeout(SECONDS):
                await moving
        assert look.gone == len(LETTERS) - 1


async def test_a_letter_is_found_behind_however_many_copies(
    pair: Servers, queues: Queues, letters: Lanes
) -> None:
    """To go through them took longer than the wait for another look's letter may."""
    more = [f"n{number}" for number in range(200)]
    for name in more:
        await letters.send(b"[[], {}, null]", queues.dead, headers={"id": name, "task": "t"})
    async with looks(pair, queues, 1, 0.3) as (look,):
        held: list[Held] = []

        async def of_another(copies: int) -> None:
            if not copies:
                held.append(await hold(letters, queues.dead))
            elif copies == len(LETTERS + more) - 2:
                await held[0]()

        look._publisher = Watched(look._publisher, of_another)

        assert sorted(await shown(look, queues.dead)) == sorted(LETTERS + more)


async def test_a_queue_that_delivers_copies_first_ends_the_look(
    pair: Servers, lanes: Lanes
) -> None:
    """Somebody declared it with priorities: the same letter came again and again."""
    queues = Queues.of("looks-priorities", PREFIX)
    arguments: dict[str, Any] = {"x-max-priority": 5, "x-queue-type": "classic"}
    dead = await lanes.channel.declare_queue(queues.dead, durable=True, arguments=arguments)
    for number, name in enumerate(LETTERS):
        headers = {"id": name, "task": "t"}
        await lanes.send(b"[[], {}, null]", queues.dead, headers=headers, priority=number)
    async with looks(pair, queues, 1, SECONDS) as (look,):
        with pytest.raises(BrokerError, match="again, and 4 of 5 not at all"):
            await shown(look, queues.dead)
    assert await lanes.holds(queues.dead, len(LETTERS))
    await dead.delete(if_empty=False)
