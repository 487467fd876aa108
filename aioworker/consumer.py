"""The life of a delivery: recall, refuse, decode, need, charge, run, judge, settle, report.

`worker/session.py` hands over each delivery in its turn. Every step takes the same value,
`Start`, and returns it; the first one that knows the outcome ends the way to the run. Whatever
happens between a delivery and its settling is that delivery's outcome.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from aioworker.budget.deaths import MOST_DEATHS
from aioworker.errors import (
    BrokerError,
    CrashLoopError,
    DatabaseError,
    MessageRefusedError,
    UsageError,
    let_go,
)
from aioworker.rabbitmq import copies
from aioworker.rabbitmq.message import decode
from aioworker.reasons import Reason, ReasonKind
from aioworker.settling.breaker import STREAK, Breaker, Failed
from aioworker.settling.ended_runs import EndedRuns
from aioworker.settling.failure import Failure, Fault
from aioworker.settling.outcome import UNDECIDED, Kind, Outcome
from aioworker.settling.report import Report
from aioworker.settling.start import Start
from aioworker.tasks.context import Context
from aioworker.words import count, duration

if TYPE_CHECKING:
    from aioworker.limits import Budget
    from aioworker.mysql.database import Database
    from aioworker.rabbitmq.delivery import Delivery
    from aioworker.rabbitmq.lanes import Lanes
    from aioworker.settling.probe import Probe
    from aioworker.status.presence import Presence
    from aioworker.tasks.task import AnyTask

MOST_RETURNS = 20  # to its lane, before a message goes behind: RabbitMQ sets it aside at a hundred
LEAST_LOST = 3  # attempts that lose their connection, before a message is set aside for that


class Consumer:
    """Takes one task's deliveries through their lives.

    Args:
        task: The task.
        database: The database that its runs use.
        budget: Charged once for each run.
        presence: Reports what runs.
        probe: Asks whether the database and the task work.
        max_retries: Attempts after the first, before a message becomes a dead letter.
        task_timeout: Seconds a run may take.
        worker: This worker's name, in dead letters.

    Attributes:
        breaker: Whether the task works at all.
        settled: How many deliveries came to each kind of outcome.
        starts: How many runs were begun.
        failures: How many deliveries were not done since something went wrong: a burst exits 1
            for them.
        under_way: The deliveries that are not settled. One that something else cut short, as
            no code of ours does but at the end, stays among them.
    """

    def __init__(  # noqa: PLR0913 - built at one place
        self,
        task: AnyTask,
        database: Database,
        budget: Budget,
        presence: Presence,
        probe: Probe,
        *,
        max_retries: int,
        task_timeout: float,
        worker: str,
    ) -> None:
        self.breaker = Breaker()
        self.settled: Counter[Kind] = Counter()
        self.starts = 0
        self.failures = 0
        self.under_way: list[Start] = []
        self._task = task
        self._database = database
        self._budget = budget
        self._presence = presence
        self._probe = probe
        self._max_retries = max_retries
        self._task_timeout = task_timeout
        self._worker = worker
        self._report = Report(max_retries, budget.now)
        self._ends = EndedRuns()

    async def serve(self, delivery: Delivery, lanes: Lanes) -> Outcome:
        """Take a delivery as far as it goes, and settle it; return what it came to.

        Args:
            delivery: The delivery.
            lanes: Where it came from, and where a copy of it goes.

        Raises:
            BrokerError: It could not be settled: RabbitMQ will deliver it again.
        """
        ctx = Context(self._database, self._task.name, delivery.id, delivery.attempt)
        start = Start(delivery, ctx)
        if self._task.takes_chunks:
            ctx.counts["ids"] = 0
        self.under_way.append(start)
        try:
            async with start.limit:
                for step in (
                    self._recall,
                    self._refuse,
                    self._decode,
                    self._need,
                    self._charge,
                    self._run,
                ):
                    if start.outcome is UNDECIDED:
                        start = await step(start)
        except BaseException as error:
            if _is_cancelled():
                raise  # the worker ends: that is no failure of the run
            start = self._fail(start, error)
        start = self._finish(start)
        start = await self._judge(start, lanes)
        return await self._settle(start, lanes)

    # The way to the run.

    async def _recall(self, start: Start) -> Start:
        """A run that ended before, and could not be acknowledged then, is not run again."""
        ended = self._ends.take(start.delivery)
        if ended is not None:
            start.outcome, start.again = ended, True
        return start

    async def _refuse(self, start: Start) -> Start:
        """A message that kills its worker is set aside before its body is touched."""
        if self._budget.deaths(start.delivery.key) >= MOST_DEATHS:
            raise CrashLoopError(f"its worker died {MOST_DEATHS} times while it ran")
        return start

    async def _decode(self, start: Start) -> Start:
        """Read the message whole, or refuse it whole; one that has expired is done, unrun."""
        message = start.delivery.message
        call = decode(
            self._task.name,
            message.headers,
            message.content_type,
            message.body,
            message.content_encoding,
        )
        try:
            start.args, start.kwargs = self._task.checked(call.args, call.kwargs)
        except UsageError as error:
            raise MessageRefusedError(str(error)) from error
        if (late := call.late(self._budget.now())) >= 0:
            start.ctx.counts["expired"] = 1
            start.outcome = Outcome(Kind.ACK, f"expired {duration(late)} ago, at {call.expires}")
        seconds = self._task_timeout
        if call.time_limit is not None and self._task.signature.coroutine:
            seconds = min(call.time_limit, seconds)  # a thread cannot be hurried by its publisher
        start.may_take(seconds)
        return start

    async def _need(self, start: Start) -> Start:
        """Keep what of a chunk needs writing; if nothing does, it is done, free of charge."""
        if self._task.takes_chunks:
            start.ctx.counts["ids"] = len(start.args[0])
            # Without a rate there is nothing to save: the run finds out itself.
            if self._budget.limited and start.args[0]:
                start.args[0] = await self._task.read_needed(start.ctx, start.args[0])
            if not start.args[0]:
                start.outcome = Outcome(Kind.ACK)
        return start

    async def _charge(self, start: Start) -> Start:
        """Begin the start, as the budget has it; if it cannot begin, the message goes back."""
        try:
            if self._budget.limited:
                self._presence.report(self._doing(start))
                await self._presence.keep()
            refusal = await self._budget.charge([start.delivery.key])
        except DatabaseError as error:
            start.outcome = Outcome(Kind.RELEASED, str(error), away=error)
        else:
            if refusal is not None:
                start.outcome = Outcome(Kind.RELEASED, str(refusal.reason))
        return start

    async def _run(self, start: Start) -> Start:
        """Run the task, until it ends or its time is up.

        A wait for its first write is no part of that time.
        """
        doing = self._doing(start)

        def report(wait: Reason | None) -> None:
            self._presence.report(wait or doing)

        self.starts += 1
        start.began = time.monotonic()
        with self._database.bounded(start.limit, report):
            await self._task.run(start.ctx, start.args, start.kwargs)
        start.outcome = Outcome(Kind.ACK)
        return start

    def _doing(self, start: Start) -> Reason:
        ids = f", {count(len(start.args[0]), 'id')}" if self._task.takes_chunks else ""
        return Reason(ReasonKind.RUNNING, f"{self._task.name}{ids}")

    # What it came to.

    def _fail(self, start: Start, error: BaseException) -> Start:
        """Note what went wrong, in plain values."""
        # By its type: what a user's class says of itself may be code that raises.
        if start.limit.expired() and issubclass(type(error), TimeoutError):
            start.cut_off = True
            words = f"the run took longer than {start.seconds:g} s and was cut off"
            error = _caused(TimeoutError(words), error)
        start.failure = Failure.of(error)
        if start.failure.error is None:
            let_go(error)
        return start

    def _finish(self, start: Start) -> Start:
        """See what the run left behind."""
        start.ended = time.monotonic()
        if self._task.needs_database:
            is_lost = not self._database.is_open and not start.cut_off
            no_room = self._database.take_no_room()
            if start.failure is not None:
                lost = is_lost or start.failure.lost
                start.failure = replace(start.failure, lost=lost, no_room=no_room)
        self._database.end_run()
        return start

    async def _judge(self, start: Start, lanes: Lanes) -> Start:
        """Decide what a failed attempt comes to; one that ended well shows that the task works.

        A database that takes no write of ours is away, whatever the error was called: nothing
        counts. If it takes one, the failure is the message's: it counts as an attempt, and
        after the last one the message is a dead letter; unless it may be the task that fails.
        """
        if (failure := start.failure) is None:
            if start.began:
                self.breaker.succeed(self._budget.now())
            return start
        if failure.fault is Fault.MESSAGE:
            start.outcome = Outcome(Kind.DEAD_LETTER, failure.words, failure)
            return start
        try:
            await self._probe.check_database()
            if failure.fault is Fault.EVERY_MESSAGE:
                await self._probe.check_task()
        except DatabaseError as away:
            start.outcome = Outcome(Kind.RELEASED, f"{failure.words}; {away}", failure, away)
            return start
        worked = self.breaker.has_succeeded_since(start.delivery.first_failed)
        if failure.no_room is not None and not worked:
            # Of the whole server, or of a table that this message alone fills: others may do.
            start.outcome = Outcome(Kind.POSTPONED, failure.words, failure, failure.no_room)
            return start
        outcome = self._count(start.delivery, failure)
        if await self._may_be_the_tasks(start, failure, outcome, lanes):
            outcome = Outcome(Kind.POSTPONED, failure.words, failure)
        start.outcome = outcome
        return start

    def _count(self, delivery: Delivery, failure: Failure) -> Outcome:
        """Return what a failure comes to that is the message's own."""
        attempt = delivery.attempt
        attempts = max(self._max_retries + 1, attempt)
        if failure.lost:
            # Its connection may have been ended by anything: that alone is no reason so soon.
            attempts = max(attempts, attempt + LEAST_LOST - 1 - delivery.losses)
        if failure.fault is Fault.DATA:
            return Outcome(Kind.DEAD_LETTER, failure.words, failure)
        if attempt < attempts:
            return Outcome(Kind.RETRY, failure.words, failure, attempts=attempts)
        reason = f"{failure.words}; attempt {attempt} of {attempts}"
        return Outcome(Kind.DEAD_LETTER, reason, failure)

    async def _may_be_the_tasks(
        self, start: Start, failure: Failure, outcome: Outcome, lanes: Lanes
    ) -> bool:
        """Whether a failure may be the task's: it is not to cost the message an attempt."""
        delivery, was_open = start.delivery, bool(self.breaker.reason)
        failed = Failed(
            delivery.key,
            delivery.first_failed,
            delivery.attempt,
            start.taken,
            failure.words,
            last=outcome.kind is Kind.DEAD_LETTER,
            of_all=failure.fault is Fault.EVERY_MESSAGE,
        )
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
        if len(self.under_way) >= STREAK or not all(start.ended for start in self.under_way):
            return False
        try:
            put_off = await lanes.count_put_off() if everywhere else 0
            return not put_off and not await lanes.hold_something()
        except BrokerError:
            return False

    # Settle, once, and report.

    async def _settle(self, start: Start, lanes: Lanes) -> Outcome:
        """Acknowledge, put off, set aside or give back; return what it came to.

        Raises:
            BrokerError: The connection is lost; RabbitMQ will deliver the message again.
        """
        over = False
        try:
            start = await self._copy(start, lanes)
            await self._answer(start)
            over = start.outcome.kind is not Kind.RELEASED
        except BrokerError as error:
            self._report.unsettled(start, error)
            self.under_way.remove(start)
            raise
        finally:
            # The deaths of one that did not even run are not forgotten before it is settled.
            if start.began or over:
                await self._budget.ended([start.delivery.key])
        self._report.settled(start)
        let_go(start.outcome.away)  # its frames hold the message
        self.under_way.remove(start)
        self.settled[start.outcome.kind] += 1
        self.failures += start.outcome.failed
        return start.outcome

    async def _copy(self, start: Start, lanes: Lanes) -> Start:
        """Publish the copy that an outcome asks for, and wait until it is confirmed.

        If it is not, the original stays where it was.
        """
        delivery, outcome = start.delivery, start.outcome
        if start.again:
            return start  # it was confirmed then
        if outcome.kind is Kind.RELEASED and delivery.returns >= MOST_RETURNS:
            outcome = start.outcome = replace(outcome, kind=Kind.POSTPONED)
        now, failure = self._budget.now(), outcome.failure
        try:
            if outcome.kind is Kind.DEAD_LETTER:
                name, lines = ("", "") if failure is None else (failure.name, failure.traceback)
                await lanes.set_aside(
                    copies.dead_letter(delivery, outcome.reason, name, lines, self._worker, now)
                )
            elif outcome.kind in (Kind.RETRY, Kind.POSTPONED):
                await lanes.put_off(
                    copies.retry(
                        delivery,
                        outcome.reason,
                        now if outcome.failed else None,
                        counts=outcome.kind is Kind.RETRY,
                        lost=failure is not None and failure.lost,
                    )
                )
        except BrokerError as error:
            reason = f"copy not confirmed: {error}; it is to be copied because of: {outcome.reason}"
            start.outcome = Outcome(Kind.RELEASED, reason, failure, error)
        return start

    async def _answer(self, start: Start) -> None:
        """Give the message back, or acknowledge it; if that fails, its end is remembered."""
        if start.outcome.kind is Kind.RELEASED:
            await start.delivery.give_back()
            return
        try:
            await start.delivery.acknowledge()
        except BrokerError:
            self._ends.remember(start.delivery, start.outcome)
            raise


def _is_cancelled() -> bool:
    running = asyncio.current_task()
    return running is not None and running.cancelling() > 0


def _caused(error: BaseException, cause: BaseException) -> BaseException:
    """Return an error that was not raised, with what it comes from."""
    error.__cause__ = cause
    return error
