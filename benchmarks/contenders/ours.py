"""aioworker: a task without a rate limit."""

import asyncio

from aioworker import Producer, task
from benchmarks.contenders import MESSAGES, tick


@task
async def noop(number: int) -> None:
    """Do nothing."""
    tick()


async def publish() -> None:
    """Publish all messages, two hundred under way at once."""
    async with Producer() as producer:
        for first in range(0, MESSAGES, 200):
            numbers = range(first, min(first + 200, MESSAGES))
            await asyncio.gather(*(producer.publish(noop, number) for number in numbers))


if __name__ == "__main__":
    asyncio.run(publish())
