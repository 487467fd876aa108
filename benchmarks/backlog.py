"""A backlog of messages of the main job, and the memory that a worker takes to work it off."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import aio_pika

from aioworker.addons import update_current_version
from aioworker.producer import outgoing_message
from aioworker.rabbitmq.queues import Queues

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

    from support.servers import Servers

MESSAGES = 100_000
SAME = 28_000  # of them name one id
LARGE = 8  # of them, one behind the other, and as many more with some small ones between
BETWEEN = 7
LARGE_BYTES = 4 * 1024 * 1024
LONGEST_SECONDS = 3600.0
UNDER_WAY = 200
TASK = update_current_version.name
LANE = Queues.of(TASK, "aioworker").urgent


def message(ids: list[int], size: int = 0) -> aio_pika.Message:
    """Return a message of some ids, its body at least so many bytes long: JSON may have spaces."""
    made = outgoing_message(TASK, [ids])
    made.delivery_mode = aio_pika.DeliveryMode.PERSISTENT
    made.body = made.body.ljust(size)
    return made


async def publish(amqp_url: str, messages: Iterable[aio_pika.Message]) -> None:
    """Publish messages to the urgent lane, each confirmed, in their order."""
    connection = await aio_pika.connect(amqp_url)
    async with connection:
        channel = await connection.channel(publisher_confirms=True)
        left = iter(messages)
        while some := list(islice(left, UNDER_WAY)):
            exchange = channel.default_exchange
            await asyncio.gather(*(exchange.publish(one, LANE) for one in some))


def mixed(ids: Sequence[int]) -> Iterator[aio_pika.Message]:
    """Yield a backlog of one id a message, large ones in the middle, in a row and among others."""
    named = [ids[0]] * SAME + [ids[1 + n % (len(ids) - 1)] for n in range(MESSAGES - SAME)]
    random.Random(7).shuffle(named)
    first = MESSAGES // 2
    row = range(first, first + LARGE)
    apart = range(row.stop, row.stop + LARGE * (BETWEEN + 1), BETWEEN + 1)
    for number, addon in enumerate(named):
        yield message([addon], LARGE_BYTES if number in row or number in apart else 0)


def peak(pair: Servers, connection: Connection[Cursor], gather_seconds: str) -> float:
    """Have a worker do, its rate limit off, what waits; return its peak memory in MiB."""
    worker = subprocess.Popen(
        [sys.executable, "-m", "aioworker", "consume", "--rate-limit", "none"],
        env=pair.environment
        | {"AIOWORKER_GATHER_SECONDS": gather_seconds, "AIOWORKER_LOG_LEVEL": "warning"},
    )
    deadline = time.monotonic() + LONGEST_SECONDS
    try:
        while not _is_idle(connection):
            if worker.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("the worker did not empty its lanes")
            time.sleep(1)
        status = Path(f"/proc/{worker.pid}/status").read_text()
    finally:
        worker.terminate()
        worker.wait()
    [kibibytes] = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
    return int(kibibytes) / 1024


def _is_idle(connection: Connection[Cursor]) -> bool:
    """Whether the worker says that the lanes are empty."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT kind FROM aioworker_worker")
        kinds = cursor.fetchall()
    connection.commit()  # the next time others have written
    return kinds == (("empty",),)
