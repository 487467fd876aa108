"""How soon an idle worker does what is published, while a start is due."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

import aio_pika
import psutil

from aioworker import task
from aioworker.producer import outgoing_message
from aioworker.rabbitmq.queues import Queues
from benchmarks import backlog

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence
    from pathlib import Path

    from aio_pika.abc import AbstractChannel
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

    from support.servers import Servers

TRIES = 200
RATE = "20/s"  # a start is due 50 ms after the last one
PAUSE_SECONDS = (0.2, 0.6)  # from one to the next publication
LOOK_SECONDS = 0.001
LONGEST_SECONDS = 10.0
SILENCE_SECONDS = 61.0


@task
async def tell(path: str) -> None:
    """Write the time of the run into a file."""
    with open(path, "a") as file:  # noqa: ASYNC230 - of memory
        file.write(f"{time.time()}\n")


@contextmanager
def worker(pair: Servers, *options: str) -> Iterator[psutil.Popen]:
    """Run `aioworker consume` inside."""
    running = psutil.Popen(
        [sys.executable, "-m", "aioworker", "consume", "--rate-limit", RATE, *options],
        env=pair.environment | {"AIOWORKER_LOG_LEVEL": "warning"},
    )
    try:
        yield running
    finally:
        running.terminate()
        running.wait()


async def seconds_to_rows(
    pair: Servers, connection: Connection[Cursor], ids: Sequence[int], pause: tuple[float, float]
) -> list[float]:
    """Publish ids one after the other, and return how long after each its row is right."""
    lane = Queues.of(backlog.TASK, "aioworker").urgent
    found = []
    async with _channel(pair) as channel:
        for addon in ids:
            await asyncio.sleep(random.uniform(*pause))
            before = _answer(connection, addon)
            began = time.perf_counter()
            await channel.default_exchange.publish(backlog.message([addon]), lane)
            while _answer(connection, addon) == before:
                if time.perf_counter() - began > LONGEST_SECONDS:
                    raise SystemExit("a row was not written: these figures are of a broken job")
                await asyncio.sleep(LOOK_SECONDS)
            found.append(time.perf_counter() - began)
    return found


def seconds_to_runs(pair: Servers, path: Path, tries: int) -> list[float]:
    """Publish calls of a task that does nothing, and return how long after each it ran."""
    sent = asyncio.run(_publish_calls(pair, path, tries))
    deadline = time.monotonic() + LONGEST_SECONDS
    while len(ran := path.read_text().splitlines() if path.exists() else []) < tries:
        if time.monotonic() > deadline:
            raise SystemExit("not all calls ran: these figures are of a broken worker")
        time.sleep(LOOK_SECONDS)
    return [float(then) - at for at, then in zip(sent, ran, strict=True)]


async def _publish_calls(pair: Servers, path: Path, tries: int) -> list[float]:
    lane = Queues.of(tell.name, "aioworker").urgent
    sent = []
    async with _channel(pair) as channel:
        for _ in range(tries):
            await asyncio.sleep(random.uniform(*PAUSE_SECONDS))
            message = outgoing_message(tell.name, [str(path)])
            sent.append(time.time())
            await channel.default_exchange.publish(message, lane)
    return sent


@asynccontextmanager
async def _channel(pair: Servers) -> AsyncIterator[AbstractChannel]:
    async with await aio_pika.connect(pair.amqp_url) as connection:
        yield await connection.channel()


def _answer(connection: Connection[Cursor], addon: int) -> object:
    with connection.cursor() as cursor:
        cursor.execute("SELECT current_version FROM addons WHERE id = %s", (addon,))
        found = cursor.fetchone()
    connection.commit()
    return found
