"""What `publish` and `publish-all` do, once their options are read."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from aioworker import console, words
from aioworker.budget import tables
from aioworker.budget.tables import Row, peek
from aioworker.console import say, tell
from aioworker.errors import AioworkerError, BrokerError, DatabaseError, TaskError, UsageError
from aioworker.limits import NoLimit, in_force
from aioworker.producer import Producer, Sweep, chunked, publish_sweep
from aioworker.rabbitmq.errors import forbids
from aioworker.tasks import keys
from aioworker.tasks.chunk import CHUNK_LIMIT
from aioworker.tasks.context import Context
from aioworker.words import count

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aioworker.mysql.database import Database
    from aioworker.settings import Settings
    from aioworker.tasks.task import AnyTask

WATCH_SECONDS = 0.5
LONGEST_WATCH_SECONDS = 300.0


async def publish(settings: Settings, task: AnyTask, ids: list[int], *, urgent: bool) -> None:
    """Publish ids in chunks and print what was confirmed.

    Raises:
        UsageError: An id is out of range, or the task takes no ids; nothing was published.
        BrokerError: RabbitMQ did not confirm a chunk.
    """
    chunks = [ids[start : start + CHUNK_LIMIT] for start in range(0, len(ids), CHUNK_LIMIT)]
    for chunk in chunks:
        _check(task, chunk)
    async with _producer(settings) as producer:
        for done, chunk in enumerate(chunks):
            try:
                await producer.publish(task, chunk, *task.options.constants, urgent=urgent)
            except (AioworkerError, asyncio.CancelledError) as error:
                if done:
                    error.add_note(
                        f"confirmed the first {done * CHUNK_LIMIT} of {count(len(ids), 'id')}"
                    )
                raise
    lane = "urgent" if urgent else "bulk"
    what = f"{count(len(ids), 'id')} in {count(len(chunks), 'message')}"
    say(f"published {what} to the {lane} lane of {task.name}")


async def publish_all(
    settings: Settings,
    task: AnyTask,
    *,
    after: int,
    append: bool,
    dry_run: bool,
    only_needed: bool,
) -> int:
    """Publish a sweep with progress, unless an earlier one is still queued.

    Args:
        settings: The settings.
        task: What is swept.
        after: Begin behind this id.
        append: Publish all the same while an earlier sweep is queued.
        dry_run: Count the chunks, publish none.
        only_needed: Leave out what needs no writing.

    Returns:
        The exit status: 0, or 1 when an earlier sweep stands still or is paused.

    Raises:
        BrokerError: Not all is confirmed; a note says how far it is, and how to go on.
        DatabaseError: The ids cannot be read; the same note.
        TaskError: They are none that the task can take; the same note.
    """
    if only_needed and task.reader is None:
        raise UsageError(f"task {task.name!r} has no needed: it cannot tell what needs writing")
    database = settings.database()
    await database.ready()
    sweep = Sweep()
    try:
        pages = _pages(database, task, after)
        size = settings.chunk_size
        chunks = _checked(task, chunked(pages, CHUNK_LIMIT if only_needed else size))
        if only_needed:
            chunks = chunked(_needed(database, task, chunks), size)
        if dry_run:
            async for chunk in chunks:
                sweep.add(chunk)
            say(f"would publish {count(sweep.chunks, 'chunk')}, {count(sweep.ids, 'id')}")
            return 0
        async with _producer(settings) as producer:
            await _be_alone(database, task)
            waiting, _sure = await _backlog(producer, task, ask=not append)
            if waiting and not append:
                row = await _budget_row(settings, task, database)
                database.close()  # others need not wait for what is only watched
                return await _watch_earlier(settings, task, producer, waiting, row)
            counted = console.is_terminal() and not only_needed
            total = await _size(database, task, after) if counted else None
            try:
                with console.progress("publishing ids", total) as show:
                    await publish_sweep(
                        producer,
                        task,
                        chunks,
                        sweep,
                        lambda: show(sweep.ids, f"published {_extent(sweep)}"),
                    )
            except (AioworkerError, asyncio.CancelledError) as error:
                if sweep.chunks or not isinstance(error, DatabaseError | UsageError):
                    error.add_note(_how_to_go_on(settings, task, sweep, after))
                raise
    finally:
        database.close()
    say(f"published {_extent(sweep)}")
    return 0


def _check(task: AnyTask, ids: list[int]) -> None:
    """Refuse ids that the task cannot take.

    Raises:
        UsageError: It cannot.
    """
    if not (task.takes_chunks and task.signature.takes_ids):
        raise UsageError(f"task {task.name!r} takes no ids: publish to it from Python")
    task.checked([ids, *task.options.constants], {})


def _producer(settings: Settings) -> Producer:
    return Producer.over(settings.nodes(), settings.connect_timeout, settings.queue_prefix)


async def _pages(database: Database, task: AnyTask, after: int) -> AsyncIterator[list[Any]]:
    with database.explaining():
        async for page in keys.pages(task, Context(database, task.name), after):
            yield page


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


async def _checked(task: AnyTask, chunks: AsyncIterator[list[Any]]) -> AsyncIterator[list[Any]]:
    """Pass on what the task can take, as its worker will check it.

    Raises:
        TaskError: Its keys yielded something else.
    """
    async for chunk in chunks:
        try:
            [kept, *_constants], _named = task.checked([chunk, *task.options.constants], {})
        except UsageError as error:
            raise TaskError(f"task {task.name!r}: its keys: {error}") from None
        yield kept


async def _size(database: Database, task: AnyTask, after: int) -> int | None:
    """Return how many ids there are to publish, None where only reading them all would tell."""
    if task.size is None:
        return None
    with database.explaining():
        return await task.size(Context(database, task.name), after)


async def _be_alone(database: Database, task: AnyTask) -> None:
    """Hold a lock of the database while the connection stands: one sweep at a time.

    Raises:
        DatabaseError: Another one is being published.
    """
    with database.explaining():
        name = tables.lock_name(await database.schema(), task.name, "aioworker:sweep")
        [[got]] = await database.query("SELECT GET_LOCK(%s, 0)", (name,))
    if got != 1:
        raise DatabaseError(f"another sweep of {task.name} is being published; nothing was done")


async def _budget_row(settings: Settings, task: AnyTask, database: Database) -> Row | None:
    if settings.budget != "shared":
        return None
    with tables.explaining(database):
        return await peek(database, task.name)


async def _backlog(producer: Producer, task: AnyTask, *, ask: bool) -> tuple[int, bool]:
    """Return how many chunks wait, and whether that is sure.

    RabbitMQ also counts none in a lane that does not answer. Only a user who may read the lane
    can ask it, and one who publishes need not.

    Args:
        producer: Its connection is used.
        task: The task.
        ask: Whether to ask the lane itself where RabbitMQ counts none.
    """
    if ask:
        try:
            return await producer.backlog(task.name, sure=True), True
        except BrokerError as error:
            if not forbids(error):
                raise
    waiting = await producer.backlog(task.name)
    return waiting, waiting > 0


async def _watch_earlier(
    settings: Settings, task: AnyTask, producer: Producer, waiting: int, row: Row | None
) -> int:
    """Say that an earlier sweep is still queued, and whether it advances.

    The lane is watched for the time of one start. A start alone shows nothing: its run may
    fail, and its message come back.
    """
    force = in_force(task.rate_limit or NoLimit.NONE, settings.rate_limit, row)
    advances = perhaps = False
    if not force.paused:
        seconds = min(2.0 + (force.interval or 0.0) * 1.1, LONGEST_WATCH_SECONDS)
        tell(f"an earlier sweep is still queued: watching for {seconds:.0f} s whether it advances")
        deadline = time.monotonic() + seconds
        while not advances and time.monotonic() < deadline:
            await asyncio.sleep(WATCH_SECONDS)
            # Once refused, RabbitMQ would log each further try.
            now, sure = await _backlog(producer, task, ask=not perhaps)
            advances, perhaps = now < waiting and sure, not sure
    how = "advances" if advances else "is paused" if force.paused else "stands still"
    if perhaps:
        how = (
            "perhaps advances: RabbitMQ counts none now, as in a lane that does not answer, and"
            " this user may not read it"
        )
    say(
        f"published nothing: an earlier sweep is still queued, {count(waiting, 'chunk')},"
        f" and {how}; --append publishes all the same"
    )
    return 0 if advances or perhaps else 1


def _extent(sweep: Sweep) -> str:
    last = "" if sweep.last_id is None else f", last confirmed id {sweep.last_id}"
    return f"{count(sweep.chunks, 'chunk')}, {count(sweep.ids, 'id')}{last}"


def _how_to_go_on(settings: Settings, task: AnyTask, sweep: Sweep, after: int) -> str:
    size = "" if settings.chunk_size == CHUNK_LIMIT else f" --chunk-size {settings.chunk_size}"
    last = after if sweep.last_id is None else sweep.last_id
    again = words.command(f"publish-all {task.name}{size} --after {last}")
    return f"confirmed {_extent(sweep)}; go on with: {again}"
