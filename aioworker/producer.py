"""Publishing: a sweep of all chunks of a task, or a single change, each confirmed."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import aio_pika

from aioworker import broker, message, topology
from aioworker.topology import Queues

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from aioworker.addresses import BrokerAddress

# Publishes under way at once: enough to hide the round trip, few enough for a small memory.
WINDOW = 64


class Producer:
    """Publishes chunks of ids to one task's lanes over one connection.

    Use as `async with Producer(…) as producer`.

    Args:
        addresses: The nodes of the RabbitMQ cluster.
        timeout: Seconds to connect, and seconds to wait for each confirm.
    """

    def __init__(self, addresses: Sequence[BrokerAddress], timeout: float) -> None:
        self._timeout = timeout
        self._publisher = broker.Publisher(addresses, timeout, "aioworker publish")

    async def __aenter__(self) -> Producer:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._publisher.close()

    async def publish(self, task: str, ids: list[int], *, urgent: bool = False) -> str:
        """Publish one chunk and return the message's id once RabbitMQ has confirmed it.

        Args:
            task: The task's name.
            ids: 1 to 1000 ids.
            urgent: Whether to use the urgent lane.

        Raises:
            UsageError: The ids are not a chunk.
            BrokerError: RabbitMQ did not confirm it.
        """
        return await self._send(task, message.check_chunk(ids), urgent=urgent)

    async def publish_swept(self, task: str, ids: list[int]) -> str:
        """Publish a chunk of a sweep to the bulk lane; otherwise as `publish`.

        The ids are not looked at: they come from a table, a thousand at a time, and the
        consumer refuses what is none.
        """
        return await self._send(task, ids, urgent=False)

    async def _send(self, task: str, ids: list[int], *, urgent: bool) -> str:
        outgoing = outgoing_message(task, ids)
        queues = Queues.of(task)
        await self._publisher.publish(queues.urgent if urgent else queues.bulk, outgoing)
        return outgoing.message_id or ""

    async def backlog(self, task: str) -> int:
        """Return how many chunks wait in a task's bulk lane.

        Raises:
            QueueMissingError: The lane is not declared.
            BrokerError: RabbitMQ refuses, or the connection is lost.
        """
        bulk = Queues.of(task).bulk
        waiting = await topology.count(await self._publisher.connection(), bulk, self._timeout)
        if waiting is None:
            raise broker.missing(bulk)
        return waiting


def outgoing_message(task: str, ids: list[int]) -> aio_pika.Message:
    """Return the message that runs *task* for a chunk, as aio-pika publishes it."""
    encoded = message.encode(task, ids)
    return aio_pika.Message(
        encoded.body,
        headers=encoded.headers,
        content_type=message.CONTENT_TYPE,
        content_encoding=message.CONTENT_ENCODING,
        correlation_id=encoded.message_id,
        message_id=encoded.message_id,
    )


@dataclass(slots=True)
class Sweep:
    """How far a sweep is.

    Args:
        chunks: Chunks confirmed.
        ids: Ids in them.
        last_id: All ids up to this one are confirmed; None before the first chunk is.
    """

    chunks: int = 0
    ids: int = 0
    last_id: int | None = None

    def add(self, chunk: Sequence[int]) -> None:
        """Count a chunk whose predecessors are all counted."""
        self.chunks += 1
        self.ids += len(chunk)
        self.last_id = chunk[-1]


async def chunked(pages: AsyncIterator[list[int]], size: int) -> AsyncIterator[list[int]]:
    """Cut pages of ids into chunks of *size*, the last one shorter."""
    rest: list[int] = []
    async for page in pages:
        rest += page
        whole = len(rest) - len(rest) % size
        for start in range(0, whole, size):
            yield rest[start : start + size]
        rest = rest[whole:]
    if rest:
        yield rest


async def publish_sweep(
    producer: Producer,
    task: str,
    chunks: AsyncIterator[list[int]],
    sweep: Sweep,
    confirmed: Callable[[], None],
) -> None:
    """Publish chunks to the bulk lane, several under way at once, counted in their order.

    Args:
        producer: Its connection is used.
        task: The task's name.
        chunks: Ids ascending, from one chunk to the next too.
        sweep: Counts what is confirmed, also when this is cut short.
        confirmed: Called after each chunk that was counted.

    Raises:
        BrokerError: A chunk is not confirmed; those before it are counted in *sweep*.
    """
    under_way: deque[tuple[list[int], asyncio.Task[str]]] = deque()

    async def count_oldest() -> None:
        chunk, publishing = under_way[0]
        await publishing
        under_way.popleft()
        sweep.add(chunk)
        confirmed()

    try:
        async for chunk in chunks:
            under_way.append((chunk, asyncio.create_task(producer.publish_swept(task, chunk))))
            if len(under_way) >= WINDOW:
                await count_oldest()
        while under_way:
            await count_oldest()
    finally:
        for _chunk, publishing in under_way:
            publishing.cancel()
        await asyncio.gather(*(item[1] for item in under_way), return_exceptions=True)
