"""What `consume` and `publish` do, once their options are read."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import socket
import time
from typing import TYPE_CHECKING

from aioworker import console, tables
from aioworker.budget import SharedBudget
from aioworker.console import count, say, tell
from aioworker.consumer import Consumer, Terms
from aioworker.db import Database
from aioworker.errors import AioworkerError, DatabaseError
from aioworker.limits import WorkerBudget
from aioworker.logs import fields
from aioworker.message import CHUNK_LIMIT, check_chunk
from aioworker.outcome import Kind
from aioworker.presence import Presence
from aioworker.producer import Producer, Sweep, chunked, publish_sweep
from aioworker.supervisor import Options, Supervisor
from aioworker.tables import Row, peek
from aioworker.task import Context

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aioworker.notify import Notifier
    from aioworker.settings import Settings
    from aioworker.task import Task

log = logging.getLogger(__name__)

WATCH_SECONDS = 0.5
LONGEST_WATCH_SECONDS = 300.0


# consume


async def consume(
    settings: Settings, task: Task, *, burst: bool, stop: asyncio.Event, notifier: Notifier
) -> int:
    """Run the task's messages until *stop*, or in a burst until the lanes are empty.

    Returns:
        The exit status: 0, or 1 when not all was done in a burst, or when the running chunk
        did not end in time after a stop.
    """
    rate = task.rate_limit if settings.rate_limit is None else settings.rate_limit
    host, pid = socket.gethostname(), os.getpid()
    worker = f"{host}:{pid}"
    database = settings.database()
    shared = settings.budget == "shared"
    presence = Presence(
        task.name,
        host,
        pid,
        None if rate is None else str(rate),
        lambda doing: notifier.send(STATUS=doing),
        database if shared else None,
    )
    budget = SharedBudget(database, task.name, rate, worker) if shared else WorkerBudget(rate)
    terms = Terms(settings.max_retries, settings.task_timeout, settings.connect_timeout)
    consumer = Consumer(task, database, budget, presence, terms, worker)
    options = Options(settings.amqp_url, burst, settings.connect_timeout, worker)
    supervisor = Supervisor(task, database, budget, consumer, presence, options)
    log.info(
        "worker started",
        extra=fields(task=task.name, rate_limit=rate, budget=settings.budget, burst=burst),
    )
    if not shared:
        log.warning("the rate limit counts this process's starts alone: AIOWORKER_BUDGET=worker")
    notifier.send(READY="1", STATUS="starting")
    running = asyncio.create_task(supervisor.run(stop))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            log.info("draining", extra=fields(shutdown_timeout=settings.shutdown_timeout))
            notifier.send(STOPPING="1", STATUS="finishing the running chunk")
            await asyncio.wait({running}, timeout=settings.shutdown_timeout)
        if not running.done():
            log.error("not done in time", extra=fields(seconds=settings.shutdown_timeout))
            return 1
        complete = running.result()
    finally:
        for waiting in (running, stopping):
            waiting.cancel()
        await asyncio.gather(running, stopping, return_exceptions=True)
        await _leave(presence)
        database.close()
    done, dead, retried, released = (consumer.settled[kind] for kind in Kind)
    log.info("worker stopped", extra=fields(starts=consumer.starts, done=done))
    if burst:
        say(
            f"done {count(done, 'message')} in {count(consumer.starts, 'start')};"
            f" dead letters {dead}, to retry {retried}, given back {released}"
        )
    return 0 if complete or not burst else 1


async def _leave(presence: Presence) -> None:
    try:
        await presence.leave()
    except DatabaseError as error:
        log.warning("worker's row not removed", extra=fields(reason=str(error)))


# publish


async def publish(settings: Settings, task: Task, ids: list[int], *, urgent: bool) -> None:
    """Publish ids in chunks and print what was confirmed.

    Raises:
        UsageError: An id is out of range; nothing was published.
        BrokerError: RabbitMQ did not confirm a chunk.
    """
    chunks = [
        check_chunk(ids[start : start + CHUNK_LIMIT]) for start in range(0, len(ids), CHUNK_LIMIT)
    ]
    async with Producer(settings.amqp_url, settings.connect_timeout) as producer:
        for done, chunk in enumerate(chunks):
            try:
                await producer.publish(task.name, chunk, urgent=urgent)
            except (AioworkerError, asyncio.CancelledError) as error:
                if done:
                    error.add_note(f"confirmed the first {done * CHUNK_LIMIT} of {len(ids)} ids")
                raise
    lane = "urgent" if urgent else "bulk"
    what = f"{count(len(ids), 'id')} in {count(len(chunks), 'message')}"
    say(f"published {what} to the {lane} lane of {task.name}")


# publish-all


async def publish_all(
    settings: Settings, task: Task, *, after: int, append: bool, dry_run: bool
) -> int:
    """Publish a sweep with progress, unless an earlier one is still queued.

    Returns:
        The exit status: 0, or 1 when an earlier sweep stands still.

    Raises:
        BrokerError: Not all is confirmed; a note says how far it is, and how to go on.
        DatabaseError: The ids cannot be read; the same note.
    """
    database = settings.database()
    await database.ready()
    sweep = Sweep()
    try:
        chunks = chunked(_pages(database, task, after), settings.chunk_size)
        if dry_run:
            async for chunk in chunks:
                sweep.add(chunk)
            say(f"would publish {count(sweep.chunks, 'chunk')}, {count(sweep.ids, 'id')}")
            return 0
        async with Producer(settings.amqp_url, settings.connect_timeout) as producer:
            await _be_alone(database, task)
            waiting = await producer.backlog(task.name)
            if waiting and not append:
                row = await _budget_row(settings, task, database)
                database.close()  # others need not wait for what is only watched
                return await _watch_earlier(settings, task, producer, waiting, row)
            total = await _count(database, task, after) if console.is_terminal() else 0
            try:
                with console.progress("publishing ids", total) as show:
                    await publish_sweep(
                        producer,
                        task.name,
                        chunks,
                        sweep,
                        lambda: show(sweep.ids, f"published {_extent(sweep)}"),
                    )
            except (AioworkerError, asyncio.CancelledError) as error:
                if sweep.chunks or not isinstance(error, DatabaseError):
                    error.add_note(_how_to_go_on(settings, task, sweep, after))
                raise
    finally:
        database.close()
    say(f"published {_extent(sweep)}")
    return 0


async def _pages(database: Database, task: Task, after: int) -> AsyncIterator[list[int]]:
    with database.explaining():
        async for page in task.keys(Context(database, task.name), after):
            yield page


async def _count(database: Database, task: Task, after: int) -> int:
    return sum([len(page) async for page in _pages(database, task, after)])


async def _be_alone(database: Database, task: Task) -> None:
    """Hold a lock of the database while the connection stands: one sweep at a time.

    Raises:
        DatabaseError: Another one is being published.
    """
    name = tables.lock_name(database, task.name, "aioworker:sweep")
    with database.explaining():
        [[got]] = await database.query("SELECT GET_LOCK(%s, 0)", (name,))
    if got != 1:
        raise DatabaseError(f"another sweep of {task.name} is being published; nothing was done")


async def _budget_row(settings: Settings, task: Task, database: Database) -> Row | None:
    if settings.budget != "shared":
        return None
    with tables.explaining(database):
        return await peek(database, task.name)


async def _watch_earlier(
    settings: Settings, task: Task, producer: Producer, waiting: int, row: Row | None
) -> int:
    """Say that an earlier sweep is still queued, and whether it advances.

    The lane is watched for the time of one start. A start alone shows nothing: its run may
    fail, and its message come back.
    """
    rate = task.rate_limit if settings.rate_limit is None else settings.rate_limit
    interval = rate.interval if rate else 0.0
    if row is not None and row.gap_us is not None:
        interval = row.gap_us / 1e6
    paused = interval == math.inf or (row is not None and row.paused)
    advances = False
    if not paused:
        seconds = min(2.0 + interval * 1.1, LONGEST_WATCH_SECONDS)
        tell(f"an earlier sweep is still queued: watching for {seconds:.0f} s whether it advances")
        deadline = time.monotonic() + seconds
        while not advances and time.monotonic() < deadline:
            await asyncio.sleep(WATCH_SECONDS)
            advances = await producer.backlog(task.name) < waiting
    how = "advances" if advances else "is paused" if paused else "stands still"
    say(
        f"published nothing: an earlier sweep is still queued, {count(waiting, 'chunk')},"
        f" and {how}; --append publishes all the same"
    )
    return 0 if advances else 1


def _extent(sweep: Sweep) -> str:
    last = "" if sweep.last_id is None else f", last confirmed id {sweep.last_id}"
    return f"{count(sweep.chunks, 'chunk')}, {count(sweep.ids, 'id')}{last}"


def _how_to_go_on(settings: Settings, task: Task, sweep: Sweep, after: int) -> str:
    size = "" if settings.chunk_size == CHUNK_LIMIT else f" --chunk-size {settings.chunk_size}"
    last = after if sweep.last_id is None else sweep.last_id
    command = f"aioworker publish-all {task.name}{size} --after {last}"
    return f"confirmed {_extent(sweep)}; go on with: {command}"
