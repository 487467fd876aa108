"""What one connection to RabbitMQ is used for: ask, wait with nothing in hand, take, serve.

Whatever may hold a start is asked first, then the lanes; a message is taken only when a start
is due and the turn is this worker's. RabbitMQ keeps the rest. Every wait has a reason.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from aioworker.consumer import Consumer
from aioworker.errors import AioworkerError, BrokerError, DatabaseError
from aioworker.limits import POLL_SECONDS, Wait
from aioworker.rabbitmq.delivery import SUSPECT_RETURNS
from aioworker.reasons import Reason, ReasonKind
from aioworker.settling.outcome import Kind, Outcome
from aioworker.settling.probe import Probe
from aioworker.tasks.chunk import CHUNK_LIMIT
from aioworker.words import count
from aioworker.worker.gathering import Gathering
from aioworker.worker.intake import Intake
from aioworker.worker.prefetch import Prefetch
from aioworker.worker.recovery import Recovery

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aioworker.limits import TaskBudget
    from aioworker.mysql.database import Database
    from aioworker.rabbitmq.delivery import Delivery
    from aioworker.rabbitmq.lanes import Lanes
    from aioworker.status.presence import Presence
    from aioworker.tasks.task import AnyTask

AT_ONCE = 16  # messages of each lane, for a task without a rate limit that needs no database
QUIET_SECONDS = 0.2  # without a message, and the lanes are asked again
ALARM_SECONDS = 30.0  # until the next message, if RabbitMQ confirms no copy
# Between looks at empty lanes: at first short ones, where another message is likely; later a share
# of the silence, up to a second all in all.
LOOK_SECONDS = 0.02
LIVELY_SECONDS = 5.0
SILENCE_SHARE = 1 / 60
IDLE_SECONDS = 0.9  # between looks at all that may hold a start, the protected database among it


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
    budget: TaskBudget
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
        budget: TaskBudget,
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
    def gathers(self) -> bool:
        """Whether several messages go into one start."""
        return self.gather_seconds > 0 and self.task.gathers

    @property
    def bulk_next(self) -> bool:
        """Whether the next start begins with the bulk lane: single changes never stop a sweep."""
        return self.gathers and self.budget.bulk_next

    @property
    def lost_database(self) -> bool:
        """Whether it needs a connection to the database, and has none."""
        return self.needs_database and not self.database.is_open

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
        self._took_at = self._time()  # when one was taken last; at first, when this began
        self._gathering = Gathering(worker, lanes, stop, self._take_more, self._wait_for_more)

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
        able = all(wait.reason.kind.timed for wait in waits)
        idle = able and await self._is_idle(held=bool(waits))
        await self._want(able=able and not idle)
        if idle:
            self._worker.consumer.taken.found_nothing(self._worker.budget.now())
            return [Wait(Reason(ReasonKind.EMPTY, "nothing queued"), IDLE_SECONDS)]
        return waits

    async def _want(self, *, able: bool) -> None:
        """Say what waits in the lanes, where tasks share a budget; nothing where none can begin."""
        if not self._worker.budget.shares:
            return
        urgent, bulk = await self._lanes.count_queued() if able else (0, 0)
        await self._worker.budget.want(urgent=urgent > 0, bulk=bulk > 0)

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
        await (self._watch(seconds) if reason.kind is ReasonKind.EMPTY else self._pause(seconds))
        return True

    async def _watch(self, seconds: float) -> None:
        """Wait for a message, so many seconds at most, and ask RabbitMQ alone meanwhile.

        Raises:
            BrokerError: The connection to RabbitMQ is lost.
        """
        until = self._time() + seconds
        while not (self._took or self._stop.is_set()):
            now = self._time()
            silence, left = now - self._took_at, until - now
            look = LOOK_SECONDS if silence < LIVELY_SECONDS else silence * SILENCE_SHARE
            await self._pause(min(look, left))
            if look >= left:
                break
            self._took = await self._lanes.hold_something()

    async def _wait_for_more(self, seconds: float) -> None:
        """Wait until the lanes are worth another look, so many seconds at most.

        Raises:
            BrokerError: The connection to RabbitMQ is lost.
        """
        await self._pause(min(seconds, IDLE_SECONDS))

    async def _pause(self, seconds: float) -> None:
        """Wait; a stop ends it early.

        Raises:
            BrokerError: The connection to RabbitMQ is lost.
        """
        self._worker.recovery.progress(seconds)
        await first_of(seconds, self._stop, self._lost)
        self._notice_loss()

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
        """Take one message after the other in a turn, until a start has begun.

        Returns:
            Why the turn could not be had, and what the last message came to.
        """
        worker, outcome = self._worker, None
        alone = partial(worker.consumer.serve, lanes=self._lanes)
        async with worker.budget.turn() as wait:
            if wait is not None:
                return [wait], None
            starts, bulk_next = worker.consumer.starts, worker.bulk_next
            # Under a rate nothing is held while something runs, nor if the task may not work.
            ask = not (worker.budget.limited or worker.consumer.breaker.reason)
            taking = (self._take, self._take_beside, self._stop)
            async with Prefetch(*taking, POLL_SECONDS, ask=ask) as prefetch:
                worker.consumer.holds_another = prefetch.holds
                fill = partial(self._gathering.serve, prefetch=prefetch)
                serve = fill if worker.gathers else alone
                while (first := await prefetch.take(bulk_first=bulk_next)) is not None:
                    before = worker.consumer.starts
                    outcome = await serve(first) or outcome
                    # After a while a pause is looked for, though nothing needs a start.
                    if self._turn_ends(outcome, starts) or prefetch.over:
                        break
                    # What needs nothing spends no start: an urgent one is next.
                    bulk_next = worker.bulk_next and worker.consumer.starts > before
                    await worker.presence.keep()
        return [], outcome

    async def _take(self, bulk_first: bool = False) -> Delivery | None:
        """Take a message, from the urgent lane first; None where there is none, or at a stop."""
        if self._stop.is_set():
            return None
        delivery = await self._lanes.take(bulk_first=bulk_first)
        self._note_taken(took=delivery is not None)
        return delivery

    async def _take_beside(self, running: Sequence[Delivery], bulk_first: bool) -> Delivery | None:
        """Take a message while others run; None where there is none, or at a stop."""
        if self._stop.is_set():
            return None
        delivery = await self._lanes.take_beside(running, bulk_first=bulk_first)
        if delivery is not None:
            self._note_taken(took=True)
        return delivery

    async def _take_more(self, most: int) -> list[Delivery]:
        """Take up to so many more messages at once; none where there is none, or at a stop."""
        if self._stop.is_set():
            return []
        came = await self._lanes.take_more(most)
        self._note_taken(took=bool(came))
        return came

    def _note_taken(self, *, took: bool) -> None:
        self._took = took
        if took:
            self._took_at = self._time()
            self._worker.recovery.stall.end()
            self._worker.recovery.progress()

    def _turn_ends(self, outcome: Outcome | None, starts: int) -> bool:
        """Whether no more may be taken in this turn.

        Under a rate it ends with a start; what needs no start goes beside it, free.
        """
        worker = self._worker
        started = worker.budget.limited and worker.consumer.starts > starts
        uncounted = outcome is not None and outcome.uncounted
        # If the connection is lost that held the turn, a message would fail for nothing.
        return started or uncounted or worker.lost_database

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
        await self._pause(seconds)


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
