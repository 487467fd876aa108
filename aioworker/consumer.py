"""A delivery's life: decode, ask what is needed, charge, run, judge, settle.

The `supervisor` hands each one over in its turn; what it came to is counted here. Whatever
happens between a delivery and its settling is that delivery's outcome.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from aioworker.budget.deaths import MOST_DEATHS
from aioworker.errors import (
    AioworkerError,
    BrokerError,
    CrashLoopError,
    DatabaseError,
    MessageRefusedError,
    UsageError,
    let_go,
)
from aioworker.mysql import trouble
from aioworker.mysql.trouble import MySQLError
from aioworker.rabbitmq import copies
from aioworker.rabbitmq.delivery import Delivery
from aioworker.rabbitmq.lanes import Lanes
from aioworker.rabbitmq.message import Call, decode
from aioworker.rabbitmq.publisher import Publisher
from aioworker.rabbitmq.queues import Queues
from aioworker.reasons import Reason, ReasonKind
from aioworker.settling.breaker import STREAK, Breaker, Failed
from aioworker.settling.ends import Ends
from aioworker.settling.failure import Failure, Fault
from aioworker.settling.outcome import Kind, Outcome
from aioworker.settling.report import Report, Times
from aioworker.status.presence import Presence
from aioworker.tasks.context import Context
from aioworker.tasks.task import AnyTask
from aioworker.words import count, duration

if TYPE_CHECKING:
    from aioworker.limits import Budget
    from aioworker.mysql.database import Database

log = logging.getLogger(__name__)

MOST_RETURNS = 20  # to its lane, before a message goes behind: RabbitMQ sets it aside at a hundred
LEAST_LOST = 3  # attempts that lose their connection, before a message is set aside for that


class _NotStartedError(AioworkerError):
    """The budget did not let the start begin: the message is given back, nothing failed."""


class _CannotStartError(AioworkerError):
    """The database did not let the start begin: its cause says why."""

    def __init__(self, why: DatabaseError) -> None:
        super().__init__(str(why))
        self.why = why


@dataclass(frozen=True, slots=True)
class Link:
    """What belongs to one connection to RabbitMQ.

    Args:
        lanes: Where deliveries come from.
        publisher: What publishes their copies.
    """

    lanes: Lanes
    publisher: Publisher


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


@dataclass(frozen=True, slots=True)
class _Attempt:
    """What is known of a delivery while it lives.

    Args:
        key: What its message is known by.
        ctx: What its run gets.
        times: When it went how far.
    """

    key: str
    ctx: Context
    times: Times


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
        breaker: Whether the task works at all.
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
    ) -> None:
        self.breaker = Breaker()
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
        self._ends = Ends()
        self._serving = 0  # deliveries that are not settled
        self._running = 0  # those of them whose end is not known yet
        self._seeing = asyncio.Lock()
        self._seen_at = -math.inf  # when the last look at the database began
        self._seen_away: DatabaseError | None = None  # and what that look came to

    @property
    def longest_run(self) -> float:
        """Seconds after which a run has not ended in time, twice what it may take."""
        return 2 * self._terms.task_timeout

    async def serve(self, delivery: Delivery, link: Link) -> Outcome:
        """Take a delivery as far as it goes, and settle it; return what it came to.

        Raises:
            BrokerError: It could not be settled: RabbitMQ will deliver it again.
        """
        attempt, over = self._attempt(delivery), False
        ended = result = self._ends.take(delivery)
        self._serving += 1
        try:
            if result is None:
                result = await self._work(delivery, attempt, link.lanes)
                result = await self._settle(delivery, result, link.publisher)
            else:
                result = await self._acknowledge(delivery, result)
            over = result.kind is not Kind.RELEASED
            again = ended is not None
            self._report.settled(delivery, attempt.ctx, result, attempt.times, again=again)
        except BrokerError as error:
            self._report.unsettled(delivery, attempt.ctx, error, result, attempt.times)
            raise
        finally:
            self._serving -= 1
            # The deaths of one that did not even run are not forgotten.
            if over or attempt.times.began:
                await self._budget.ended(attempt.key)
        self.settled[result.kind] += 1
        self.failures += result.failed
        return result

    def _attempt(self, delivery: Delivery) -> _Attempt:
        ctx = Context(
            self._database,
            self._task.name,
            delivery.id,
            delivery.attempt,
        )
        if self._task.takes_chunks:
            ctx.counts["ids"] = 0
        return _Attempt(delivery.key, ctx, Times(time.monotonic()))

    # 3 to 6. Decode, ask what is needed, charge and run; judge what that came to.

    async def _work(self, delivery: Delivery, attempt: _Attempt, lanes: Lanes) -> Outcome:
        """Take a delivery up to its end; whatever happens is its outcome."""
        self._running += 1
        try:
            result = await self._try(delivery, attempt)
        finally:
            self._running -= 1
        if isinstance(result, Failure):
            return await self._judge(delivery, result, attempt, lanes)
        return result

    async def _try(self, delivery: Delivery, attempt: _Attempt) -> Outcome | Failure:
        """Try to do what a delivery asks for."""
        ctx = attempt.ctx
        try:
            self._refuse_killer(attempt.key)
            call = decode(
                ctx.task,
                delivery.message.headers,
                delivery.message.content_type,
                delivery.message.body,
                delivery.message.content_encoding,
            )
            args = self._arguments(call)
            if (late := call.late(self._budget.now())) >= 0:
                ctx.counts["expired"] = 1
                return Outcome(Kind.ACK, f"expired {duration(late)} ago, at {call.expires}")
            await self._run_in_time(attempt, args, call)
        except _NotStartedError as error:
            return Outcome(Kind.RELEASED, str(error))
        except _CannotStartError as error:
            return Outcome(Kind.RELEASED, str(error), away=error.why)
        except BaseException as error:
            running = asyncio.current_task()
            if running is not None and running.cancelling():
                raise  # the worker ends
            attempt.times.ended = time.monotonic()
            failure = Failure.of(error)
            if self._task.needs_database:
                lost = not self._database.is_open and not attempt.times.cut_off
                no_room = self._database.take_no_room()
                failure = replace(failure, lost=lost or failure.lost, no_room=no_room)
            self._database.end_run()
            if failure.error is None:
                let_go(error)
            return failure
        attempt.times.ended = time.monotonic()
        self._database.end_run()
        if self._task.needs_database:
            self._database.take_no_room()  # the task knew what to do
        if attempt.times.began:
            self.breaker.succeed(self._budget.now())
        return Outcome(Kind.ACK)

    async def _judge(
        self,
        delivery: Delivery,
        failure: Failure,
        attempt: _Attempt,
        lanes: Lanes,
    ) -> Outcome:
        """Return what a failed attempt comes to.

        A database that takes no write of ours is away, whatever the error was called: nothing
        counts. If it takes one, the failure is the message's: it counts as an attempt, and
        after the last one the message is a dead letter; unless it may be the task that fails.
        """
        if failure.fault is Fault.MESSAGE:
            return Outcome(Kind.DEAD_LETTER, failure.words, failure)
        try:
            await self.see_database()
            if failure.fault is Fault.EVERY_MESSAGE:
                await self.see_task()
        except DatabaseError as away:
            return Outcome(Kind.RELEASED, f"{failure.words}; {away}", failure, away)
        worked = self.breaker.has_succeeded_since(delivery.first_failed)
        if failure.no_room is not None and not worked:
            # Of the whole server, or of a table that this message alone fills: others may do.
            return Outcome(Kind.POSTPONED, failure.words, failure, failure.no_room)
        result = self._count(delivery, failure)
        failed = Failed(
            attempt.key,
            delivery.first_failed,
            attempt.ctx.attempt,
            attempt.times.taken,
            failure.words,
            last=result.kind is Kind.DEAD_LETTER,
            of_all=failure.fault is Fault.EVERY_MESSAGE,
        )
        if await self._is_spared(failed, lanes):
            return Outcome(Kind.POSTPONED, failure.words, failure)
        return result

    def _count(self, delivery: Delivery, failure: Failure) -> Outcome:
        """Return what a failure comes to that is the message's own."""
        attempt = delivery.attempt
        attempts = max(self._terms.max_retries + 1, attempt)
        if failure.lost:
            more = LEAST_LOST - 1 - delivery.losses
            attempts = max(attempts, attempt + more)
        if failure.fault is Fault.DATA:
            return Outcome(Kind.DEAD_LETTER, failure.words, failure)
        if attempt < attempts:
            return Outcome(Kind.RETRY, failure.words, failure, attempts=attempts)
        reason = f"{failure.words}; attempt {attempt} of {attempts}"
        return Outcome(Kind.DEAD_LETTER, reason, failure)

    async def _is_spared(self, failed: Failed, lanes: Lanes) -> bool:
        """Whether a failure may be the task's: it is not to cost the message an attempt."""
        was_open = bool(self.breaker.reason)
        if not self.breaker.fail(failed):
            return False
        if not await self._is_alone(lanes, everywhere=was_open):
            return True
        return failed.last and not self.breaker.may_set_aside(failed.message)

    async def _is_alone(self, lanes: Lanes, *, everywhere: bool) -> bool:
        """Whether no other message could show that the task works.

        Args:
            lanes: Where others may wait.
            everywhere: Whether those count that were put off: it may be the task, and they the
                rest of a round.
        """
        # One that has failed too shows nothing; of three the breaker opens, and decides.
        if self._running or self._serving >= STREAK:
            return False
        try:
            put_off = await lanes.count(self.queues.retry) if everywhere else 0
            return not put_off and not await lanes.hold_something()
        except BrokerError:
            return False

    async def see_database(self) -> None:
        """See that the protected database takes writes, by one of our own.

        Raises:
            DatabaseError: It does not.
        """
        if not (self._presence.keeps_row or self._task.needs_database):
            return
        asked = time.monotonic()
        # Of a task that uses no database several runs may fail at once: one look, begun after
        # the last of them failed, does for all.
        async with self._seeing:
            if self._seen_at < asked:
                began, away = time.monotonic(), None
                try:
                    await self._write_to_database()
                except DatabaseError as error:
                    away = error
                self._seen_at, self._seen_away = began, away
            if self._seen_away is not None:
                raise self._seen_away

    async def see_task(self) -> None:
        """See that the task can work at all, by its own check.

        Raises:
            DatabaseError: A table or a privilege is missing, or the server is away.
        """
        if self._task.check is not None:
            with self._database.explaining():
                await self._task.check(Context(self._database, self._task.name))

    async def _write_to_database(self) -> None:
        """Write over the run's own connection; over another one if that one takes nothing."""
        if self._task.needs_database and self._database.is_open:
            self._database.expect(None)  # ours is no write of the run
            try:
                await self._write_over(self._database)
            except Exception as error:
                if isinstance(error, MySQLError) and trouble.server_only_reads(error):
                    raise self._database.explain(error) from error
                self._database.close()
            else:
                return
        other = self._database.another()
        try:
            await self._write_over(other)
        except (MySQLError, TimeoutError) as error:
            raise other.explain(error) from error
        finally:
            other.close()

    async def _write_over(self, database: Database) -> None:
        async with asyncio.timeout(self._terms.settle_timeout):
            await self._presence.prove(database)

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
                await self._run(attempt, args, call.kwargs, limit)
        except TimeoutError as error:
            if not limit.expired():
                raise
            attempt.times.cut_off = True
            raise TimeoutError(
                f"the run took longer than {self._time_for(call):g} s and was cut off"
            ) from error

    async def _run(
        self, attempt: _Attempt, args: list[Any], kwargs: dict[str, Any], limit: asyncio.Timeout
    ) -> None:
        """Run the task for what needs it; what needs nothing is free of charge.

        A wait for its first write is no part of *limit*.
        """
        ctx, words = attempt.ctx, self._task.name
        if self._task.takes_chunks:
            ctx.counts["ids"] = len(args[0])
            if self._budget.limited and args[0]:
                args[0] = await self._task.read_needed(ctx, args[0])
            if not args[0]:
                return
            words += f", {count(len(args[0]), 'id')}"
        doing = Reason(ReasonKind.RUNNING, words)
        try:
            if self._budget.limited:
                self._presence.tell(doing)
                await self._presence.keep()
            refusal = await self._budget.charge(attempt.key)
        except DatabaseError as error:
            raise _CannotStartError(error) from error
        if refusal is not None:
            raise _NotStartedError(str(refusal.reason))
        self.starts += 1
        attempt.times.began = time.monotonic()

        def tell(wait: Reason | None) -> None:
            self._presence.tell(wait or doing)

        with self._database.bounded(limit, tell):
            await self._task.run(ctx, args, kwargs)

    # 7. Settle, once.

    async def _settle(self, delivery: Delivery, result: Outcome, publisher: Publisher) -> Outcome:
        """Acknowledge, put off, set aside or give back; return which it was.

        A copy is confirmed before the original is acknowledged; one that is not confirmed
        leaves the original where it was.

        Raises:
            BrokerError: The connection is lost; RabbitMQ will deliver the message again.
        """
        if result.kind is Kind.RELEASED and delivery.returns >= MOST_RETURNS:
            result = replace(result, kind=Kind.POSTPONED)
        try:
            await self._copy(delivery, result, publisher)
        except BrokerError as error:
            reason = f"copy not confirmed: {error}; it is to be copied because of: {result.reason}"
            result = Outcome(Kind.RELEASED, reason, result.failure, error)
        if result.kind is not Kind.RELEASED:
            return await self._acknowledge(delivery, result)
        await delivery.give_back()
        return result

    async def _copy(self, delivery: Delivery, result: Outcome, publisher: Publisher) -> None:
        """Publish the copy that an outcome asks for."""
        now, failure = self._budget.now(), result.failure
        if result.kind is Kind.DEAD_LETTER:
            name, traceback = ("", "") if failure is None else (failure.name, failure.traceback)
            letter = copies.dead_letter(delivery, result.reason, name, traceback, self._worker, now)
            await publisher.publish(self.queues.dead, letter)
        elif result.kind in (Kind.RETRY, Kind.POSTPONED):
            again = copies.retry(
                delivery,
                result.reason,
                now if result.failed else None,
                counts=result.kind is Kind.RETRY,
                lost=failure is not None and failure.lost,
            )
            await publisher.publish(self.queues.retry, again)

    async def _acknowledge(self, delivery: Delivery, result: Outcome) -> Outcome:
        """Acknowledge what has ended; if that fails, its end is remembered."""
        try:
            await delivery.acknowledge()
        except BrokerError:
            self._ends.remember(delivery, result)
            raise
        return result
