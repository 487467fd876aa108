"""The life of a start: recall, refuse, move, decode, need, charge, run, judge, settle, report.

`worker/session.py` hands over the messages of a start in its turn. Each is read as it comes; what
needs nothing is settled at once. The others run together: one charge, one run, and then each is
settled by itself. Whatever happens between a delivery and its settling is its outcome.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from aioworker.budget.deaths import MOST_DEATHS
from aioworker.errors import (
    BrokerError,
    CrashLoopError,
    DatabaseError,
    MessageRefusedError,
    RowsRefusedError,
    UsageError,
    let_go,
)
from aioworker.rabbitmq.delivery import SUSPECT_RETURNS
from aioworker.rabbitmq.message import decode
from aioworker.reasons import Reason, ReasonKind
from aioworker.settling.breaker import STREAK, Breaker, Failed
from aioworker.settling.ended_runs import EndedRuns
from aioworker.settling.failure import Failure, Fault
from aioworker.settling.outcome import DONE, UNDECIDED, Kind, Outcome
from aioworker.settling.report import Report, counted
from aioworker.settling.rows import Ids, Rows
from aioworker.settling.settler import MOST_RETURNS, Settler
from aioworker.settling.start import MOST_MESSAGES, Held, Start
from aioworker.settling.taken import Taken
from aioworker.tasks.chunk import CHUNK_LIMIT
from aioworker.tasks.context import Context
from aioworker.words import count, duration

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from aioworker.limits import TaskBudget
    from aioworker.mysql.database import Database
    from aioworker.rabbitmq.delivery import Delivery
    from aioworker.rabbitmq.lanes import Lanes
    from aioworker.settling.probe import Probe
    from aioworker.status.presence import Presence
    from aioworker.tasks.task import AnyTask

_UNBOUNDED = nullcontext[None]()
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
        chunk_size: Ids that need a write, before a start takes no more messages.
        worker: This worker's name, in dead letters.

    Attributes:
        breaker: Whether the task works at all.
        starts: How many runs were begun.
        under_way: The starts whose messages are not settled. One that something else cut short, as
            no code of ours does but at the end, stays among them.
        taken: How far the lanes are emptied.
        holds_another: Returns whether this worker holds a message beside those of its starts.
    """

    def __init__(  # noqa: PLR0913 - built at one place
        self,
        task: AnyTask,
        database: Database,
        budget: TaskBudget,
        presence: Presence,
        probe: Probe,
        *,
        max_retries: int,
        task_timeout: float,
        chunk_size: int = CHUNK_LIMIT,
        worker: str,
    ) -> None:
        self.breaker = Breaker()
        self.starts = 0
        self.under_way: list[Start] = []
        self.holds_another: Callable[[], bool] = bool
        self._task = task
        self._database = database
        self._budget = budget
        self._presence = presence
        self._probe = probe
        self._max_retries = max_retries
        self._task_timeout = task_timeout
        self._chunk_size = chunk_size
        self._ends = EndedRuns()
        report = Report(max_retries, budget.now, task.name)
        self.taken = Taken(self.under_way)
        presence.waiting = self.taken.tell
        self._settler = Settler(budget, report, self._ends, worker, self.taken)

    @property
    def settled(self) -> Counter[Kind]:
        """How many deliveries came to each kind of outcome."""
        return self._settler.settled

    @property
    def failures(self) -> int:
        """How many deliveries were not done since something went wrong: a burst exits 1."""
        return self._settler.failures

    async def serve(self, delivery: Delivery, lanes: Lanes) -> Outcome:
        """Take a delivery as far as it goes, alone, and settle it; return what it came to.

        Args:
            delivery: The delivery.
            lanes: Where it came from, and where a copy of it goes.

        Raises:
            BrokerError: It could not be settled: RabbitMQ will deliver it again.
        """
        with self.starting() as start:
            outcome = await self.open(start, delivery, lanes)
            if start.held:
                outcome = await self.need(start, start.held, lanes)
            if start.held:
                outcome = await self.run(start, lanes)
        return outcome or UNDECIDED

    @contextmanager
    def starting(self, most: int = 1) -> Iterator[Start]:
        """Yield a start that holds nothing yet; inside, it is under way.

        Args:
            most: How many messages it may hold.
        """
        rows = Ids() if self._task.signature.takes_ids else Rows()
        start = Start(rows, most, self._chunk_size)
        self.under_way.append(start)
        try:
            yield start
        except Exception:
            self.under_way.remove(start)
            raise
        self.under_way.remove(start)

    def _context(self, oldest: Delivery, messages: tuple[str, ...]) -> Context:
        """Return what a run of messages gets.

        Args:
            oldest: The one that was published first.
            messages: The ids of all.
        """
        ctx = Context(self._database, self._task.name, oldest.id, oldest.attempt, messages=messages)
        if self._task.takes_chunks:
            ctx.counts["ids"] = 0
        return ctx

    def _context_of(self, held: Sequence[Held]) -> Context:
        """Return what a run of held messages gets."""
        if len(held) == 1:
            return held[0].ctx
        now = self._budget.now()
        deliveries = [one.delivery for one in held]
        oldest = min(deliveries, key=lambda one: one.published or now)
        ctx = self._context(oldest, tuple(one.id for one in deliveries))
        ctx.counts["ids"] = sum(one.ids for one in held)
        return ctx

    # 1. Each message, as it comes.

    async def open(self, start: Start, delivery: Delivery, lanes: Lanes) -> Outcome | None:
        """Read a message; return None if it is held, or what it comes to: then it is settled.

        Raises:
            BrokerError: It could not be settled.
        """
        one = Held(delivery, self._context(delivery, (delivery.id,)))
        start.held.append(one)
        try:
            for step in (self._recall, self._refuse, self._move, self._decode):
                if one.outcome is UNDECIDED:
                    step(one)
        except BaseException as error:  # noqa: BLE001 - a user's types are asked, too
            await self._fail(start, [one], error, lanes)
        if one.outcome is UNDECIDED:
            start.weigh(one)
            return None
        return await self._settler.settle(start, [one], lanes)

    def _recall(self, one: Held) -> None:
        """A run that ended before, and could not be acknowledged then, is not run again."""
        ended = self._ends.take(one.delivery)
        if ended is not None:
            one.outcome, one.again = ended, True

    def _move(self, one: Held) -> None:
        """One that came back again and again goes behind the others: its copy is counted anew.

        Without a limit nobody else counts the workers that it kills.
        """
        if self._budget.limited and one.delivery.returns >= MOST_RETURNS:
            one.outcome = Outcome(Kind.MOVED, f"it came back {one.delivery.returns} times")

    def _refuse(self, one: Held) -> None:
        """A message that kills its worker is set aside before its body is touched."""
        if self._budget.deaths(one.delivery.key) >= MOST_DEATHS:
            raise CrashLoopError(f"its worker died {MOST_DEATHS} times while it ran")

    def _decode(self, one: Held) -> None:
        """Read the message whole, or refuse it whole; one that has expired is done, unrun."""
        message = one.delivery.message
        call = decode(
            self._task.name,
            message.headers,
            message.content_type,
            message.body,
            message.content_encoding,
        )
        try:
            one.args, one.kwargs = self._task.checked(call.args, call.kwargs)
        except UsageError as error:
            raise MessageRefusedError(str(error)) from error
        if self._task.takes_chunks:
            one.ids = one.ctx.counts["ids"] = len(one.args[0])
            one.constants = call.args[1:], call.kwargs
        one.bytes = len(message.body)
        if any(one.constants) or not self._task.signature.takes_ids:
            one.bytes += call.size  # ids are let go once it is known which are to be written
        one.expires = call.expires
        self._expire(one)
        if call.time_limit is not None and self._task.signature.coroutine:
            # A thread cannot be hurried by its publisher.
            one.seconds = min(call.time_limit, self._task_timeout)
        together = (one.delivery.together, self._budget.together(one.delivery.key))
        alone = one.seconds is not None or self._is_suspect(one.delivery)
        one.most = 1 if alone else min(filter(None, together), default=MOST_MESSAGES)

    def _is_suspect(self, delivery: Delivery) -> bool:
        """Whether a message may harm others: it failed, or came back again and again.

        If it came back from runs whose worker died, their note tells with how many it may run,
        and that does as long as it is not about to be counted anew.
        """
        known = self._budget.together(delivery.key) is not None
        returns = MOST_RETURNS - 1 if known else SUSPECT_RETURNS
        return delivery.retried or delivery.returns >= returns

    def _expire(self, one: Held) -> bool:
        """A message that has expired is done, unrun; return whether it has."""
        if one.expires is None:
            return False
        late = (self._budget.now() - one.expires).total_seconds()
        if late < 0:
            return False
        one.ctx.counts["expired"] = 1
        one.outcome = Outcome(Kind.ACK, f"expired {duration(late)} ago, at {one.expires}")
        return True

    # 2. What of several is to be written.

    async def need(self, start: Start, came: Sequence[Held], lanes: Lanes) -> Outcome | None:
        """Keep what of chunks needs writing; what needs nothing is done, free of charge.

        Args:
            start: What holds these messages.
            came: Those that were not asked for yet.
            lanes: Where they came from.

        Returns:
            What those come to that do not run; None if all are held.

        Raises:
            BrokerError: One could not be settled.
        """
        if not self._task.takes_chunks:
            return None
        clock = asyncio.get_running_loop().time
        came, began, start.ended = list(came), clock(), 0.0
        first, ctx = came[0], self._context_of(came)
        try:
            async with start.may_take(first.seconds or self._task_timeout):
                needed = asked = start.rows.ask(came)
                # Without a rate there is nothing to save: the run finds out itself.
                if self._budget.limited and asked:
                    needed = await self._read_needed(came, ctx, asked)
        except BaseException as error:
            if _is_cancelled():
                raise  # the worker ends: that is no failure of the messages
            await self._fail(start, came, error, lanes)
            return await self._settler.settle(start, came, lanes)
        if len(came) == 1:
            first.read = clock() - began
        start.rows.need(needed)
        for one in came:
            one.args[0] = start.rows.part_of(one)
        done = [one for one in start.held if not start.rows.wants(one)]
        if len(done) == len(start.held):  # no run does it
            self._database.end_run()
        self._decide(done, DONE)
        if any(one.outcome is UNDECIDED for one in came):
            start.counts.update(counted(ctx))
        else:
            start.ctx = ctx
        outcome = await self._settler.settle(start, done, lanes)
        start.ctx = None
        return outcome

    async def _read_needed(self, came: Sequence[Held], ctx: Context, asked: list[Any]) -> list[Any]:
        """Ask the task; what came back again and again may kill its worker by that."""
        delivery = came[0].delivery
        if len(came) > 1 or delivery.returns < SUSPECT_RETURNS:
            return await self._task.read_needed(ctx, asked)
        async with self._budget.reading(delivery.key):
            return await self._task.read_needed(ctx, asked)

    # 3. The run.

    async def run(self, start: Start, lanes: Lanes) -> Outcome | None:
        """Charge and run what a start holds, and settle each message; return the last outcome.

        Raises:
            BrokerError: One could not be settled: RabbitMQ will deliver it again.
        """
        if expired := [one for one in start.held if self._expire(one)]:
            outcome = await self._settler.settle(start, expired, lanes)
            start.rows.drop(expired, start.held)
            if not start.held:
                return outcome
        start.runs = held = list(start.held)
        start.ctx, start.ended, first = self._context_of(held), 0.0, held[0]
        args, spent = first.args, first.read
        if len(held) > 1:
            spent = 0.0  # each read had its own time
            start.ctx.counts.update(start.counts)
        if self._task.takes_chunks:
            args = [start.rows.chunk, *first.args[1:]]
        try:
            if await self._charge(start, held):
                async with start.may_take(first.seconds or self._task_timeout, spent):
                    with self._bounded(start):
                        await self._task.run(start.ctx, args, first.kwargs)
                start.refuse_stopped()
                self._decide(held, DONE)
                self._finish(start)
                self.breaker.succeed(self._budget.now())
        except BaseException as error:
            if _is_cancelled():
                raise
            await self._fail(start, held, error, lanes)
        return await self._settler.settle(start, held, lanes)

    async def _charge(self, start: Start, held: Sequence[Held]) -> bool:
        """Begin the start, as the budget has it; if it cannot begin, the messages go back."""
        try:
            if self._budget.limited:
                self._presence.report(self._doing(start))
                await self._presence.keep()
            keys = [one.delivery.key for one in held]
            ids = len(start.rows) if self._task.takes_chunks else None
            refusal = await self._budget.charge(keys, ids=ids, bulk_next=start.urgent)
        except DatabaseError as error:
            outcome = Outcome(Kind.RELEASED, str(error), away=error)
        else:
            if refusal is None:
                self.starts += 1
                start.began = time.monotonic()
                return True
            outcome = Outcome(Kind.RELEASED, str(refusal.reason))
        self._decide(held, outcome)
        return False

    def _bounded(self, start: Start) -> AbstractContextManager[object]:
        """Inside, a wait for its first write is no part of a run's time; that wait is reported."""
        if not self._task.needs_database:
            return _UNBOUNDED
        doing = self._doing(start)
        return self._database.bounded(
            start.limit,
            lambda wait: self._presence.report(wait or doing),
            lambda: self._go_on(start),
        )

    async def _go_on(self, start: Start) -> None:
        """See that a run may begin a further transaction.

        Raises:
            RunStoppedError: It may not, nor any behind that.
        """
        if start.stopped is None:
            start.stopped = await self._budget.stops_run()
        start.refuse_stopped()

    def _doing(self, start: Start) -> Reason:
        ids = f", {count(len(start.rows), 'id')}" if self._task.takes_chunks else ""
        return Reason(ReasonKind.RUNNING, f"{self._task.name}{ids}")

    # 4. What it came to.

    async def _fail(
        self, start: Start, held: Sequence[Held], error: BaseException, lanes: Lanes
    ) -> None:
        """Note in plain values what went wrong with messages, and decide what they come to."""
        if start.stopped is not None:  # whatever the task made of that
            let_go(error)
            self._finish(start)
            self._decide(held, Outcome(Kind.RELEASED, start.stopped.words))
            return
        # By its type: what a user's class says of itself may be code that raises.
        if start.limit.expired() and issubclass(type(error), TimeoutError):
            start.cut_off = True
            words = f"the run took longer than {start.seconds:g} s and was cut off"
            error = _caused(TimeoutError(words), error)
        failure = Failure.of(error)
        if failure.error is None:
            let_go(error)
        lost, no_room = self._finish(start)
        failure = replace(failure, lost=lost or failure.lost, no_room=no_room)
        for one in held:
            one.failure = failure
        await self._judge(start, held, failure, lanes)

    def _finish(self, start: Start) -> tuple[bool, DatabaseError | None]:
        """See what a step left behind: whether its connection is lost, and what had no room."""
        start.ended = time.monotonic()
        lost, no_room = False, None
        if self._task.needs_database:
            lost = not self._database.is_open and not start.cut_off
            no_room = self._database.take_no_room()
        self._database.end_run()
        return lost, no_room

    async def _judge(
        self, start: Start, held: Sequence[Held], failure: Failure, lanes: Lanes
    ) -> None:
        """Decide what failed messages come to.

        A database that takes no write of ours is away, whatever the error was called: nothing
        counts. If it takes one, the failure is a message's. Of several it is not known whose: they
        run again with fewer others, uncounted. Of one it counts as an attempt, and after the last
        one the message is a dead letter; unless it may be the task that fails.
        """
        if failure.fault is Fault.MESSAGE and len(held) == 1:
            self._decide(held, Outcome(Kind.DEAD_LETTER, failure.words, failure))
            return
        if len(held) > 1 and self._refuse_rows(start, held, failure):
            self.breaker.succeed(self._budget.now())
            return
        try:
            await self._probe.check_database()
            if failure.fault is Fault.EVERY_MESSAGE:
                await self._probe.check_task()
        except DatabaseError as away:
            words = f"{failure.words}; {away}"
            self._decide(held, Outcome(Kind.RELEASED, words, failure, away))
            return
        worked = any(self.breaker.has_succeeded_since(one.delivery.first_failed) for one in held)
        # Of the whole server, or of a table that this message alone fills: others may do.
        no_room = None if worked else failure.no_room
        if len(held) > 1:
            if start.began and failure.fault is not Fault.CONTENTION and no_room is None:
                self.breaker.fail_together(failure.words)
            half = len(held) // 2
            self._decide(held, Outcome(Kind.MOVED, failure.words, failure, no_room, together=half))
        elif no_room is not None:
            self._decide(held, Outcome(Kind.POSTPONED, failure.words, failure, no_room))
        else:
            [one] = held
            outcome = self._count(one.delivery, failure)
            if await self._may_be_the_tasks(start, one, failure, outcome, lanes):
                outcome = Outcome(Kind.POSTPONED, failure.words, failure)
            one.outcome = outcome

    def _decide(self, held: Sequence[Held], outcome: Outcome) -> None:
        for one in held:
            one.outcome = outcome

    def _refuse_rows(self, start: Start, held: Sequence[Held], failure: Failure) -> bool:
        """Set aside those messages that name rows which the data refuses, if others do not.

        The rows of the others are written.
        """
        if not (failure.refused and start.began and self._task.takes_chunks):
            return False
        own = {one: start.rows.own(one) for one in held}
        refused = {
            one: {key: failure.refused[key] for key in keys if key in failure.refused}
            for one, keys in own.items()
        }
        if all(refused[one] for one, keys in own.items() if keys) or not any(refused.values()):
            return False  # of every message, or of none: it may be the task
        for one, reasons in refused.items():
            if reasons:
                refusal = RowsRefusedError(reasons, len(one.args[0]) - len(reasons))
                one.failure = failure = Failure.of(refusal)
                one.outcome = Outcome(Kind.DEAD_LETTER, failure.words, failure)
            else:
                one.failure = None
                one.outcome = DONE
        return True

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
        self, start: Start, one: Held, failure: Failure, outcome: Outcome, lanes: Lanes
    ) -> bool:
        """Whether a failure may be the task's: it is not to cost the message an attempt."""
        delivery, was_open = one.delivery, bool(self.breaker.reason)
        failed = Failed(
            delivery.key,
            delivery.first_failed,
            delivery.attempt,
            one.taken,
            failure.words,
            last=outcome.kind is Kind.DEAD_LETTER,
            of_all=failure.fault is Fault.EVERY_MESSAGE,
        )
        if not self.breaker.fail(failed):
            return False
        if not await self._is_alone(start, lanes, everywhere=was_open):
            return True
        return failed.last and not self.breaker.may_set_aside(failed.message)

    async def _is_alone(self, start: Start, lanes: Lanes, *, everywhere: bool) -> bool:
        """Whether no other message could show that the task works.

        Args:
            start: What holds the message.
            lanes: Where others may wait.
            everywhere: Whether those count that were put off: it may be the task, and they the
                rest of a round.
        """
        # One that has failed too shows nothing; of three the breaker opens, and decides.
        others_run = self.holds_another() or any(
            not other.ended for other in self.under_way if other is not start
        )
        if len(self.under_way) >= STREAK or others_run or len(start.held) > 1:
            return False
        try:
            put_off = await lanes.count_put_off() if everywhere else 0
            return not put_off and not await lanes.hold_something()
        except BrokerError:
            return False

    # 5. Settle, each once, and report.

    async def give_back(
        self, start: Start, held: Sequence[Held], reason: str, lanes: Lanes
    ) -> None:
        """Let messages go back to their lanes, in their order, as they came.

        Raises:
            BrokerError: The connection is lost: they are back already.
        """
        self._decide(held, Outcome(Kind.RELEASED, reason))
        await self._settler.settle(start, list(held), lanes)


def _is_cancelled() -> bool:
    running = asyncio.current_task()
    return running is not None and running.cancelling() > 0


def _caused(error: BaseException, cause: BaseException) -> BaseException:
    """Return an error that was not raised, with what it comes from."""
    error.__cause__ = cause
    return error
