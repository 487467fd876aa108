"""FastStream: one process, one message at a time."""

import asyncio
import os

from faststream import FastStream
from faststream.rabbit import Channel, RabbitBroker, RabbitQueue

from benchmarks.contenders import job

QUEUE = RabbitQueue("job.faststream", durable=True, arguments={"x-queue-type": "quorum"})
broker = RabbitBroker(os.environ["NOOP_AMQP_URL"], default_channel=Channel(prefetch_count=1))
app = FastStream(broker)


@broker.subscriber(QUEUE)
async def refresh(ids: list[int]) -> None:
    """Do the job."""
    await job.refresh_soon(ids)


async def publish() -> None:
    """Publish all chunks."""
    async with broker:
        await broker.declare_queue(QUEUE)
        for ids in job.chunks():
            await broker.publish(ids, QUEUE, persist=True)


if __name__ == "__main__":
    asyncio.run(publish())
