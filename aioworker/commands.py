"""What each command does, once its options are read: talk to the servers, tell the person."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import socket
import time
from typing import TYPE_CHECKING

from aioworker import broker, console, repo, topology
from aioworker.console import count, say, tell
from aioworker.consumer import Consumer, Options
from aioworker.db import Database
from aioworker.errors import AioworkerError, DatabaseError
from aioworker.logs import fields
from aioworker.message import CHUNK_LIMIT, check_chunk
from aioworker.outcome import Kind
from aioworker.producer import Producer, Sweep, chunked, publish_sweep
from aioworker.task import Context

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aioworker.notify import Notifier
    from aioworker.settings import Settings
    from aioworker.task import Task

log = logging.getLogger(__name__)

WATCH_SECONDS = 0.5
LONGEST_WATCH_SECONDS = 300.0


def _database(settings: Settings) -> Database:
    return Database(
        settings.mysql_url,
        connect_timeout=settings.connect_timeout,
        timeout=settings.task_timeout,
    )


# init


async def init(settings: Settings, task: Task) -> None:
    """Declare the task's queues and wait until they are safe.

    Raises:
        BrokerError: RabbitMQ cannot be used, or a queue differs.
    """
    timeout = settings.connect_timeout
    queues = topology.Queues.of(task.name)
    async with broker.connection(settings.amqp_url, timeout, "aioworker init") as connection:
        declared = await topology.declare(connection, queues, settings.queue_type, timeout)
        for name in queues.arguments(settings.queue_type):
            say(f"queue {name}: {'declared' if name in declared else 'was there'}")
        # Also when they were there: another init may have made them a moment ago.
        tell(f"waiting {topology.SAFE_AFTER_SECONDS:g} s until the queues are safe")
        await topology.wait_until_safe(connection, queues, timeout)


def setup_text(settings: Settings, task: Task) -> str:
    """Return what `init` declares, and the least that the worker's users need, as commands."""
    amqp, mysql = settings.amqp_url[0], settings.mysql_url
    queues = topology.Queues.of(task.name).arguments(settings.queue_type)
    permit = f"rabbitmqctl set_permissions -p '{amqp.vhost}' '{amqp.user}'"
    lines = [
        "# RabbitMQ: the queues that init declares, durable, on the default exchange",
        *(f"queue {name} {json.dumps(arguments)}" for name, arguments in queues.items()),
        "",
        "# RabbitMQ: the least that the user of init needs",
        rf"{permit} '^aioworker\.' '^(aioworker\.|amq\.default$)' '^aioworker\.'",
        "",
        "# RabbitMQ: the least that the user of consume, publish-all and publish needs",
        rf"{permit} '' '^amq\.default$' '^aioworker\.'",
        "",
        "# MySQL: the least that the user of consume and publish-all needs",
        *(
            f"GRANT {privilege} ON `{mysql.database}`.`{table}` TO '{mysql.user}'@'%';"
            for privilege, table in repo.PRIVILEGES
        ),
        "",
        "# MySQL: the statements of publish-all and consume; %s are ids and page sizes",
        *(f"{statement};" for statement in (repo.PAGE, repo.STALE, repo.WRITE)),
    ]
    return "\n".join(lines)


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
    options = Options(
        addresses=settings.amqp_url,
        rate_limit=rate,
        burst=burst,
        task_timeout=settings.task_timeout,
        connect_timeout=settings.connect_timeout,
        worker=f"{socket.gethostname()}:{os.getpid()}",
    )
    database = _database(settings)
    consumer = Consumer(task, database, options, lambda doing: notifier.send(STATUS=doing))
    log.info("worker started", extra=fields(task=task.name, rate_limit=rate, burst=burst))
    notifier.send(READY="1", STATUS="starting")
    running = asyncio.create_task(consumer.run(stop))
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
        database.close()
    done, dead, released = (consumer.settled[kind] for kind in Kind)
    log.info("worker stopped", extra=fields(starts=consumer.starts, done=done))
    if burst:
        say(
            f"done {count(done, 'message')} in {count(consumer.starts, 'start')};"
            f" dead letters {dead}, given back {released}"
        )
    return 0 if complete or not burst else 1


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
    database = _database(settings)
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
                database.close()  # others need not wait for what is only watched
                return await _watch_earlier(settings, task, producer, waiting)
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
    owner = f"{database.address.database}\0{task.name}"
    name = f"aioworker:sweep:{task.name[:30]}:{hashlib.sha256(owner.encode()).hexdigest()[:16]}"
    with database.explaining():
        [[got]] = await database.query("SELECT GET_LOCK(%s, 0)", (name,))
    if got != 1:
        raise DatabaseError(f"another sweep of {task.name} is being published; nothing was done")


async def _watch_earlier(settings: Settings, task: Task, producer: Producer, waiting: int) -> int:
    """Say that an earlier sweep is still queued; watch for one start whether it advances."""
    rate = task.rate_limit if settings.rate_limit is None else settings.rate_limit
    paused = rate is not None and rate.paused
    interval = rate.interval if rate and not paused else 0.0
    seconds = 0.0 if paused else min(2.0 + interval * 1.1, LONGEST_WATCH_SECONDS)
    tell(f"an earlier sweep is still queued: watching for {seconds:.0f} s whether it advances")
    deadline = time.monotonic() + seconds
    advances = False
    while not advances and time.monotonic() < deadline:
        await asyncio.sleep(WATCH_SECONDS)
        advances = await producer.backlog(task.name) < waiting
    say(
        f"published nothing: an earlier sweep is still queued, {count(waiting, 'chunk')},"
        f" and {'advances' if advances else 'stands still'}; --append publishes all the same"
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
