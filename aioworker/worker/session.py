"""What one connection to RabbitMQ is used for: ask, wait with nothing in hand, take, serve.

Whatever may hold a start is asked first, then the lanes; a message is taken only when a start
is due and the turn is this worker's. RabbitMQ keeps the rest. Every wait has a reason.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from aioworker.budget.first_write import Usual
from aioworker.consumer import Consumer
from aioworker.errors import AioworkerError, BrokerError, DatabaseError
from aioworker.limits import LEAD_SECONDS, POLL_SECONDS, Wait
from aioworker.rabbitmq.delivery import SUSPECT_RETURNS
from aioworker.reasons import Reason, ReasonKind
from aioworker.settling.outcome import Kind, Outcome
from aioworker.settling.probe import Probe
from aioworker.settling.start import MOST_MESSAGES, Held, Start
from aioworker.tasks.chunk import CHUNK_LIMIT
from aioworker.words import count
from aioworker.worker.intake import Intake
from aioworker.worker.recovery import Recovery

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aioworker.limits import Budget
    from aioworker.mysql.database import Database
    from aioworker.rabbitmq.delivery import Delivery
    from aioworker.rabbitmq.lanes import Lanes
    from aioworker.status.presence import Presence
    from aioworker.tasks.task import AnyTask

AT_ONCE = 16  # messages of each lane, for a task without a rate limit that needs no database
QUIET_SECONDS = 0.2  # without a message, and the lanes are asked again
ALARM_SECONDS = 30.0  # until the next message, if RabbitMQ confirms no copy
IDLE_SECONDS = 0.9  # between looks at empty lanes: a message is noticed within a second


@dataclass(frozen=True, slots=True)
class Worker:
    """What serves one task in this process, over any number of connections.

    Args:
        task: The task.
        database: The database that its runs use.
        budget: Says when a start may begin.
        consumer: Takes each delivery through its life.
        presence: Reports every wait.
        probe: Asks whether the database and the task work.
        recovery: What is known of failures.
        task_timeout: Seconds a run may take.
        needs_database: Whether anything of it does.
        burst: Whether it ends once the lanes are empty, or if no start can be made for now.
        gather_seconds: How long before a start is due messages are gathered for it, at most; 0
            for one message a start.
    """

    task: AnyTask
    database: Database
    budget: Budget
    consumer: Consumer
    presence: Presence
    probe: Probe
    recovery: Recovery
    task_timeout: float = 30.0
    needs_database: bool = True
    burst: bool = False
    gather_seconds: float = 0.0

    @classmethod
    def of(  # noqa: PLR0913 - what a worker consists of, put together here alone
        cls,
        name: str,
        task: AnyTask,
        database: Database,
        budget: Budget,
        presence: Presence,
        *,
        timeout: float,
        task_timeout: float,
        max_retries: int,
        nodes: int = 1,
        stood_still: Callable[[], str] = str,
        needs_database: bool = True,
        burst: bool = False,
        gather_seconds: float = 0.0,
        chunk_size: int = CHUNK_LIMIT,
    ) -> Worker:
        """Put a worker together.

        Args:
            name: Its name, in dead letters.
            task: The task.
            database: The database that its runs use.
            budget: Says when a start may begin.
            presence: Reports every wait.
            timeout: Seconds for each step with a server.
            task_timeout: Seconds a run may take.
            max_retries: Attempts after the first, before a message becomes a dead letter.
            nodes: How many nodes RabbitMQ has.
            stood_still: Returns what stood still a moment ago, and cost a connection perhaps.
            needs_database: As for `Worker`.
            burst: Likewise.
            gather_seconds: Likewise.
            chunk_size: Ids that need a write, before a start takes no more messages.
        """
        probe = Probe(task, database, presence, timeout)
        consumer = Consumer(
            task,
            database,
            budget,
            presence,
            probe,
            max_retries=max_retries,
            task_timeout=task_timeout,
            chunk_size=chunk_size,
            worker=name,
        )
        recovery = Recovery(nodes, task_timeout + 2 * timeout, stood_still)
        return cls(
            task,
            database,
            budget,
            consumer,
            presence,
            probe,
            recovery,
            task_timeout,
            needs_database=needs_database,
            burst=burst,
            gather_seconds=gather_seconds,
        )

    @property
    def progresses(self) -> bool:
        """Whether it is in a step whose time is not up."""
        # Until it is settled a run has its own time, and a little more.
        runs = [start.limit.when() for start in self.consumer.under_way]
        ends = [end + self.recovery.patience for end in runs if end is not None]
        now = asyncio.get_running_loop().time()
        return now < max([self.recovery.due_by, *ends])


class Session:
    """Serves over one connection.

    Args:
        worker: What serves.
        lanes: Where messages come from.
        stop: Set when the worker is to end.
        lost: Set when the connection is lost.
    """

    def __init__(
        self, worker: Worker, lanes: Lanes, stop: asyncio.Event, lost: asyncio.Event
    ) -> None:
        self._worker = worker
        self._lanes = lanes
        self._stop = stop
        self._lost = lost
        self._time = asyncio.get_running_loop().time
        self._holds = (self._ask_budget, self._ask_breaker)
        self._busy = False  # whether it served a message just now
        self._took = False  # whether the last look into the lanes found a message
        self._bulk_next = False  # whether the next start begins with the bulk lane
        self._reading = Usual()  # what needs writing, of as many messages as one read is for

    async def run(self) -> None:
        """Serve until a stop, or in a burst until the lanes are empty.

        Raises:
            BrokerError: The connection is lost, or a step with RabbitMQ failed.
            AioworkerError: In a burst: the database cannot be used, or the task is paused.
        """
        going = True
        while going and not self._stop.is_set():
            self._notice_loss()
            outcome: Outcome | None = None
            try:
                await self._check_database()
                if not (waits := await self._ask()):
                    await self._begin()
                    take = self._take_several if self._may_take_several else self._take_in_turn
                    waits, outcome = await take()
                self._busy = outcome is not None
                going = await (self._wait(waits) if waits else self._recover(outcome))
                self._worker.recovery.database.end()
            except DatabaseError as error:
                await self._sit_out_database(error)

    async def _check_database(self) -> None:
        """See that the database answers and that the task can read and write in it.

        Raises:
            DatabaseError: Nothing is taken while that is so.
        """
        worker = self._worker
        if worker.needs_database and not (worker.recovery.trusted and self._busy):
            await worker.database.ready()
        if not worker.recovery.trusted:
            await worker.probe.check_database()
            await worker.probe.check_task()

    # 1. Ask whatever may hold a start, then the lanes; nothing is held meanwhile.

    async def _ask(self) -> list[Wait]:
        """Return all that holds a start now; nothing where one may begin."""
        await self._worker.presence.keep()
        waits = await self._held()
        # If a start waits for its moment alone, it is worth asking whether there is one to make.
        if all(wait.reason.kind.timed for wait in waits) and await self._is_idle(held=bool(waits)):
            return [Wait(Reason(ReasonKind.EMPTY, "nothing queued"), IDLE_SECONDS)]
        return waits

    async def _held(self) -> list[Wait]:
        """Return all that holds a start now, whether or not there is one to make."""
        return [wait for ask in self._holds if (wait := await ask()) is not None]

    async def _ask_budget(self) -> Wait | None:
        """Ask whether a start is due, and whether somebody paused the task."""
        wait = await self._worker.budget.check(self._worker.presence.others)
        self._worker.recovery.trusted = True
        return wait

    async def _ask_breaker(self) -> Wait | None:
        """Ask whether one more message may show that the task works again."""
        seconds = self._worker.consumer.breaker.seconds()
        return Wait(self._tried(), min(seconds, POLL_SECONDS)) if seconds > 0 else None

    async def _is_idle(self, *, held: bool) -> bool:
        """Whether the lanes are empty."""
        # If a start may begin now, a message just taken is the sign that there are more.
        if self._took and not held:
            return False
        idle = not await self._lanes.hold_something(sure=self._worker.burst)
        self._took = self._took and not idle
        return idle

    # 2. Wait, and say why.

    async def _wait(self, waits: Sequence[Wait]) -> bool:
        """Wait, saying all that holds; a stop or a lost connection ends it early.

        Returns:
            Whether to go on: a burst does not wait for most of what holds.

        Raises:
            AioworkerError: In a burst: no start begins until somebody does something.
            DatabaseError: The worker's row cannot be written.
        """
        worker, reason = self._worker, self._reason([wait.reason for wait in waits])
        if worker.burst and reason.kind.fails_burst:
            raise AioworkerError(str(reason))
        if worker.burst and reason.kind is ReasonKind.EMPTY:
            return False
        worker.presence.report(reason)
        if worker.burst and any(wait.reason.kind.ends_burst for wait in waits):
            return False
        await worker.presence.keep()
        # A start can begin when the last of them holds it no more.
        seconds = max(wait.seconds for wait in waits)
        worker.recovery.progress(seconds)
        await first_of(seconds, self._stop, self._lost)
        return True

    def _reason(self, reasons: Sequence[Reason]) -> Reason:
        """Return one reason for all that hold: its kind is the first one's.

        What ends by itself comes last. An open breaker is always among them, since whoever looks
        has to know of it first.
        """
        stall, interval = self._worker.recovery.stall, self._worker.budget.interval
        found = [stall.judge(reason, interval) for reason in reasons]
        why = self._worker.consumer.breaker.reason
        if why and found[0].kind is ReasonKind.EMPTY:
            found = [self._tried()]
        elif why and all(one.kind is not ReasonKind.BREAKER for one in found):
            found.append(Reason(ReasonKind.BREAKER, f"breaker open: {why}"))
        found.sort(key=_rank)
        return Reason(found[0].kind, "; ".join(map(str, found)))

    def _tried(self) -> Reason:
        why = self._worker.consumer.breaker.reason
        words = f"breaker open: {why}; a few messages a minute are tried"
        return Reason(ReasonKind.BREAKER, words)

    # 3. Take, one at a time in the turn; or several at once.

    @property
    def _may_take_several(self) -> bool:
        """Whether runs may go beside each other: they share neither a rate nor a connection."""
        worker = self._worker
        return not (
            worker.budget.limited or worker.task.needs_database or worker.consumer.breaker.reason
        )

    async def _begin(self) -> None:
        """Say that it takes messages, where no start will say so."""
        if not self._worker.budget.limited:
            self._worker.presence.report(Reason(ReasonKind.RUNNING, self._worker.task.name))
            await self._worker.presence.keep()

    async def _take_in_turn(self) -> tuple[list[Wait], Outcome | None]:
        """Fill one start after the other in a turn, until one has begun.

        Returns:
            Why the turn could not be had, and what the last message came to.
        """
        worker, consumer, outcome = self._worker, self._worker.consumer, None
        async with worker.budget.turn() as wait:
            starts, until = consumer.starts, self._time() + POLL_SECONDS
            while wait is None:
                with consumer.starting(self._most) as start:
                    try:
                        took, found = await self._gather(start)
                        await worker.budget.rest(resting=False)
                    except DatabaseError as error:
                        await self._let_go(start, str(error))
                        raise
                    if start.held:
                        self._bulk_next = self._gathers and start.held[0].delivery.lane == "urgent"
                        found = await consumer.run(start, self._lanes)
                outcome = found or outcome
                if not took or self._turn_ends(outcome, starts, until):
                    break
                await worker.presence.keep()
        return [] if wait is None else [wait], outcome

    @property
    def _gathers(self) -> bool:
        """Whether several messages go into one start."""
        return self._worker.gather_seconds > 0 and self._worker.task.gathers

    @property
    def _most(self) -> int:
        """How many messages a start may hold: one, if it is to show whether the task works."""
        return MOST_MESSAGES if self._gathers and not self._worker.consumer.breaker.reason else 1

    async def _gather(self, start: Start) -> tuple[bool, Outcome | None]:
        """Take messages until a start is full or due; if it cannot begin, give them back.

        Those that need nothing are settled on the way.

        Returns:
            Whether there were any, and what the last one that was settled came to.

        Raises:
            DatabaseError: The budget cannot be looked at.
        """
        took, outcome, began = False, None, self._time()
        look_at = began + POLL_SECONDS
        while True:
            due_at = self._due_at()
            # If it is due already, what lies in the lanes is taken, but not for long.
            until = max(due_at, began + self._spare)
            had_turn = self._worker.budget.limited and not self._lost_database
            came, settled = await self._take_some(start, until, look_at)
            took, outcome = took or came, settled or outcome
            if settled is not None and settled.uncounted:
                await self._let_go(start, settled.reason)
            elif had_turn and self._lost_database:
                await self._let_go(start, "the connection to the database is lost")
            elif self._gathers and self._stop.is_set():
                await self._let_go(start, "the worker ends")
            elif self._gathers and self._time() >= look_at:
                look_at = self._time() + POLL_SECONDS
                await self._look(start)
            seconds = due_at - self._time()
            if not (start.held and self._gathers):
                return took, outcome
            if came and start.has_room():
                continue
            if seconds <= 0:
                return took, outcome
            await self._wait_for_more(start, seconds)

    async def _wait_for_more(self, start: Start, seconds: float) -> None:
        """Wait for the next look into the lanes, or until the start is due; say so.

        Raises:
            BrokerError: The connection is lost.
        """
        worker, ids = self._worker, count(len(start.rows), "id")
        words = f"gathering: {count(len(start.held), 'message')}, {ids} to write"
        worker.presence.report(Reason(ReasonKind.GATHERING, words))
        worker.recovery.progress(seconds)
        await worker.budget.rest(resting=True)
        await first_of(min(seconds, IDLE_SECONDS), self._stop, self._lost)
        self._notice_loss()

    async def _look(self, start: Start) -> None:
        """See whether the start may still begin; if not, give its messages back.

        Raises:
            DatabaseError: That cannot be told, or the worker's row cannot be written.
        """
        await self._worker.presence.keep()
        if waits := await self._held():
            await self._let_go(start, "; ".join(str(wait.reason) for wait in waits))

    async def _let_go(self, start: Start, reason: str) -> None:
        await self._worker.consumer.give_back(start, start.held, reason, self._lanes)

    @property
    def _spare(self) -> float:
        """How much of the wait for a start is left to its charge, in seconds."""
        budget = self._worker.budget
        return min(LEAD_SECONDS, budget.interval / 20) if budget.limited else math.inf

    def _due_at(self) -> float:
        """Return when a start is not waited for any longer, by the event loop's clock."""
        budget = self._worker.budget
        return budget.due_at - self._spare if budget.limited else -math.inf

    async def _take_some(
        self, start: Start, until: float, look_at: float
    ) -> tuple[bool, Outcome | None]:
        """Take messages, as many as one read may be for, and ask what of them needs writing.

        Args:
            start: What holds them.
            until: When the read has to be over.
            look_at: When the taking has to be.

        Returns:
            Whether there were any, and what the last one that was settled came to.
        """
        consumer, unread, ids = self._worker.consumer, list[Held](), 0
        came, settled = False, None
        while start.has_room(ids) and not (start.held and self._is_late(until)):
            if unread and self._time() >= look_at:
                break
            if (delivery := await self._take(first=not start.held)) is None:
                break
            came, settled = True, await consumer.open(start, delivery, self._lanes)
            if settled is not None:
                if settled.kind is Kind.MOVED and settled.away is None:
                    settled = None  # nothing has failed
                elif settled.uncounted:
                    return came, settled
                if not start.held:
                    return came, settled
                continue
            one = start.held[-1]
            if not start.fits(one):
                # It is the first of the next start.
                await consumer.give_back(start, [one], "it fits no other", self._lanes)
                start.closed = True
                break
            start.most = min(start.most, one.most)
            unread.append(one)
            ids += one.ids
        if unread:
            began = self._time()
            await self._worker.budget.rest(resting=False)
            settled = await consumer.need(start, unread, self._lanes) or settled
            self._reading.took(self._time() - began)
        return came, settled

    def _is_late(self, until: float) -> bool:
        """Whether a read that begins now would likely end after a moment."""
        return self._time() + self._reading.seconds > until

    async def _take(self, *, first: bool = True) -> Delivery | None:
        """Take a message; None where there is none, or at a stop.

        From the urgent lane first; if the last start began with that, the next one begins with
        the bulk lane, so that single changes never stop a sweep.
        """
        if self._stop.is_set():
            return None
        delivery = await self._lanes.take(bulk_first=first and self._bulk_next)
        if first:
            self._bulk_next = False  # what needs nothing spends no start: an urgent one goes next
        self._took = delivery is not None
        if delivery is not None:
            self._worker.recovery.stall.end()
            self._worker.recovery.progress()
        return delivery

    def _turn_ends(self, outcome: Outcome | None, starts: int, until: float) -> bool:
        """Whether no more is to be taken in this turn.

        Under a rate it ends with a start; what needs no start goes beside it, free.
        """
        worker = self._worker
        started = worker.budget.limited and worker.consumer.starts > starts
        # After a while a pause is looked for, though nothing needs a start.
        uncounted = outcome is not None and outcome.uncounted
        return started or uncounted or self._lost_database or self._time() >= until

    @property
    def _lost_database(self) -> bool:
        """Whether the connection is lost that held the turn: a message would fail for nothing."""
        return self._worker.needs_database and not self._worker.database.is_open

    async def _take_several(self) -> tuple[list[Wait], Outcome | None]:
        """Take messages as RabbitMQ sends them, several at once, until none comes any more.

        Returns:
            Nothing to wait for, and what the last one came to that was given back or put off.
        """
        worker = self._worker
        if (first := await self._take()) is None:
            return [], None
        if first.returns >= SUSPECT_RETURNS:
            # What comes back again and again is served alone: whatever is held when a worker
            # dies is counted by RabbitMQ, as if it had killed it.
            return [], await worker.consumer.serve(first, self._lanes)
        intake = Intake(partial(worker.consumer.serve, lanes=self._lanes), first)
        async with self._lanes.consume(AT_ONCE, intake.begin, intake.ended.set), intake:
            look_at = self._time() + POLL_SECONDS
            while not (self._stop.is_set() or self._lost.is_set() or intake.ended.is_set()):
                served = intake.served
                await first_of(QUIET_SECONDS, self._stop, self._lost, intake.ended)
                if intake.served > served and intake.failure is None:
                    worker.recovery.copies.end()
                self._took = bool(intake.running) or intake.served > served
                if not self._took or worker.consumer.breaker.reason:
                    break
                if self._time() < look_at:
                    continue
                self._report_hanging(intake)
                await worker.presence.keep()
                if await self._held() or worker.budget.limited:
                    break
                look_at = self._time() + POLL_SECONDS
            await self._let_end(intake)
        return [], intake.failure

    async def _let_end(self, intake: Intake) -> None:
        """Wait for what runs in an intake, and say so if it does not end: threads may hang."""
        intake.ended.set()
        look_at = self._time() + POLL_SECONDS
        while intake.running:
            await asyncio.wait(intake.running, timeout=QUIET_SECONDS)
            if self._time() >= look_at:
                self._report_hanging(intake)
                await self._worker.presence.keep_if_possible()
                look_at = self._time() + POLL_SECONDS

    def _report_hanging(self, intake: Intake) -> None:
        """Say so if nothing in an intake has ended for longer than it may: threads that hang."""
        presence, seconds = self._worker.presence, intake.seconds_since_it_moved
        if intake.running and seconds > 2 * self._worker.task_timeout:
            runs = count(len(intake.running), "run")
            words = f"{runs} without an end, though the time is up"
            presence.report(Reason(ReasonKind.RUN_HANGS, words))
        else:
            presence.report(Reason(ReasonKind.RUNNING, self._worker.task.name))
            self._worker.recovery.progress()

    # 4. Go on after a failure.

    def _notice_loss(self) -> None:
        if self._lost.is_set():
            raise BrokerError("connection to RabbitMQ lost", unreachable=True)

    async def _recover(self, outcome: Outcome | None) -> bool:
        """Do what the last delivery's outcome asks for; return whether to go on.

        Raises:
            DatabaseError: The database takes no writes.
        """
        if outcome is None:
            return True
        if outcome.kind is not Kind.RELEASED:
            self._worker.recovery.copies.end()
        if isinstance(outcome.away, DatabaseError):
            raise outcome.away
        if isinstance(outcome.away, BrokerError):
            await self._sit_out_copies(outcome.away)
            return not self._worker.burst
        return True

    async def _sit_out_database(self, error: DatabaseError) -> None:
        """Wait after a database could not be used, longer each time.

        Raises:
            DatabaseError: In a burst.
            BrokerError: The connection to RabbitMQ was lost meanwhile.
        """
        worker, recovery = self._worker, self._worker.recovery
        if error.unreachable or recovery.trusted:
            # Its address may lead to another server now, or a run spoiled the session.
            worker.database.close()
        if worker.burst:
            raise error
        recovery.trusted = False
        writes = worker.database.is_open or not error.unreachable
        seconds = recovery.database.seconds(error)
        await self._back_off(recovery.reason(recovery.database, error), seconds, writes=writes)

    async def _sit_out_copies(self, refusal: BrokerError) -> None:
        """Wait after a copy that was not taken, following what is set at run time meanwhile.

        If RabbitMQ took none for want of memory or disk, no longer than that lasts.

        Raises:
            DatabaseError: The budget cannot be looked at.
            BrokerError: The connection to RabbitMQ was lost meanwhile.
        """
        worker = self._worker
        if worker.burst:
            return
        copies = worker.recovery.copies
        seconds = ALARM_SECONDS if refusal.unreachable else copies.seconds(refusal)
        until = self._time() + seconds
        unblocked = asyncio.ensure_future(self._lanes.unblocked())
        await asyncio.sleep(0)
        blocked = not unblocked.done()
        reason = Reason(ReasonKind.COPY_NOT_CONFIRMED, f"copy not confirmed: {refusal}")
        try:
            while not self._stop.is_set() and (left := until - self._time()) > 0:
                if blocked and unblocked.done():
                    break
                seconds = min(left, POLL_SECONDS)
                await self._back_off(reason, seconds, writes=worker.database.is_open)
                await worker.budget.check()
        finally:
            unblocked.cancel()

    async def _back_off(self, reason: Reason, seconds: float, *, writes: bool) -> None:
        """Wait after a failure that leaves the connection to RabbitMQ as it is, saying why.

        Args:
            reason: Why.
            seconds: How long.
            writes: Whether the database can be had, to write the reason into the worker's row.

        Raises:
            BrokerError: The connection to RabbitMQ was lost meanwhile.
        """
        worker = self._worker
        worker.presence.report(worker.recovery.stall.judge(reason, worker.budget.interval))
        if writes:
            await worker.presence.keep_if_possible()
        worker.recovery.progress(seconds)
        await first_of(seconds, self._stop, self._lost)
        self._notice_loss()


def _rank(reason: Reason) -> tuple[bool, bool, bool]:
    """Return where a reason stands among several, for sorting."""
    return not reason.kind.fails_burst, not reason.kind.red, reason.kind.timed


async def first_of(seconds: float, *events: asyncio.Event) -> None:
    """Return when one of *events* is set, or after *seconds*."""
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
