"""A worker's day: connect, wait with nothing in hand, take in its turn, recover.

It looks at the lanes and the budget first, and takes a message only when a start is due
and the turn is its own. RabbitMQ keeps the rest. Every wait has a reason, told by
`presence`.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from aioworker.addresses import Nodes
from aioworker.consumer import Link
from aioworker.errors import AioworkerError, BrokerError, DatabaseError, StalledError
from aioworker.limits import POLL_SECONDS, Wait
from aioworker.rabbitmq import frames
from aioworker.rabbitmq.connection import connected
from aioworker.rabbitmq.lanes import Lanes
from aioworker.rabbitmq.publisher import Publisher
from aioworker.reasons import Reason, ReasonKind
from aioworker.settling.outcome import Kind, Outcome
from aioworker.status.presence import Presence
from aioworker.tasks.task import AnyTask
from aioworker.words import count
from aioworker.worker.intake import Flow
from aioworker.worker.recovery import Outage, Stall

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aio_pika.abc import AbstractConnection

    from aioworker.addresses import BrokerAddress
    from aioworker.consumer import Consumer
    from aioworker.limits import Budget
    from aioworker.mysql.database import Database
    from aioworker.rabbitmq.delivery import Delivery

AT_ONCE = 16  # messages of each lane, for a task without a rate limit that needs no database
FLOW_SECONDS = 0.2  # without a message, and the lanes are looked at again
SUSPECT_RETURNS = 3  # deliveries that were not settled, and a message is served alone
ALARM_SECONDS = 30.0  # until the next message, if RabbitMQ confirms no copy
IDLE_SECONDS = 0.9  # between looks at empty lanes: a message is noticed within a second


@dataclass(frozen=True, slots=True)
class Options:
    """How a worker works.

    Args:
        addresses: The nodes of the RabbitMQ cluster.
        burst: End once the lanes are empty, or where no start can be made for now.
        connect_timeout: Seconds for each step with RabbitMQ.
        worker: This worker's name, in connections.
        needs_database: Whether anything of it does.
        stood_still: Returns what did, a moment ago, and cost a connection perhaps.
    """

    addresses: Sequence[BrokerAddress]
    burst: bool
    connect_timeout: float
    worker: str
    needs_database: bool = True
    stood_still: Callable[[], str] = str


class Supervisor:
    """Runs one task's messages until told to stop.

    Args:
        task: The task.
        database: The database that its runs use.
        budget: What says when a start may begin.
        consumer: Takes each delivery through its life.
        presence: Told of every wait.
        options: How it works.
    """

    def __init__(
        self,
        task: AnyTask,
        database: Database,
        budget: Budget,
        consumer: Consumer,
        presence: Presence,
        options: Options,
    ) -> None:
        self.consumer = consumer
        self._task = task
        self._database = database
        self._budget = budget
        self._presence = presence
        self._options = options
        self._trusted = False  # whether task and budget could be used since the last failure
        self._busy = False  # whether it served a message just now
        self._took = False  # whether the last look into the lanes found a message
        self._careful = False  # whether a message that could not be decoded cut this worker off
        self._nodes = Nodes(options.addresses)
        self._broker_outage = Outage("broker", len(self._nodes))
        self._database_outage = Outage("database")
        self._copy_outage = Outage("broker")
        self._stall = Stall(database.timeout + options.connect_timeout)
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
        outage = self._broker_outage
        while not stop.is_set():
            try:
                await self._stall.watch(self._connect_and_serve())
                break
            except BrokerError as error:
                if self._options.burst:
                    raise
                if isinstance(error, StalledError):
                    self._presence.tell(Reason(ReasonKind.STALLED, str(error)))
                else:
                    self._moves()
                    self._presence.tell(self._reason(outage, error))
                await self._presence.keep_if_possible()
                await _first_of(outage.seconds(error), stop)
        return not self.consumer.failures

    async def _connect_and_serve(self) -> None:
        """Connect to RabbitMQ and serve; ends at a stop or with the first broken step."""
        options = self._options
        name = f"{options.worker} {self._task.name}"
        outage = self._database_outage
        async with (
            connected(
                self._nodes, options.connect_timeout, name, careful=self._careful
            ) as connection,
            Publisher(self._nodes, options.connect_timeout, name) as publisher,
        ):
            self._watch(connection)
            lanes = await Lanes.open(connection, self.consumer.queues, options.connect_timeout)
            self._broker_outage.end()
            serving = True
            while serving and not self._stop.is_set():
                self._notice_loss()
                try:
                    await self._look_at_database()
                    with lanes.explaining():
                        serving = await self._serve(Link(lanes, publisher))
                    outage.end()
                except DatabaseError as error:
                    if error.unreachable or self._trusted:
                        # Its address may lead to another server now, or a run spoiled the session.
                        self._database.close()
                    if options.burst:
                        raise
                    self._trusted = False
                    writes = self._database.is_open or not error.unreachable
                    seconds = outage.seconds(error)
                    reason = self._reason(outage, error)
                    await self._back_off(reason, seconds, writes=writes)

    def _reason(self, outage: Outage, error: BrokerError | DatabaseError) -> Reason:
        """Return the reason to wait: a server is not blamed for what this process did."""
        own, reason = self._options.stood_still(), outage.tell(error)
        return replace(reason, words=f"{reason}; {own}") if own else reason

    def _watch(self, connection: AbstractConnection) -> None:
        """Notice a lost connection also while waiting: aio-pika's `closed()` never tells."""
        self._lost = lost = asyncio.Event()

        def notice(_connection: object, error: BaseException | None) -> None:
            self._careful = self._careful or frames.undecodable(error)
            lost.set()

        connection.close_callbacks.add(notice)

    def _notice_loss(self) -> None:
        if self._lost.is_set():
            raise BrokerError("connection to RabbitMQ lost", unreachable=True)

    async def _look_at_database(self) -> None:
        """See that the database answers and that the task can read and write in it.

        Raises:
            DatabaseError: Nothing is taken while that is so.
        """
        if self._options.needs_database and not (self._trusted and self._busy):
            await self._database.ready()
        if not self._trusted:
            await self.consumer.see_database()
            await self.consumer.see_task()

    # 1. Wait for messages, for the budget and the turn; nothing is held meanwhile.

    async def _serve(self, link: Link) -> bool:
        """Wait until a start is due, and serve in one turn; return whether to go on."""
        burst, self._busy = self._options.burst, False
        await self._presence.keep()
        wait = await self._budget.look(self._presence.others)
        self._trusted = True
        if wait is not None and wait.reason.kind.ends_burst:
            if burst:
                raise AioworkerError(str(wait.reason))
            return await self._wait(wait)
        if (seconds := self.consumer.breaker.seconds()) > 0:
            return await self._wait_for_test(min(seconds, POLL_SECONDS))
        # Where a start may begin now, a message just taken is the sign that there are more.
        if not (self._took and wait is None) and not await link.lanes.hold_something(sure=burst):
            self._took = False
            return False if burst else await self._wait_for_messages()
        result: Outcome | None = None
        if wait is None:
            wait, result = await self._serve_due(link)
            self._busy = result is not None
        if wait is not None:
            return await self._wait(wait)
        match result.away if result is not None else None:
            case DatabaseError() as away:
                raise away
            case BrokerError() as refusal:
                await self._sit_out(refusal, link.publisher)
                return not burst
        return True

    async def _serve_due(self, link: Link) -> tuple[Wait | None, Outcome | None]:
        """Serve as a start is due: in the turn if starts are counted.

        Returns:
            Why nothing was served, and what the last delivery came to, if there was one.
        """
        if not self._budget.limited:
            self._stall.due(0)
            return None, await self._serve_unlimited(link)
        self._stall.due(self._budget.interval)
        async with self._budget.turn() as wait:
            return wait, None if wait is not None else await self._serve_in_turn(link)

    async def _wait_for_messages(self) -> bool:
        """Wait as nothing is queued; while the breaker is open, for what was put off."""
        if self.consumer.breaker.reason:
            return await self._wait_for_test(IDLE_SECONDS)
        return await self._wait(Wait(Reason(ReasonKind.EMPTY, "nothing queued"), IDLE_SECONDS))

    async def _wait_for_test(self, seconds: float) -> bool:
        """Wait until the next message may show whether the task works again; end a burst."""
        tried = Reason(ReasonKind.BREAKER, "a few messages a minute are tried")
        wait = Wait(tried, seconds)
        if self._options.burst:
            self._tell_wait(wait)
            return False
        return await self._wait(wait)

    # 2. Take, from the urgent lane first.

    async def _serve_in_turn(self, link: Link) -> Outcome | None:
        """Take messages until one has started; what needs no start goes beside it, free.

        A connection that was lost held the turn: the next message would fail for nothing.

        Returns:
            What the last one came to, if it came to anything.
        """
        starts, result = self.consumer.starts, None
        until = time.monotonic() + POLL_SECONDS
        while self.consumer.starts == starts and not self._stop.is_set():
            result = await self._serve_one(link)
            lost = self._options.needs_database and not self._database.is_open
            if result is None or result.uncounted or lost:
                break
            await self._presence.keep()
            if time.monotonic() >= until:
                break  # a pause is followed, though nothing needs a start
        return result

    async def _serve_unlimited(self, link: Link) -> Outcome | None:
        """Take messages without a limit until the next look at the budget.

        Returns:
            What the last one came to, if it came to anything.
        """
        self._presence.tell(Reason(ReasonKind.RUNNING, self._task.name))
        await self._presence.keep()
        if not self._task.needs_database and not self.consumer.breaker.reason:
            # What comes back again and again is served alone: whatever is held when a worker
            # dies is counted by RabbitMQ, as if it had killed it.
            first = await link.lanes.take()
            self._took = first is not None
            if first is None:
                return None
            if first.returns < SUSPECT_RETURNS:
                return await self._serve_flow(link, first)
            return await self._serve_delivery(first, link)
        # Runs that use the database share one connection: one at a time.
        result, until = None, time.monotonic() + POLL_SECONDS
        while time.monotonic() < until and not self._stop.is_set():
            result = await self._serve_one(link)
            if result is None or result.uncounted:
                break
        return result

    async def _serve_flow(self, link: Link, first: Delivery) -> Outcome | None:
        """Serve messages as RabbitMQ sends them, several at once, until none comes any more."""
        flow = Flow(partial(self._serve_delivery, link=link))
        async with (
            link.lanes.flow(AT_ONCE, flow.ended.set) as arrived,
            flow.serving(first, arrived, 2 * AT_ONCE),
        ):
            look_at = time.monotonic() + POLL_SECONDS
            while not (self._stop.is_set() or self._lost.is_set() or flow.ended.is_set()):
                served = flow.served
                await _first_of(FLOW_SECONDS, self._stop, self._lost, flow.ended)
                self._took = flow.running > 0 or flow.served > served
                if not self._took or self.consumer.breaker.reason:
                    break
                if time.monotonic() < look_at:
                    continue
                self._look_for_stall(flow)
                await self._presence.keep()
                if await self._budget.look() is not None or self._budget.limited:
                    break
                look_at = time.monotonic() + POLL_SECONDS
            await self._let_end(flow)
        return flow.failure

    async def _let_end(self, flow: Flow) -> None:
        """Wait for what runs in a flow, and say so if it does not end: threads may hang."""
        flow.ended.set()
        look_at = time.monotonic() + POLL_SECONDS
        while flow.running:
            await asyncio.sleep(FLOW_SECONDS)
            if time.monotonic() >= look_at:
                self._look_for_stall(flow)
                await self._presence.keep_if_possible()
                look_at = time.monotonic() + POLL_SECONDS

    def _look_for_stall(self, flow: Flow) -> None:
        """Say so where nothing in a flow has ended for longer than it may: threads that hang."""
        seconds = asyncio.get_running_loop().time() - flow.moved
        if flow.running and seconds > self.consumer.longest_run:
            words = f"{count(flow.running, 'run')} without an end, though the time is up"
            self._presence.tell(Reason(ReasonKind.RUN_HANGS, words))
        else:
            self._presence.stalled = False
            self._presence.tell(Reason(ReasonKind.RUNNING, self._task.name))

    async def _serve_one(self, link: Link) -> Outcome | None:
        """Take one message and serve it; return what it came to, None where the lanes are empty."""
        delivery = await link.lanes.take()
        self._took = delivery is not None
        return None if delivery is None else await self._serve_delivery(delivery, link)

    async def _serve_delivery(self, delivery: Delivery, link: Link) -> Outcome:
        self._moves()
        result = await self.consumer.serve(delivery, link)
        if result.kind is not Kind.RELEASED:
            self._copy_outage.end()
        return result

    def _moves(self) -> None:
        """Note that this worker does not stand still."""
        self._stall.moves()
        self._presence.stalled = False

    async def _wait(self, wait: Wait) -> bool:
        """Wait, saying why; a stop or a lost connection ends it early. Return whether to go on.

        Raises:
            BrokerError: The connection to RabbitMQ was lost.
            DatabaseError: The worker's row cannot be written.
        """
        self._tell_wait(wait)
        await self._presence.keep()
        await _first_of(wait.seconds, self._stop, self._lost)
        if not self._stop.is_set():
            self._notice_loss()
        return not self._stop.is_set()

    def _tell_wait(self, wait: Wait) -> None:
        """Say why it waits; while the breaker is open, that first, unless somebody paused it."""
        reason, breaker = wait.reason, self.consumer.breaker.reason
        if reason.kind is not ReasonKind.TURN_UNOWNED:
            self._moves()
        if breaker and reason.kind not in (ReasonKind.PAUSED, ReasonKind.TWO_SERVERS):
            reason = Reason(ReasonKind.BREAKER, f"breaker open: {breaker}; {reason}")
        self._presence.tell(reason)

    async def _sit_out(self, refusal: BrokerError, publisher: Publisher) -> None:
        """Wait after a copy that was not taken, following what is set at run time meanwhile.

        If RabbitMQ took none for want of memory or disk, no longer than that lasts.

        Raises:
            DatabaseError: The budget cannot be looked at.
        """
        if self._options.burst:
            return
        seconds = ALARM_SECONDS if refusal.unreachable else self._copy_outage.seconds(refusal)
        until = time.monotonic() + seconds
        unblocked = asyncio.ensure_future(publisher.unblocked())
        await asyncio.sleep(0)
        blocked = not unblocked.done()
        try:
            while not self._stop.is_set() and (left := until - time.monotonic()) > 0:
                if blocked and unblocked.done():
                    break
                seconds, writes = min(left, POLL_SECONDS), self._database.is_open
                words = f"copy not confirmed: {refusal}"
                reason = Reason(ReasonKind.COPY_NOT_CONFIRMED, words)
                await self._back_off(reason, seconds, writes=writes)
                await self._budget.look()
        finally:
            unblocked.cancel()

    async def _back_off(self, reason: Reason, seconds: float, *, writes: bool) -> None:
        """Wait after a failure that leaves the connection to RabbitMQ as it is, saying why.

        Args:
            reason: Why.
            seconds: How long.
            writes: Whether the database can be had, to write the reason into the worker's row.
        """
        self._moves()
        if self._options.burst:
            return
        self._presence.tell(reason)
        if writes:
            await self._presence.keep_if_possible()
        await _first_of(seconds, self._stop, self._lost)
        self._notice_loss()


async def _first_of(seconds: float, *events: asyncio.Event) -> None:
    """Return when one of *events* is set, or after *seconds*."""
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
