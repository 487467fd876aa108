"""A delivery's life: budget, take, decode, needed, charge and run, settle.

The consumer holds nothing while it waits. It looks at its rate limit first and takes a
message only when a start is due, runs it, and settles it once. RabbitMQ keeps the rest.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from aioworker import broker, outcome, topology
from aioworker.errors import AioworkerError, BrokerError, DatabaseError
from aioworker.limits import Limiter, RateLimit
from aioworker.logs import fields
from aioworker.message import decode
from aioworker.outcome import Kind, Outcome
from aioworker.task import Context, Task

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aio_pika.abc import AbstractConnection, AbstractIncomingMessage

    from aioworker.addresses import BrokerAddress
    from aioworker.db import Database

log = logging.getLogger(__name__)

IDLE_SECONDS = 0.9  # between looks at empty lanes: a message is noticed within a second
FIRST_BACKOFF_SECONDS = 0.5
LONGEST_BROKER_BACKOFF_SECONDS = 30.0
LONGEST_DATABASE_BACKOFF_SECONDS = 60.0
_LEVELS = {Kind.ACK: logging.INFO, Kind.DEAD_LETTER: logging.ERROR, Kind.RELEASED: logging.WARNING}
_PHRASES = {
    Kind.ACK: "chunk done",
    Kind.DEAD_LETTER: "message refused",
    Kind.RELEASED: "chunk failed",
}


@dataclass(frozen=True, slots=True)
class Options:
    """How a consumer works.

    Args:
        addresses: The nodes of the RabbitMQ cluster.
        rate_limit: How often the task may start; None is no limit.
        burst: End once the lanes are empty, or at the first failure.
        task_timeout: Seconds a run may take.
        connect_timeout: Seconds for each step with RabbitMQ.
        worker: This worker's name, in connections and dead letters.
    """

    addresses: Sequence[BrokerAddress]
    rate_limit: RateLimit | None
    burst: bool
    task_timeout: float
    connect_timeout: float
    worker: str


class Consumer:
    """Runs one task's messages until told to stop.

    Args:
        task: The task.
        database: The database that its runs use.
        options: How it works.
        say: Called with what the worker does or waits for, whenever that changes.

    Attributes:
        settled: How many deliveries came to each kind of outcome.
        starts: How many runs were charged, or started where there is no limit.
    """

    def __init__(
        self, task: Task, database: Database, options: Options, say: Callable[[str], None]
    ) -> None:
        self.settled: Counter[Kind] = Counter()
        self.starts = 0
        self._task = task
        self._queues = topology.Queues.of(task.name)
        self._database = database
        self._options = options
        self._say = say
        self._limiter = Limiter(options.rate_limit) if options.rate_limit else None
        self._said = ""
        self._idle_since = time.monotonic()
        self._trusted = False  # whether the task could read and write since the last failure
        self._failures = 0
        self._took = False  # whether the last look into the lanes found a message
        self._stop = asyncio.Event()
        self._lost = asyncio.Event()

    async def run(self, stop: asyncio.Event) -> bool:
        """Serve until *stop* is set, or in a burst until the lanes are empty.

        Returns:
            Whether every message taken was done.

        Raises:
            AioworkerError: In a burst: RabbitMQ or the database cannot be used, or the
                task is paused.
        """
        self._stop = stop
        failures = 0
        while not stop.is_set():
            began = time.monotonic()
            try:
                await self._connect_and_serve()
                break
            except BrokerError as error:
                if self._options.burst:
                    raise
                # One that stood for a while has healed: begin with short waits again.
                healed = time.monotonic() - began > LONGEST_BROKER_BACKOFF_SECONDS
                failures = 1 if healed else failures + 1
                await self._back_off(str(error), failures, LONGEST_BROKER_BACKOFF_SECONDS)
        return not (self.settled[Kind.DEAD_LETTER] or self.settled[Kind.RELEASED])

    async def _connect_and_serve(self) -> None:
        """Connect to RabbitMQ and serve; ends at a stop or with the first broken step."""
        options = self._options
        name = f"{options.worker} {self._task.name}"
        async with (
            broker.connection(options.addresses, options.connect_timeout, name) as connection,
            broker.Publisher(options.addresses, options.connect_timeout, name) as publisher,
        ):
            self._watch(connection)
            lanes = await topology.Lanes.open(connection, self._queues, options.connect_timeout)
            await self._wait_for_database()
            while await self._serve_one(lanes, publisher):
                pass

    def _watch(self, connection: AbstractConnection) -> None:
        """Notice a lost connection also while waiting: aio-pika's `closed()` never tells."""
        self._lost = lost = asyncio.Event()
        connection.close_callbacks.add(lambda *_: lost.set())

    async def _serve_one(self, lanes: topology.Lanes, publisher: broker.Publisher) -> bool:
        """Take one message through its life; return whether to go on."""
        await self._wait_while_paused()
        if self._stop.is_set():
            return False
        # Without a limit a message just taken is the sign that there are more.
        if not (self._took and self._limiter is None) and not await lanes.hold_something():
            if self._options.burst:
                return False
            await self._wait("nothing queued", IDLE_SECONDS)
            return not self._stop.is_set()
        await self._wait_for_budget()
        await self._wait_for_database()
        if self._stop.is_set():
            return False
        delivery = await lanes.take()
        self._took = delivery is not None
        if delivery is None:
            return True
        result, values = await self._work(delivery)
        try:
            kind = await self._settle(delivery, result, publisher)
        except BrokerError as error:
            log.warning("not settled", extra=fields(**values, reason=str(error)))
            raise
        if result.reason:
            values["reason"] = result.reason
        log.log(_LEVELS[kind], _PHRASES[kind], extra=fields(**values, outcome=str(kind)))
        if kind is Kind.RELEASED:
            self._trusted = False
            self._failures += 1
            await self._back_off(result.reason, self._failures, LONGEST_DATABASE_BACKOFF_SECONDS)
            return not self._options.burst
        self._failures = 0
        return True

    # 1. Wait for messages, for the budget and the database; nothing is held meanwhile.

    async def _wait_while_paused(self) -> None:
        """Return when the rate starts anything at all, or at a stop."""
        while self._limiter is not None and self._limiter.rate.paused and not self._stop.is_set():
            reason = f"paused: rate limit {self._limiter.rate}"
            if self._options.burst:
                raise AioworkerError(reason)
            await self._wait(reason, None)

    async def _wait_for_budget(self) -> None:
        """Return when a start is due, or at a stop."""
        while self._limiter is not None and not self._stop.is_set():
            seconds = self._limiter.due_in()
            if not seconds:
                return
            moment = datetime.now(UTC) + timedelta(seconds=seconds)
            await self._wait(f"budget: next start at {moment:%H:%M:%S} UTC", seconds)

    async def _wait_for_database(self) -> None:
        """Return when the database answers, or at a stop: nothing is taken while it does not."""
        failures = 0
        while not self._stop.is_set():
            try:
                await self._database.ready()
                if not self._trusted:
                    await self._look_at_tables()
            except DatabaseError as error:
                if self._options.burst:
                    raise
                failures += 1
                self._trusted = False
                await self._back_off(str(error), failures, LONGEST_DATABASE_BACKOFF_SECONDS)
            else:
                return

    async def _look_at_tables(self) -> None:
        """See that the task can read and write, before a message is taken for it."""
        with self._database.explaining():
            await self._task.function(Context(self._database, self._task.name), [])
        self._trusted = True

    # 2. Take: `topology.Lanes.take`, from the urgent lane first.

    # 3 to 6. Decode, ask what is needed, charge and run.

    async def _work(self, delivery: AbstractIncomingMessage) -> tuple[Outcome, dict[str, Any]]:
        """Take a delivery as far as it goes; whatever happens is its outcome.

        Returns:
            The outcome, and the fields of the line that tells of it.
        """
        taken = time.monotonic()
        name = self._task.name
        ctx = Context(self._database, name, outcome.message_id(delivery), outcome.attempt(delivery))
        ctx.counts.update(ids=0, changed=0, missing=0)
        try:
            ids = decode(name, delivery.headers, delivery.content_type, delivery.body)
            ctx.counts["ids"] = len(ids)
            async with asyncio.timeout(self._options.task_timeout):
                await self._run(ctx, ids)
        except Exception as error:  # noqa: BLE001 - whatever a task raises is an outcome
            result = outcome.judge(error)
        else:
            result = Outcome(Kind.ACK)
        ended = time.monotonic()
        values = {
            "task": name,
            "message_id": ctx.message_id,
            "lane": outcome.lane(delivery),
            "attempt": ctx.attempt,
            **ctx.counts,
            "wait_seconds": taken - self._idle_since,
            "run_seconds": ended - taken,
        }
        self._idle_since = ended
        return result, values

    async def _run(self, ctx: Context, ids: list[int]) -> None:
        """Run the task for the ids that need it; what needs nothing is free of charge."""
        if self._limiter is not None and self._task.reader is not None and ids:
            ids = await self._task.reader(ctx, ids)
        if not ids:
            return
        if self._limiter is not None:
            await self._limiter.charge()
        self._announce("running", f"{self._task.name}, {len(ids)} ids", logging.DEBUG)
        self.starts += 1
        await self._task.function(ctx, ids)

    # 7. Settle, once.

    async def _settle(
        self, delivery: AbstractIncomingMessage, result: Outcome, publisher: broker.Publisher
    ) -> Kind:
        """Acknowledge, set aside or give back; return which it was.

        Raises:
            BrokerError: The connection is lost; RabbitMQ will deliver the message again.
        """
        kind = result.kind
        if kind is Kind.DEAD_LETTER:
            letter = outcome.dead_letter(delivery, result, self._options.worker)
            try:
                await publisher.publish(self._queues.dead, letter)
            except BrokerError as error:
                log.warning("dead letter not confirmed", extra=fields(error=str(error)))
                kind = Kind.RELEASED
        try:
            async with asyncio.timeout(self._options.connect_timeout):
                if kind is Kind.RELEASED:
                    await delivery.nack(requeue=True)
                else:
                    await delivery.ack()
        except broker.FAILURES as error:
            raise broker.explain(error, self._queues.bulk) from error
        self.settled[kind] += 1
        return kind

    # What the worker does and waits for is said in one place.

    async def _wait(self, reason: str, seconds: float | None) -> None:
        """Wait, saying why; a stop or a lost connection ends it early.

        Raises:
            BrokerError: The connection to RabbitMQ was lost.
        """
        self._announce("waiting", reason, logging.INFO)
        await _first_of(seconds, self._stop, self._lost)
        if self._lost.is_set() and not self._stop.is_set():
            raise BrokerError("connection to RabbitMQ lost")

    async def _back_off(self, reason: str, failures: int, longest: float) -> None:
        """Wait after a failure: longer each time, at random so that workers come apart."""
        if self._options.burst:
            return
        self._announce("waiting", reason, logging.WARNING)
        await _first_of(
            random.uniform(0.1, min(longest, FIRST_BACKOFF_SECONDS * 2.0 ** min(failures, 10))),
            self._stop,
        )

    def _announce(self, state: str, reason: str, level: int) -> None:
        """Say and log what the worker does, once for each change."""
        if reason != self._said:
            self._said = reason
            self._say(f"{state}: {reason}")
            log.log(level, state, extra=fields(task=self._task.name, reason=reason))


async def _first_of(seconds: float | None, *events: asyncio.Event) -> None:
    """Return when one of *events* is set, or after *seconds*."""
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
