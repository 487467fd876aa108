"""A bare aio-pika consumer, prefetch 100: what the library alone does."""

import asyncio
import os
import sys

import aio_pika

from benchmarks.contenders import MESSAGES, tick

QUEUE = "noop.bare"
URL = os.environ["NOOP_AMQP_URL"]


async def publish() -> None:
    """Publish all messages, confirmed."""
    connection = await aio_pika.connect(URL)
    channel = await connection.channel()
    await channel.declare_queue(QUEUE, durable=True, arguments={"x-queue-type": "quorum"})
    for first in range(0, MESSAGES, 200):
        await asyncio.gather(
            *(
                channel.default_exchange.publish(
                    aio_pika.Message(str(number).encode(), delivery_mode=2), QUEUE
                )
                for number in range(first, min(first + 200, MESSAGES))
            )
        )
    await connection.close()


async def consume() -> None:
    """Acknowledge each message after it has run, until the parent ends this process."""
    connection = await aio_pika.connect(URL)
    channel = await connection.channel()
    await channel.set_qos(100)
    queue = await channel.get_queue(QUEUE, ensure=False)
    async with queue.iterator() as deliveries:
        async for delivery in deliveries:
            tick()
            await delivery.ack()


if __name__ == "__main__":
    asyncio.run(publish() if sys.argv[1:] == ["publish"] else consume())
