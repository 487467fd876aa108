"""The four queues of a task: their names, their arguments, and their declaration.

`aioworker init` declares, and nothing else does. Everything goes through the default
exchange, so that there is no binding to lose.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

from aio_pika.abc import AbstractConnection

from aioworker.errors import QueueMissingError
from aioworker.rabbitmq.errors import in_time, uncounted

RETRY_TTL_MS = 60_000
MAX_LENGTH = 1_000_000
# A backstop against a message that comes back for ever: RabbitMQ 3 has none, 4 has 20.
DELIVERY_LIMIT = 100
# Each look at a dead letter is a delivery, and RabbitMQ 4 drops it at the twentieth unless told.
NO_LIMIT = 1_000_000_000
# A quorum queue of RabbitMQ 3.10 that is younger than a second is lost with all its confirmed
# messages when the broker is killed (measured); three seconds leave room.
SAFE_AFTER_SECONDS = 3.0
# For RabbitMQ to count a message that was given back: as of 4.0 that takes a moment.
COUNTED_TRIES, COUNTED_SECONDS = 20, 0.05


class Queues(NamedTuple):
    """The names of a task's queues.

    Args:
        bulk: The lane of sweeps.
        urgent: The lane of single changes, always taken first.
        retry: Where a message waits before it goes back to the bulk lane.
        dead: Dead letters.
    """

    bulk: str
    urgent: str
    retry: str
    dead: str

    @classmethod
    def of(cls, task: str, prefix: str) -> Queues:
        """Name the queues of the task of this name."""
        bulk = f"{prefix}.{task}"
        return cls(bulk, f"{bulk}.urgent", f"{bulk}.retry", f"{bulk}.dead")

    def arguments(self, queue_type: str) -> dict[str, dict[str, Any]]:
        """Return each queue's arguments, the dead letters' queue first.

        Args:
            queue_type: `quorum`; or `classic`, where a broker that dies between two queues
                may lose what it was moving.
        """
        quorum = queue_type == "quorum"
        kind = {"x-queue-type": queue_type}
        keep = {"x-dead-letter-exchange": "", "x-overflow": "reject-publish"}
        if quorum:
            keep["x-dead-letter-strategy"] = "at-least-once"
        length = {"x-max-length": MAX_LENGTH}
        limit = {"x-delivery-limit": DELIVERY_LIMIT} if quorum else {}
        lane = kind | keep | limit | length | {"x-dead-letter-routing-key": self.dead}
        wait = {"x-message-ttl": RETRY_TTL_MS, "x-dead-letter-routing-key": self.bulk}
        kept = {"x-delivery-limit": NO_LIMIT} if quorum else {}
        return {
            self.dead: kind | kept,
            self.bulk: lane,
            self.urgent: lane,
            self.retry: kind | keep | length | wait,
        }


async def compare(
    connection: AbstractConnection, arguments: Mapping[str, dict[str, Any]], timeout: float
) -> dict[str, int | None]:
    """Compare the queues that are there with what `declare` would make; nothing is changed.

    Returns:
        How many messages RabbitMQ counts in each queue, none also where it does not answer;
        None for one that is not there.

    Raises:
        QueueDiffersError: A queue is there with another argument.
        BrokerError: RabbitMQ refuses, or the connection is lost.
    """
    waiting = {name: await count(connection, name, timeout) for name in arguments}
    for name in waiting:
        if waiting[name] is not None:
            await declare(connection, name, arguments[name], timeout)
    return waiting


async def declare(
    connection: AbstractConnection, name: str, arguments: dict[str, Any], timeout: float
) -> None:
    """Declare a queue; a new one is not safe yet: see `wait_until_safe`.

    Raises:
        QueueDiffersError: It is there with another argument.
        BrokerError: RabbitMQ refuses, or the connection is lost.
    """
    async with in_time(name, timeout):
        # A channel of its own: a refusal closes it.
        channel = await connection.channel()
        await channel.declare_queue(name, durable=True, arguments=arguments)
        await channel.close()


async def wait_until_safe(
    connection: AbstractConnection, names: Iterable[str], timeout: float
) -> None:
    """Wait until new queues outlive a broker that is killed, and see that they are there.

    Raises:
        BrokerError: One of them is gone, or the connection is lost.
    """
    await asyncio.sleep(SAFE_AFTER_SECONDS)
    await check(connection, names, timeout)


async def check(connection: AbstractConnection, names: Iterable[str], timeout: float) -> int:
    """See that queues are there; needs no privilege to configure.

    Returns:
        How many messages wait in all of them.

    Raises:
        QueueMissingError: One of them is not.
        BrokerError: RabbitMQ refuses, or the connection is lost.
    """
    messages = 0
    for name in names:
        waiting = await count(connection, name, timeout)
        if waiting is None:
            raise QueueMissingError.of(name)
        messages += waiting
    return messages


async def count(connection: AbstractConnection, name: str, timeout: float) -> int | None:
    """Return how many messages wait in a queue, None when there is no such queue.

    RabbitMQ also counts nothing where the queue does not answer it: see `count_surely`.

    Raises:
        BrokerError: RabbitMQ refuses, or the connection is lost.
    """
    try:
        async with in_time(name, timeout):
            channel = await connection.channel()
            queue = await channel.declare_queue(name, passive=True)
            await channel.close()
    except QueueMissingError:
        return None
    return queue.declaration_result.message_count


async def count_surely(connection: AbstractConnection, name: str, timeout: float) -> int | None:
    """Return what `count` does, but nothing only where the queue itself says so to a `get`.

    A message that comes right then is given back.

    Raises:
        BrokerError: The queue does not answer, RabbitMQ refuses, or the connection is lost.
    """

    async def is_empty() -> bool:
        async with in_time(name, timeout):
            channel = await connection.channel()
            queue = await channel.get_queue(name, ensure=False)
            delivery = await queue.get(fail=False, timeout=timeout)
            if delivery is not None:
                await delivery.nack()
            await channel.close()
        return delivery is None

    return await counted(partial(count, connection, name, timeout), is_empty, name)


async def counted(
    count: Callable[[], Awaitable[int | None]], is_empty: Callable[[], Awaitable[bool]], name: str
) -> int | None:
    """Return how many messages a queue holds, nothing only where the queue itself says so.

    Args:
        count: Asks RabbitMQ how many it counts.
        is_empty: Asks the queue, by a `get`.
        name: The queue's name.

    Raises:
        BrokerError: The queue holds something, and RabbitMQ does not come to count it.
    """
    waiting = await count()
    if waiting != 0 or await is_empty():
        return waiting
    for _ in range(COUNTED_TRIES):
        if waiting := await count():
            return waiting
        await asyncio.sleep(COUNTED_SECONDS)
    raise uncounted(name)
