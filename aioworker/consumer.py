"""A delivery's life: decode, ask what is needed, charge, run, settle.

The `supervisor` hands each one over in its turn; what it came to is counted here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aioworker import broker, outcome
from aioworker.crashes import MOST_DEATHS
from aioworker.errors import AioworkerError, BrokerError, CrashLoopError
from aioworker.logs import fields
from aioworker.message import decode
from aioworker.outcome import Kind, Outcome
from aioworker.presence import Presence
from aioworker.task import Context, Task
from aioworker.topology import RETRY_TTL_MS, Queues

if TYPE_CHECKING:
    from aio_pika.abc import AbstractIncomingMessage

    from aioworker.db import Database
    from aioworker.limits import Budget

log = logging.getLogger(__name__)

MOST_DOOMED = 3  # messages in a row that fail for good, before the task is doubted
CONFIGURATION_SECONDS = 60.0  # until the next message is tried then
ALARM_SECONDS = 30.0  # until the next, where RabbitMQ confirms nothing

_LEVELS = {Kind.ACK: logging.INFO, Kind.DEAD_LETTER: logging.ERROR}
_PHRASES = {Kind.ACK: "chunk done", Kind.DEAD_LETTER: "message refused"}


class _NotStartedError(AioworkerError):
    """The budget did not let the start begin: the message is given back, nothing failed."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What a delivery may take.

    Args:
        max_retries: Attempts after the first, before a message becomes a dead letter.
        task_timeout: Seconds a run may take.
        settle_timeout: Seconds for RabbitMQ to take each answer.
    """

    max_retries: int
    task_timeout: float
    settle_timeout: float


class Consumer:
    """Takes one task's deliveries through their lives.

    Args:
        task: The task.
        database: The database that its runs use.
        budget: Charged once for each run.
        presence: Told what runs.
        terms: What each may take.
        worker: This worker's name, in dead letters.

    Attributes:
        settled: How many deliveries came to each kind of outcome.
        starts: How many runs were begun.
        failures: How many deliveries were not done, but put off, refused or given back.
    """

    def __init__(
        self,
        task: Task,
        database: Database,
        budget: Budget,
        presence: Presence,
        terms: Terms,
        worker: str,
    ) -> None:
        self.settled: Counter[Kind] = Counter()
        self.starts = 0
        self.failures = 0
        self._task = task
        self._queues = Queues.of(task.name)
        self._database = database
        self._budget = budget
        self._presence = presence
        self._terms = terms
        self._worker = worker
        self._idle_since = time.monotonic()
        self._doomed: set[str] = set()  # messages in a row that failed for good
        self._began = 0.0  # when the run of the delivery in hand did

    async def serve(
        self, delivery: AbstractIncomingMessage, publisher: broker.Publisher
    ) -> Outcome:
        """Take a delivery as far as it goes, and settle it; return what it came to.

        Raises:
            BrokerError: It could not be settled: RabbitMQ will deliver it again.
        """
        key = outcome.key(delivery)
        result, values = await self._work(delivery, key)
        result = self._doubt(result, key)
        try:
            result = await self._settle(delivery, result, publisher)
        except BrokerError as error:
            log.warning("not settled", extra=fields(**values, reason=str(error)))
            raise
        finally:
            await self._budget.ended(key)
        self.settled[result.kind] += 1
        self.failures += result.failed
        if result.reason:
            values["reason"] = result.reason
        if result.kind is Kind.RETRY:
            values |= {"of": self._terms.max_retries + 1, "retry_seconds": RETRY_TTL_MS / 1000}
        phrase = _PHRASES.get(result.kind, "chunk failed")
        level = _LEVELS.get(result.kind, logging.WARNING)
        if result.kind is Kind.RELEASED and not result.failed:
            phrase, level = "chunk given back", logging.INFO
        log.log(level, phrase, extra=fields(**values, outcome=str(result.kind)))
        return result

    # 3 to 6. Decode, ask what is needed, charge and run.

    async def _work(
        self, delivery: AbstractIncomingMessage, key: str
    ) -> tuple[Outcome, dict[str, Any]]:
        """Take a delivery up to its end; whatever happens is its outcome.

        Returns:
            The outcome, and the fields of the line that tells of it.
        """
        taken = time.monotonic()
        self._began = 0.0
        name = self._task.name
        ctx = Context(self._database, name, outcome.message_id(delivery), outcome.attempt(delivery))
        ctx.counts.update(ids=0, changed=0, missing=0)
        try:
            self._refuse_killer(key)
            ids = decode(name, delivery.headers, delivery.content_type, delivery.body)
            ctx.counts["ids"] = len(ids)
            async with asyncio.timeout(self._terms.task_timeout):
                await self._run(ctx, ids, key)
        except _NotStartedError as error:
            result = Outcome(Kind.RELEASED, str(error))
        except Exception as error:  # noqa: BLE001 - whatever a task raises is an outcome
            result = outcome.judge(error)
            if result.kind is Kind.RETRY and ctx.attempt > self._terms.max_retries:
                reason = f"{result.reason}; attempt {ctx.attempt} of {self._terms.max_retries + 1}"
                result = Outcome(Kind.DEAD_LETTER, reason, error)
        else:
            result = Outcome(Kind.ACK)
        began, ended = self._began or taken, time.monotonic()
        values = {
            "task": name,
            "message_id": ctx.message_id,
            "lane": outcome.lane(delivery),
            "attempt": ctx.attempt,
            **ctx.counts,
            "wait_seconds": began - self._idle_since,
            "run_seconds": ended - began,
        }
        self._idle_since = ended
        return result, values

    def _refuse_killer(self, key: str) -> None:
        if self._budget.deaths(key) >= MOST_DEATHS:
            raise CrashLoopError(f"its worker died {MOST_DEATHS} times while it ran")

    async def _run(self, ctx: Context, ids: list[int], key: str) -> None:
        """Run the task for the ids that need it; what needs nothing is free of charge."""
        if self._budget.limited and self._task.reader is not None and ids:
            ids = await self._task.reader(ctx, ids)
        if not ids:
            return
        self._presence.tell("running", f"{self._task.name}, {len(ids)} ids", logging.DEBUG)
        await self._presence.keep()
        refusal = await self._budget.charge(key)
        if refusal is not None:
            raise _NotStartedError(refusal.reason)
        self.starts += 1
        self._began = time.monotonic()
        await self._task.function(ctx, ids)

    def _doubt(self, result: Outcome, key: str) -> Outcome:
        """Set no message aside when those before it failed for good too.

        It may be the task or the database: a bad deploy must not drain the queue into the
        dead letters. The message goes behind the others, and the next one is the test.
        """
        if result.kind is Kind.ACK and self._began:
            self._doomed.clear()
        if not result.doubtful:
            return result
        self._doomed.add(key)
        if len(self._doomed) < MOST_DOOMED:
            return result
        reason = f"configuration: {MOST_DOOMED} messages in a row failed for good: {result.reason}"
        return Outcome(
            Kind.RELEASED, reason, result.error, behind=True, pause=CONFIGURATION_SECONDS
        )

    # 7. Settle, once.

    async def _settle(
        self, delivery: AbstractIncomingMessage, result: Outcome, publisher: broker.Publisher
    ) -> Outcome:
        """Acknowledge, put off, set aside or give back; return which it was.

        A copy is confirmed before the original is acknowledged; one that is not confirmed
        leaves the original where it was.

        Raises:
            BrokerError: The connection is lost; RabbitMQ will deliver the message again.
        """
        copied = True
        try:
            if result.kind is Kind.DEAD_LETTER:
                letter = outcome.dead_letter(delivery, result, self._worker)
                await publisher.publish(self._queues.dead, letter)
            elif result.kind is Kind.RETRY or result.behind:
                await publisher.publish(self._queues.retry, outcome.retry(delivery, result))
            else:
                copied = result.kind is Kind.ACK
        except BrokerError as error:
            reason = f"copy not confirmed: {error}; it is to be copied because of: {result.reason}"
            pause = ALARM_SECONDS if error.unreachable else 0.0
            result = Outcome(Kind.RELEASED, reason, error, pause=pause)
            copied = False
        try:
            async with asyncio.timeout(self._terms.settle_timeout):
                if copied:
                    await delivery.ack()
                else:
                    await delivery.nack(requeue=True)
        except broker.FAILURES as error:
            raise broker.explain(error, self._queues.bulk) from error
        return result
