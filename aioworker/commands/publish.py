"""What `publish` and `publish-all` do: single ids, and a sweep that is alone."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

from aioworker.budget import tables
from aioworker.commands.controls import rate_in_force
from aioworker.errors import AioworkerError, BrokerError, DatabaseError, UsageError
from aioworker.producer import Producer
from aioworker.rabbitmq.errors import forbids
from aioworker.sweep import Sweep, count_ids, publish_sweep, read_chunks
from aioworker.tasks.chunk import CHUNK_LIMIT
from aioworker.words import command, count

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from contextlib import AbstractContextManager

    from aioworker.limits import InForce
    from aioworker.mysql.database import Database
    from aioworker.settings import Settings
    from aioworker.tasks.task import AnyTask

POLL_SECONDS = 0.5  # between two looks at an earlier sweep's lane
KEEP_SECONDS = 1.0  # between two uses of the connection that keeps other sweeps out
LONGEST_WATCH_SECONDS = 300.0


class Pace(StrEnum):
    """How an earlier sweep does that is still queued."""

    ADVANCES = "advances"
    PERHAPS_ADVANCES = (
        "perhaps advances: RabbitMQ counts none now, as in a lane that does not answer, and this"
        " user may not read it"
    )
    STANDS_STILL = "stands still"
    PAUSED = "is paused"


class EarlierSweep(NamedTuple):
    """A sweep that is still queued: none was published beside it.

    Args:
        chunks: How many of it wait.
        pace: How it does.
    """

    chunks: int
    pace: Pace

    @property
    def advances(self) -> bool:
        """Whether nobody has to look at it, as far as can be told."""
        return self.pace in (Pace.ADVANCES, Pace.PERHAPS_ADVANCES)


async def publish(settings: Settings, task: AnyTask, ids: list[int], *, urgent: bool) -> int:
    """Publish ids in chunks and return how many messages those were.

    Raises:
        UsageError: An id is out of range, or the task takes no ids; nothing was published.
        BrokerError: RabbitMQ did not confirm a chunk; a note says how many ids it did confirm.
    """
    if not (task.takes_chunks and task.signature.takes_ids):
        raise UsageError(f"task {task.name!r} takes no ids: publish to it from Python")
    chunks = [ids[start : start + CHUNK_LIMIT] for start in range(0, len(ids), CHUNK_LIMIT)]
    for chunk in chunks:
        task.checked([chunk, *task.options.constants], {})
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
    return len(chunks)


async def count_all(settings: Settings, task: AnyTask, *, after: int, only_needed: bool) -> Sweep:
    """Return what `publish_all` would publish; it needs no RabbitMQ.

    What needs writing is read from a replica, if one is named.

    Args:
        settings: The settings.
        task: What is swept.
        after: Begin behind this id.
        only_needed: Leave out what needs no writing.

    Raises:
        UsageError: The task cannot be swept like this.
        DatabaseError: The ids cannot be read.
    """
    _check_sweepable(task, only_needed=only_needed)
    sweep = Sweep()
    async with _source(settings, only_needed=only_needed) as database:
        async for chunk in read_chunks(
            database, task, settings.chunk_size, after=after, only_needed=only_needed
        ):
            sweep.add(chunk)
    return sweep


async def publish_all(  # noqa: PLR0913 - what the options say, and what shows it
    settings: Settings,
    task: AnyTask,
    *,
    after: int,
    append: bool,
    only_needed: bool,
    note: Callable[[str], None],
    progress: Callable[[int | None], AbstractContextManager[Callable[[int, str], None]]],
    count_first: bool,
) -> Sweep | EarlierSweep:
    """Publish a sweep, unless an earlier one is still queued.

    Args:
        settings: The settings.
        task: What is swept.
        after: Begin behind this id.
        append: Publish all the same while an earlier sweep is queued.
        only_needed: Leave out what needs no writing.
        note: Prints what a silence is for.
        progress: Shows how far it is. Called with the number of ids, None where nobody knows;
            yields what is called after each chunk, with the ids published and a line.
        count_first: Whether to find out how many ids there are, for a bar.

    Returns:
        What was published, or the earlier sweep.

    Raises:
        UsageError: The task cannot be swept like this.
        BrokerError: Not all is confirmed; a note says how far it is, and how to go on.
        DatabaseError: The ids cannot be read, or the lock is lost that keeps other sweeps out; the
            same note.
        TaskError: They are none that the task can take; the same note.
    """
    _check_sweepable(task, only_needed=only_needed)
    async with AsyncExitStack() as stack:
        lock = await stack.enter_async_context(settings.database())
        producer = await stack.enter_async_context(_producer(settings))
        await _be_alone(lock, task)
        waiting, _sure = await _backlog(producer, task, ask=not append)
        if waiting and not append:
            row = None
            if settings.budget == "shared":
                with tables.explaining(lock):
                    row = await tables.find_row(lock, task.name)
            force = rate_in_force(settings, task.name, row, set())
            lock.close()  # others need not wait for what is only watched
            return EarlierSweep(waiting, await _watch(producer, task, waiting, force, note))
        source = await stack.enter_async_context(_source(settings, only_needed=only_needed))
        total = None
        if count_first and not only_needed:
            total = await count_ids(source, task, after)
        sweep = Sweep()
        chunks = read_chunks(
            source, task, settings.chunk_size, after=after, only_needed=only_needed
        )
        try:
            with progress(total) as show:

                def confirmed(sweep: Sweep) -> None:
                    show(sweep.ids, f"published {sweep}")

                await _while_alone(lock, publish_sweep(producer, task, chunks, sweep, confirmed))
        except (AioworkerError, asyncio.CancelledError) as error:
            if sweep.chunks or not isinstance(error, DatabaseError | UsageError):
                error.add_note(_how_to_go_on(settings, task, sweep, after, only_needed=only_needed))
            raise
    return sweep


def _check_sweepable(task: AnyTask, *, only_needed: bool) -> None:
    if only_needed and task.reader is None:
        raise UsageError(f"task {task.name!r} has no needed: it cannot tell what needs writing")


def _source(settings: Settings, *, only_needed: bool) -> Database:
    return settings.reader() if only_needed else settings.database(locks=False)


def _producer(settings: Settings) -> Producer:
    return Producer.over(settings.nodes(), settings.connect_timeout, settings.queue_prefix)


async def _be_alone(lock: Database, task: AnyTask) -> None:
    """Hold a lock of the database while a connection stands: one sweep at a time.

    Raises:
        DatabaseError: Another one is being published.
    """
    with lock.explaining():
        name = tables.lock_name(await lock.schema(), task.name, "aioworker:sweep")
        [[got]] = await lock.query("SELECT GET_LOCK(%s, 0)", (name,))
    if got != 1:
        raise DatabaseError(f"another sweep of {task.name} is being published; nothing was done")


async def _while_alone(lock: Database, work: Coroutine[Any, Any, None]) -> None:
    """Do some work for as long as a connection stands that holds the lock.

    Raises:
        DatabaseError: It is lost, and the lock with it: the work was cut short.
    """
    working, keeping = asyncio.create_task(work), asyncio.create_task(_keep(lock))
    try:
        await asyncio.wait({working, keeping}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        working.cancel()
        keeping.cancel()
        await asyncio.gather(working, keeping, return_exceptions=True)
    await (keeping if working.cancelled() else working)


async def _keep(lock: Database) -> None:
    """Use a connection again and again: the server ends one that is idle."""
    with lock.explaining(), lock.without_reconnect():
        while True:
            await asyncio.sleep(KEEP_SECONDS)
            await lock.query("SELECT 1")


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


async def _watch(
    producer: Producer, task: AnyTask, waiting: int, force: InForce, note: Callable[[str], None]
) -> Pace:
    """Return how an earlier sweep does, of which so many chunks wait.

    Its lane is watched for the time of one start. A start alone shows nothing: its run may
    fail, and its message come back.
    """
    if force.paused:
        return Pace.PAUSED
    seconds = min(2.0 + (force.interval or 0.0) * 1.1, LONGEST_WATCH_SECONDS)
    note(f"an earlier sweep is still queued: watching for {seconds:.0f} s whether it advances")
    deadline = time.monotonic() + seconds
    sure = True
    while time.monotonic() < deadline:
        await asyncio.sleep(POLL_SECONDS)
        # Once refused, RabbitMQ would log each further try.
        now, sure = await _backlog(producer, task, ask=sure)
        if sure and now < waiting:
            return Pace.ADVANCES
    return Pace.STANDS_STILL if sure else Pace.PERHAPS_ADVANCES


def _how_to_go_on(
    settings: Settings, task: AnyTask, sweep: Sweep, after: int, *, only_needed: bool
) -> str:
    size = "" if settings.chunk_size == CHUNK_LIMIT else f" --chunk-size {settings.chunk_size}"
    rest = " --only-needed" if only_needed else ""
    last = after if sweep.last_id is None else sweep.last_id
    again = command(f"publish-all {task.name}{size}{rest} --after {last}")
    return f"confirmed {sweep}; go on with: {again}"
