"""Publishing to RabbitMQ: each message persistent, and confirmed or refused."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractConnection
from aio_pika.exceptions import PublishError

from aioworker.addresses import BrokerAddress, Nodes
from aioworker.errors import BrokerError
from aioworker.rabbitmq.connection import CLOSE_SECONDS, LEAVE_SECONDS, close, connect
from aioworker.rabbitmq.errors import FAILURES, describe, explain, in_time
from aioworker.rabbitmq.queues import check


class Publisher:
    """Publishes persistent messages and waits for RabbitMQ's confirm of each.

    Its connection is its own, opened at the first publish: RabbitMQ blocks a connection
    that publishes while it is short of memory or disk, and taking must go on meanwhile.
    Use as `async with Publisher(…) as publisher`.
    """

    def __init__(self, nodes: Sequence[BrokerAddress], timeout: float, name: str) -> None:
        self._nodes = Nodes(nodes)
        self._timeout = timeout
        self._name = name
        self._connection: AbstractConnection | None = None
        self._channel: AbstractChannel | None = None
        self._opening: asyncio.Task[AbstractChannel] | None = None

    async def __aenter__(self) -> Publisher:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; the next publish opens another."""
        if self._opening is not None:
            self._opening.cancel()
        await self._close()

    async def _close(self, seconds: float = CLOSE_SECONDS) -> None:
        opened, self._connection, self._channel = self._connection, None, None
        if opened is not None:
            await close(opened, seconds)

    async def connection(self) -> AbstractConnection:
        """Return the connection, opened anew if it is lost.

        Raises:
            BrokerError: RabbitMQ cannot be reached or refuses.
        """
        await self._open()
        if self._connection is None:
            raise BrokerError("connection to RabbitMQ closed")
        return self._connection

    async def _open(self) -> AbstractChannel:
        if self._channel is not None and not self._channel.is_closed:
            return self._channel
        # One attempt for all that wait: what it comes to is the same for each of them.
        if self._opening is None or self._opening.done():
            self._opening = asyncio.create_task(self._open_anew())
            self._opening.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        return await asyncio.shield(self._opening)

    async def _open_anew(self) -> AbstractChannel:
        await self._close(LEAVE_SECONDS)
        self._connection = await connect(self._nodes, self._timeout, self._name)
        try:
            async with asyncio.timeout(self._timeout):
                self._channel = await self._connection.channel(
                    publisher_confirms=True, on_return_raises=True
                )
        except FAILURES as error:
            raise BrokerError(f"RabbitMQ opened no channel: {describe(error)}") from error
        return self._channel

    async def probe(self, queue: str) -> None:
        """See that RabbitMQ takes and confirms messages now, by one that no queue gets.

        Args:
            queue: What the error is to be about.

        Raises:
            BrokerError: It does not: it is short of memory or disk, or refuses.
        """
        channel = await self._open()
        async with in_time(queue, self._timeout):
            # One without a body gets through while RabbitMQ lets no other in.
            nothing = aio_pika.Message(b"nothing")
            await channel.default_exchange.publish(nothing, "", mandatory=False)

    async def unblocked(self) -> None:
        """Return when RabbitMQ, short of memory or disk before, takes messages again."""
        transport = self._connection.transport if self._connection is not None else None
        if transport is not None:
            await transport.connection.ready()

    async def publish(self, queue: str, outgoing: aio_pika.Message) -> None:
        """Publish one message to a queue, persistent, and wait for its confirm.

        Raises:
            QueueMissingError: There is no such queue; nothing was published.
            BrokerError: It was refused, or no confirm came in time: then it may have
                been published all the same.
        """
        channel = await self._open()
        outgoing.delivery_mode = aio_pika.DeliveryMode.PERSISTENT
        try:
            async with asyncio.timeout(self._timeout):
                # RabbitMQ short of memory stops reading from whoever publishes, and reads it all
                # later, when nobody counts on it any more: nothing more is sent then.
                await self.unblocked()
                await channel.default_exchange.publish(outgoing, queue, mandatory=True)
        except PublishError as error:
            raise await self._unroutable(queue) from error
        except FAILURES as error:
            explained = explain(error, queue)
            may_leave = explained.unreachable and len(self._nodes) > 1
            if may_leave and channel is self._channel and not await self._blocked():
                self._nodes.rotate(-1)
                self._channel = None  # the next publish connects to the next node
            raise explained from error

    async def _blocked(self) -> bool:
        """Whether RabbitMQ is short of memory or disk: then so is every node of a cluster."""
        try:
            async with asyncio.timeout(0):
                await self.unblocked()
        except TimeoutError:
            return True
        return False

    async def _unroutable(self, queue: str) -> BrokerError:
        """Return why RabbitMQ has no such queue for a message, by what it says of the queue."""
        try:
            await check(await self.connection(), [queue], self._timeout)
        except BrokerError as error:
            return error
        return BrokerError(f"RabbitMQ found no queue {queue} for the message, though it is there")
