"""taskiq with taskiq-aio-pika: one worker process."""

import asyncio
import os

from taskiq_aio_pika import AioPikaBroker

from benchmarks.contenders import MESSAGES, tick

broker = AioPikaBroker(os.environ["NOOP_AMQP_URL"])


@broker.task(task_name="noop")
async def noop(number: int) -> None:
    """Do nothing."""
    tick()


async def publish() -> None:
    """Publish all messages, two hundred under way at once."""
    await broker.startup()
    for first in range(0, MESSAGES, 200):
        numbers = range(first, min(first + 200, MESSAGES))
        await asyncio.gather(*(noop.kiq(number) for number in numbers))
    await broker.shutdown()


if __name__ == "__main__":
    asyncio.run(publish())
