"""FastStream: one process, prefetch 100."""

import asyncio
import os

from faststream import FastStream
from faststream.rabbit import Channel, RabbitBroker, RabbitQueue

from benchmarks.contenders import MESSAGES, tick

QUEUE = RabbitQueue("noop.faststream", durable=True, arguments={"x-queue-type": "quorum"})
broker = RabbitBroker(os.environ["NOOP_AMQP_URL"], default_channel=Channel(prefetch_count=100))
app = FastStream(broker)


@broker.subscriber(QUEUE)
async def noop(number: int) -> None:
    """Do nothing."""
    tick()


async def publish() -> None:
    """Publish all messages, two hundred under way at once."""
    async with broker:
        await broker.declare_queue(QUEUE)
        for first in range(0, MESSAGES, 200):
            numbers = range(first, min(first + 200, MESSAGES))
            await asyncio.gather(
                *(broker.publish(number, QUEUE, persist=True) for number in numbers)
            )


if __name__ == "__main__":
    asyncio.run(publish())
