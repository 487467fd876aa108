"""A sweep: all that a task's `keys` yield, published once, in chunks and in order.

Its ids are read by pages, checked as the worker will check them, and cut into chunks; each chunk is
published and confirmed. No more is held than a page and the chunks that are under way.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aioworker.errors import TaskError, UsageError
from aioworker.tasks import keys
from aioworker.tasks.arguments import as_json
from aioworker.tasks.chunk import CHUNK_LIMIT, id_of
from aioworker.tasks.context import Context
from aioworker.words import count

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from aioworker.mysql.database import Database
    from aioworker.producer import Producer
    from aioworker.tasks.task import AnyTask

# Publishes under way at once: enough to hide the round trip, few enough for a small memory.
WINDOW = 64


@dataclass(slots=True)
class Sweep:
    """How far a sweep is; its text says so.

    Args:
        chunks: Chunks confirmed.
        ids: Ids, or rows, in them.
        last_id: All ids up to this one are confirmed; None before the first chunk is.
        id: What its messages carry, to be told from those of another sweep.
    """

    chunks: int = 0
    ids: int = 0
    last_id: int | None = None
    id: str = field(default_factory=lambda: str(uuid.uuid4()))

    def __str__(self) -> str:
        last = "" if self.last_id is None else f", last confirmed id {self.last_id}"
        return f"{count(self.chunks, 'chunk')}, {count(self.ids, 'id')}{last}"

    def add(self, chunk: Sequence[Any]) -> None:
        """Count a chunk whose predecessors are all counted."""
        self.chunks += 1
        self.ids += len(chunk)
        self.last_id = id_of(chunk[-1])


def read_chunks(
    database: Database,
    task: AnyTask,
    size: int,
    *,
    after: int,
    only_needed: bool,
) -> AsyncIterator[list[Any]]:
    """Read what a task sweeps, cut into chunks that it can take.

    Args:
        database: Where the ids are read.
        task: The task.
        size: Ids in a chunk.
        after: Begin behind this id.
        only_needed: Leave out what needs no writing, by the task's `needed`.

    Raises:
        UsageError: The task has no `keys`.
        TaskError: They yield what the task cannot take, or fail.
        DatabaseError: The database refuses, or does not answer.
    """
    pages = _pages(database, task, after)
    if not only_needed:
        return _checked(task, chunked(pages, size))
    checked = _checked(task, chunked(pages, CHUNK_LIMIT))
    return chunked(_needed(database, task, checked), size)


async def count_ids(database: Database, task: AnyTask, after: int) -> int | None:
    """Return how many ids there are to publish, None where only reading them all would tell."""
    if task.size is None:
        return None
    with database.explaining():
        return await task.size(Context(database, task.name), after)


async def chunked(pages: AsyncIterator[list[Any]], size: int) -> AsyncIterator[list[Any]]:
    """Cut pages of ids or rows into chunks of *size*, the last one shorter."""
    rest: list[Any] = []
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
    task: AnyTask,
    chunks: AsyncIterator[list[Any]],
    sweep: Sweep,
    confirmed: Callable[[Sweep], None],
) -> None:
    """Publish chunks to the bulk lane, several under way at once, counted in their order.

    Args:
        producer: Its connection is used.
        task: The task.
        chunks: Ids ascending, from one chunk to the next too.
        sweep: Counts what is confirmed, also when this is cut short.
        confirmed: Called after each chunk that was counted.

    Raises:
        BrokerError: A chunk is not confirmed; those before it are counted in *sweep*.
    """
    under_way: deque[tuple[list[Any], asyncio.Task[str]]] = deque()

    async def count_oldest() -> None:
        chunk, publishing = under_way[0]
        await publishing
        under_way.popleft()
        sweep.add(chunk)
        confirmed(sweep)

    try:
        async for chunk in chunks:
            sending = producer.publish_swept(task, chunk, sweep.id)
            under_way.append((chunk, asyncio.create_task(sending)))
            if len(under_way) >= WINDOW:
                await count_oldest()
        while under_way:
            await count_oldest()
    finally:
        for _chunk, publishing in under_way:
            publishing.cancel()
        await asyncio.gather(*(item[1] for item in under_way), return_exceptions=True)


async def _pages(database: Database, task: AnyTask, after: int) -> AsyncIterator[list[Any]]:
    with database.explaining():
        async for page in keys.pages(task, Context(database, task.name), after):
            yield page


async def _checked(task: AnyTask, chunks: AsyncIterator[list[Any]]) -> AsyncIterator[list[Any]]:
    """Pass on what the task can take, as its worker will check it.

    Raises:
        TaskError: Its keys yielded something else.
    """
    async for chunk in chunks:
        try:
            args = as_json([chunk, *task.options.constants])
            [kept, *_constants], _named = task.checked(args, {})
        except UsageError as error:
            raise TaskError(f"task {task.name!r}: its keys: {error}") from None
        yield kept


async def _needed(
    database: Database, task: AnyTask, chunks: AsyncIterator[list[Any]]
) -> AsyncIterator[list[Any]]:
    """Leave out what needs no writing."""
    ctx = Context(database, task.name)
    with database.explaining():
        async for chunk in chunks:
            with keys.naming(task, "needed"):
                found = await task.read_needed(ctx, chunk)
            yield found
