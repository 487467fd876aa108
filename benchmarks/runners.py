"""Programs that the benchmarks time, each in a process of its own.

`python -m benchmarks.runners NAME [IDS]` runs one on the servers that the environment names, with
its settings, and prints when its work began and ended, connecting included, starting Python not:
seconds by a clock that all processes share. With READY_FILE in the environment it makes that file
once Python is there, and begins when the file is gone.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import aio_pika

from aioworker.addons import update_current_version
from aioworker.budget.shared import SharedBudget
from aioworker.producer import Producer
from aioworker.rabbitmq.message import encode
from aioworker.rabbitmq.queues import Queues
from aioworker.settings import Settings
from aioworker.status.presence import Presence
from aioworker.sweep import Sweep, chunked, publish_sweep
from aioworker.worker.session import Worker
from aioworker.worker.supervisor import Supervisor

IDS = int(sys.argv[2]) if len(sys.argv) > 2 else 200_000
PAGE = 5000
WINDOW = 64
EMBED = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}


async def consume() -> None:
    """The main job, its rate limit off, until the lanes are empty."""
    settings = Settings.load()
    task = update_current_version
    database = settings.database()
    gather_seconds = settings.gather_seconds
    budget = SharedBudget(database, task.name, None, "bench", gather_seconds=gather_seconds)
    presence = Presence(task.name, "bench", os.getpid(), None, lambda _doing: None, database)
    worker = Worker.of(
        "bench",
        task,
        database,
        budget,
        presence,
        timeout=10,
        task_timeout=30,
        max_retries=5,
        burst=True,
        gather_seconds=gather_seconds,
        chunk_size=settings.chunk_size,
    )
    queues = Queues.of(task.name, settings.queue_prefix)
    supervisor = Supervisor(worker, settings.amqp_url, queues, 10, "bench")
    if not await supervisor.run(asyncio.Event()):
        sys.exit("not every chunk was done")
    database.close()


async def pages() -> AsyncIterator[list[int]]:
    """Yield ids in pages, without a database."""
    for first in range(1, IDS + 1, PAGE):
        yield list(range(first, first + PAGE))


async def publish() -> None:
    """A sweep of generated ids."""
    settings = Settings.load()
    async with Producer.over(settings.amqp_url, 10, settings.queue_prefix) as producer:
        await publish_sweep(
            producer, update_current_version, chunked(pages(), 1000), Sweep(), lambda _sweep: None
        )


async def publish_bare() -> None:
    """The same messages by a loop over aio-pika: confirmed, as many under way at once."""
    settings = Settings.load()
    connection = await aio_pika.connect(settings.amqp_url[0].url.get_secret_value())
    channel = await connection.channel(publisher_confirms=True)
    queue = Queues.of(update_current_version.name, settings.queue_prefix).bulk
    headers = encode(update_current_version.name, [[1]], sweep=str(uuid.uuid4())).headers
    under_way: deque[asyncio.Task[object]] = deque()
    async for ids in chunked(pages(), 1000):
        name = str(uuid.uuid4())
        message = aio_pika.Message(
            json.dumps([[ids], {}, EMBED]).encode(),
            headers={**headers, "id": name, "root_id": name, "argsrepr": str(ids[:6])},
            content_type="application/json",
            content_encoding="utf-8",
            correlation_id=name,
            message_id=name,
            timestamp=datetime.now(UTC),
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        )
        publishing: asyncio.Task[object] = asyncio.ensure_future(
            channel.default_exchange.publish(message, queue)
        )
        under_way.append(publishing)
        if len(under_way) >= WINDOW:
            await under_way.popleft()
    await asyncio.gather(*under_way)
    await connection.close()


if __name__ == "__main__":
    runner = {"consume": consume, "publish": publish, "publish-bare": publish_bare}[sys.argv[1]]
    if ready := os.environ.get("READY_FILE"):
        Path(ready).touch()
        while Path(ready).exists():
            time.sleep(0.001)
    began = time.monotonic()
    asyncio.run(runner())
    print(began, time.monotonic())
