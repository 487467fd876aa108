"""taskiq with taskiq-aio-pika: one worker process, one message at a time."""

import asyncio
import os

from taskiq_aio_pika import AioPikaBroker

from benchmarks.contenders import job

broker = AioPikaBroker(os.environ["NOOP_AMQP_URL"], qos=1)


@broker.task(task_name="refresh")
async def refresh(ids: list[int]) -> None:
    """Do the job."""
    await job.refresh_soon(ids)


async def publish() -> None:
    """Publish all chunks."""
    await broker.startup()
    for ids in job.chunks():
        await refresh.kiq(ids)
    await broker.shutdown()


if __name__ == "__main__":
    asyncio.run(publish())
