"""One task's worker, over any number of connections: connect, serve, wait after a failure."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from aioworker.addresses import BrokerAddress, Nodes
from aioworker.errors import BrokerError
from aioworker.rabbitmq import frames
from aioworker.rabbitmq.connection import connected
from aioworker.rabbitmq.errors import beyond_limit
from aioworker.rabbitmq.lanes import OpenLanes
from aioworker.rabbitmq.publisher import Publisher
from aioworker.rabbitmq.queues import Queues
from aioworker.worker.session import Session, Worker, first_of


class Supervisor:
    """Runs one task's messages until told to stop.

    Args:
        worker: What serves them.
        nodes: The nodes of the RabbitMQ cluster.
        queues: The task's queues.
        timeout: Seconds for each step.
        name: What RabbitMQ lists the connections as.
    """

    def __init__(
        self,
        worker: Worker,
        nodes: Sequence[BrokerAddress],
        queues: Queues,
        timeout: float,
        name: str,
    ) -> None:
        self.worker = worker
        self._nodes = Nodes(nodes)
        self._queues = queues
        self._timeout = timeout
        self._name = name
        self._tolerant = False  # whether a message that could not be decoded cut this worker off
        self._limited = False  # whether RabbitMQ let this user open no more channels

    async def run(self, stop: asyncio.Event) -> bool:
        """Serve until *stop* is set, or in a burst until the lanes are empty.

        Returns:
            Whether every message taken was done.

        Raises:
            AioworkerError: In a burst: RabbitMQ or the database cannot be used, or the
                task is paused.
        """
        worker, outage = self.worker, self.worker.recovery.broker
        while not stop.is_set():
            limited = self._limited
            try:
                async with self._session(stop) as session:
                    await session.run()
                    break
            except BrokerError as error:
                if self._limited and not limited:
                    continue  # with one channel
                if worker.burst:
                    raise
                worker.recovery.stall.end()
                worker.presence.report(worker.recovery.reason(outage, error))
                await worker.presence.keep_if_possible()
                seconds = outage.seconds(error)
                worker.recovery.progress(seconds)
                await first_of(seconds, stop)
        worker.recovery.due_by = math.inf
        return not worker.consumer.failures

    @asynccontextmanager
    async def _session(self, stop: asyncio.Event) -> AsyncIterator[Session]:
        """Connect to RabbitMQ."""
        nodes, timeout, name = self._nodes, self._timeout, self._name
        lost = asyncio.Event()

        def notice(_connection: object, error: BaseException | None) -> None:
            self._tolerant = self._tolerant or frames.undecodable(error)
            self._limited = self._limited or beyond_limit(error)
            lost.set()

        self.worker.recovery.progress()
        async with (
            connected(nodes, timeout, name, tolerant=self._tolerant) as connection,
            Publisher(nodes, timeout, name) as publisher,
        ):
            # Noticed also while waiting: aio-pika's `closed()` never tells.
            connection.close_callbacks.add(notice)
            several = not self._limited
            lanes = await OpenLanes.open(
                connection, publisher, self._queues, timeout, several=several
            )
            self.worker.recovery.broker.end()
            with lanes.explaining():
                yield Session(self.worker, lanes, stop, lost)
