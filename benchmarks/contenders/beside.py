"""aioworker: the same task, beside one in the same worker that may start once an hour."""

import asyncio

from aioworker import Producer, task
from benchmarks.contenders import ours

BACKLOG = 100


@task(rate_limit="1/h")
async def seldom(number: int) -> None:
    """Wait in the queue, nearly always."""


async def publish() -> None:
    """Publish a backlog for the one, then all messages for the other."""
    async with Producer() as producer:
        await asyncio.gather(*(producer.publish(seldom, number) for number in range(BACKLOG)))
    await ours.publish()


if __name__ == "__main__":
    asyncio.run(publish())
