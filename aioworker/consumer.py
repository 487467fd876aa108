"""A delivery's life: decode, ask what is needed, charge, run, settle.

The `supervisor` hands each one over in its turn; what it came to is counted here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from aioworker import broker, outcome
from aioworker.console import count, duration
from aioworker.context import Context
from aioworker.crashes import MOST_DEATHS
from aioworker.errors import (
    AioworkerError,
    BrokerError,
    CrashLoopError,
    MessageRefusedError,
    UsageError,
    let_go,
)
from aioworker.gate import Gate
from aioworker.logs import fields
from aioworker.message import Call, decode
from aioworker.outcome import Kind, Outcome
from aioworker.presence import Presence
from aioworker.report import Report
from aioworker.task import AnyTask
from aioworker.topology import Queues

if TYPE_CHECKING:
    from aio_pika.abc import AbstractIncomingMessage

    from aioworker.db import Database
    from aioworker.limits import Budget

log = logging.getLogger(__name__)

SUSPECT_RETURNS = 2  # to its lane, and a message runs alone
MOST_NOTED = 1000  # messages whose returns are known
MOST_DOOMED = 3  # messages in a row that fail for good, before the task is doubted
MOST_ROUNDS = 3  # of one message behind the others, before it is set aside all the same
MOST_RETURNS = 20  # to its lane, before a message goes behind: RabbitMQ sets it aside at a hundred
CONFIGURATION_SECONDS = 60.0  # until the next message is tried then
ALARM_SECONDS = 30.0  # until the next, where RabbitMQ confirms nothing


class _NotStartedError(AioworkerError):
    """The budget did not let the start begin: the message is given back, nothing failed."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What a delivery may take.

    Args:
        max_retries: Attempts after the first, before a message becomes a dead letter.
        task_timeout: Seconds a run may take.
        settle_timeout: Seconds for RabbitMQ to take each answer.
        queue_prefix: What the names of its queues begin with.
    """

    max_retries: int
    task_timeout: float
    settle_timeout: float
    queue_prefix: str


@dataclass(slots=True)
class _Attempt:
    """What is known of a delivery while it lives.

    Args:
        key: What its message is known by.
        ctx: What its run gets.
        taken: When it was taken.
        began: When its run did; 0 before that.
    """

    key: str
    ctx: Context
    taken: float
    began: float = 0.0


class Consumer:
    """Takes one task's deliveries through their lives.

    Args:
        task: The task.
        database: The database that its runs use.
        budget: Charged once for each run.
        presence: Told what runs.
        terms: What each may take.
        worker: This worker's name, in dead letters.
        gate: Lets runs in; shared by all tasks of the process.

    Attributes:
        gate: The same.
        queues: The task's.
        settled: How many deliveries came to each kind of outcome.
        starts: How many runs were begun.
        failures: How many deliveries were not done, but put off, refused or given back.
    """

    def __init__(
        self,
        task: AnyTask,
        database: Database,
        budget: Budget,
        presence: Presence,
        terms: Terms,
        worker: str,
        gate: Gate,
    ) -> None:
        self.gate = gate
        self.settled: Counter[Kind] = Counter()
        self.starts = 0
        self.failures = 0
        self._task = task
        self.queues = Queues.of(task.name, terms.queue_prefix)
        self._database = database
        self._budget = budget
        self._presence = presence
        self._terms = terms
        self._worker = worker
        self._report = Report(terms.max_retries)
        self._doomed: set[str] = set()  # messages in a row that failed for good
        self._put_behind: Counter[str] = Counter()  # how often each went behind the others
        self._returned: Counter[str] = Counter()  # how often each was given back, the last ones

    @property
    def longest_run(self) -> float:
        """Seconds after which a run has not ended in time, twice what it may take."""
        return 2 * self._terms.task_timeout

    async def serve(
        self, delivery: AbstractIncomingMessage, publisher: broker.Publisher
    ) -> Outcome:
        """Take a delivery as far as it goes, and settle it; return what it came to.

        Raises:
            BrokerError: It could not be settled: RabbitMQ will deliver it again.
        """
        attempt = self._attempt(delivery)
        task, alone = self._task.name, self._runs_alone(delivery, attempt)
        if not self.gate.enter(task, alone=alone):
            reason = self.gate.closed_to(task) or "not now"
            result = await self._settle(delivery, Outcome(Kind.RELEASED, reason), publisher)
            self.settled[result.kind] += 1
            self._report.settled(result, self._told(delivery, attempt))
            return result
        try:
            return await self._serve(delivery, attempt, publisher)
        finally:
            self.gate.leave(task, alone=alone)

    def _runs_alone(self, delivery: AbstractIncomingMessage, attempt: _Attempt) -> bool:
        """Whether a message may have killed its worker: no other task is to run beside it."""
        return self._budget.deaths(attempt.key) > 0 or self.suspects(delivery)

    def suspects(self, delivery: AbstractIncomingMessage) -> bool:
        """Return whether a message may have killed its worker, by how often it came back.

        What this worker gave back itself is no sign of that.
        """
        returns = outcome.deliveries(delivery)
        if returns and outcome.counts_releases(delivery):
            returns -= self._returned[outcome.key(delivery)]
        return returns >= SUSPECT_RETURNS

    def note_return(self, delivery: AbstractIncomingMessage) -> None:
        """Note that this worker gave a message back."""
        key = outcome.key(delivery)
        self._returned[key] = self._returned.pop(key, 0) + 1
        while len(self._returned) > MOST_NOTED:
            del self._returned[next(iter(self._returned))]

    async def _serve(
        self, delivery: AbstractIncomingMessage, attempt: _Attempt, publisher: broker.Publisher
    ) -> Outcome:
        result = await self._work(delivery, attempt)
        values = self._told(delivery, attempt)
        result = self._doubt(result, attempt)
        failure = result.error
        try:
            result = await self._settle(delivery, result, publisher)
            self._report.settled(result, values, failure)
        except BrokerError as error:
            log.warning("not settled", extra=fields(**values, reason=str(error)))
            raise
        finally:
            let_go(failure)
            await self._budget.ended(attempt.key)
        self.settled[result.kind] += 1
        self.failures += result.failed
        return result

    def _attempt(self, delivery: AbstractIncomingMessage) -> _Attempt:
        ctx = Context(
            self._database,
            self._task.name,
            outcome.message_id(delivery),
            outcome.attempt(delivery),
        )
        if self._task.takes_chunks:
            ctx.counts["ids"] = 0
        return _Attempt(outcome.key(delivery), ctx, time.monotonic())

    def _told(self, delivery: AbstractIncomingMessage, attempt: _Attempt) -> dict[str, Any]:
        return self._report.values(delivery, attempt.ctx, attempt.taken, attempt.began)

    # 3 to 6. Decode, ask what is needed, charge and run.

    async def _work(self, delivery: AbstractIncomingMessage, attempt: _Attempt) -> Outcome:
        """Take a delivery up to its end; whatever happens is its outcome."""
        ctx = attempt.ctx
        try:
            self._refuse_killer(attempt.key)
            call = decode(
                ctx.task,
                delivery.headers,
                delivery.content_type,
                delivery.body,
                delivery.content_encoding,
            )
            args = self._arguments(call)
            if (late := call.late(self._budget.now())) >= 0:
                ctx.counts["expired"] = 1
                return Outcome(Kind.ACK, f"expired {duration(late)} ago, at {call.expires}")
            await self._run_in_time(attempt, args, call)
        except _NotStartedError as error:
            return Outcome(Kind.RELEASED, str(error))
        except Exception as error:  # noqa: BLE001 - whatever a task raises is an outcome
            return self._judge(error, ctx.attempt)
        return Outcome(Kind.ACK)

    def _judge(self, error: Exception, attempt: int) -> Outcome:
        """Return what a failed attempt comes to: after the last one, a dead letter."""
        result = outcome.judge(self._database.blamed(error))
        if result.kind is Kind.RETRY and attempt > self._terms.max_retries:
            reason = f"{result.reason}; attempt {attempt} of {self._terms.max_retries + 1}"
            return Outcome(Kind.DEAD_LETTER, reason, result.error)
        return result

    def _refuse_killer(self, key: str) -> None:
        if self._budget.deaths(key) >= MOST_DEATHS:
            raise CrashLoopError(f"its worker died {MOST_DEATHS} times while it ran")

    def _arguments(self, call: Call) -> list[Any]:
        try:
            return self._task.checked(call.args, call.kwargs)
        except UsageError as error:
            raise MessageRefusedError(str(error)) from error

    def _time_for(self, call: Call) -> float:
        """Return the seconds that a run may take: a thread cannot be hurried by its publisher."""
        if call.time_limit is None or not self._task.signature.coroutine:
            return self._terms.task_timeout
        return min(call.time_limit, self._terms.task_timeout)

    async def _run_in_time(self, attempt: _Attempt, args: list[Any], call: Call) -> None:
        """Run the task, and cut it off when its time is up.

        Raises:
            TimeoutError: It was; one without words is the task's own.
        """
        limit = asyncio.timeout(self._time_for(call))
        try:
            async with limit:
                await self._run(attempt, args, call.kwargs)
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise TimeoutError(
                f"the run took longer than {self._time_for(call):g} s and was cut off"
            ) from error

    async def _run(self, attempt: _Attempt, args: list[Any], kwargs: dict[str, Any]) -> None:
        """Run the task for what needs it; what needs nothing is free of charge."""
        ctx, doing = attempt.ctx, self._task.name
        if self._task.takes_chunks:
            ctx.counts["ids"] = len(args[0])
            if self._budget.limited and args[0]:
                args[0] = await self._task.read_needed(ctx, args[0])
            if not args[0]:
                return
            doing += f", {count(len(args[0]), 'id')}"
        if self._budget.limited:
            self._presence.tell("running", doing, logging.DEBUG)
            await self._presence.keep()
        refusal = await self._budget.charge(attempt.key)
        if refusal is not None:
            raise _NotStartedError(refusal.reason)
        self.starts += 1
        attempt.began = time.monotonic()
        await self._task.run(ctx, args, kwargs)

    def _doubt(self, result: Outcome, attempt: _Attempt) -> Outcome:
        """Set no message aside when those before it failed for good too.

        It may be the task or the database: a bad deploy must not drain the queue into the
        dead letters. The message goes behind the others, and the next one is the test.
        """
        if result.kind is Kind.ACK and attempt.began:
            self._doomed.clear()
            self._put_behind.clear()
        if not result.doubtful:
            return result
        self._doomed.add(attempt.key)
        self._put_behind[attempt.key] += len(self._doomed) >= MOST_DOOMED
        if len(self._doomed) < MOST_DOOMED or self._put_behind[attempt.key] > MOST_ROUNDS:
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
        copied, now = True, self._budget.now()
        if result.kind is Kind.RELEASED and outcome.deliveries(delivery) >= MOST_RETURNS:
            result = replace(result, behind=True)
        try:
            if result.kind is Kind.DEAD_LETTER:
                letter = outcome.dead_letter(delivery, result, self._worker, now)
                await publisher.publish(self.queues.dead, letter)
            elif result.kind is Kind.RETRY or result.behind:
                await publisher.publish(self.queues.retry, outcome.retry(delivery, result, now))
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
            raise broker.explain(error, self.queues.bulk) from error
        if copied:
            self._returned.pop(outcome.key(delivery), None)
        else:
            self.note_return(delivery)
        return result
