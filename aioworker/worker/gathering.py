"""Several messages in one start: taken one after the other in its turn, until it is full or due.

What of them needs writing is asked in few reads; what needs nothing is settled on the way. A
start that cannot begin gives all that it holds back to RabbitMQ.
"""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING

from aioworker.budget.first_write import Usual
from aioworker.errors import DatabaseError
from aioworker.limits import LEAD_SECONDS, POLL_SECONDS
from aioworker.reasons import Reason, ReasonKind
from aioworker.settling.outcome import Kind, Outcome
from aioworker.settling.start import MOST_MESSAGES, Held, Start
from aioworker.words import count

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine
    from typing import Any

    from aioworker.rabbitmq.delivery import Delivery
    from aioworker.rabbitmq.lanes import Lanes
    from aioworker.worker.prefetch import Prefetch
    from aioworker.worker.session import Worker


class Gathering:
    """Fills and serves the starts of one session, one after the other.

    Args:
        worker: What serves.
        lanes: Where messages come from.
        stop: Set when the worker is to end.
        take: Takes up to so many more messages at once; none where there is none.
        wait: Waits for more messages, so many seconds at most.
    """

    def __init__(
        self,
        worker: Worker,
        lanes: Lanes,
        stop: asyncio.Event,
        take: Callable[[int], Coroutine[Any, Any, list[Delivery]]],
        wait: Callable[[float], Awaitable[None]],
    ) -> None:
        self._worker = worker
        self._lanes = lanes
        self._stop = stop
        self._take = take
        self._wait = wait
        self._time = asyncio.get_running_loop().time
        self._reading = Usual()  # what needs writing, of as many messages as one read is for
        self._unread: list[Held] = []  # those held messages that no read was for yet
        self._ids = 0  # that those name
        self._ahead: asyncio.Task[list[Delivery]] | None = None  # come while others are read

    async def serve(self, first: Delivery, prefetch: Prefetch) -> Outcome | None:
        """Fill a start, run it, and settle each of its messages.

        Args:
            first: Its first message.
            prefetch: Asks for the first message of the next one.

        Returns:
            What the last message that was settled came to, or why all went back; None if nothing
            is to be done about it.

        Raises:
            DatabaseError: The budget cannot be looked at.
            BrokerError: The connection is lost, or a message could not be settled.
        """
        worker, consumer = self._worker, self._worker.consumer
        # One message shows whether the task works again.
        with consumer.starting(1 if consumer.breaker.reason else MOST_MESSAGES) as start:
            try:
                outcome = await self._fill(start, first)
                await self._give_back_ahead()
                await worker.budget.rest(resting=False)
            except DatabaseError as error:
                await self._give_back(start, str(error))
                await self._give_back_ahead()
                raise
            finally:
                self._leave_ahead()
            if start.held:
                prefetch.begin_run(start)
                outcome = await consumer.run(start, self._lanes)
        return outcome

    async def _fill(self, start: Start, first: Delivery) -> Outcome | None:
        """Hold messages until the start is full or due; give them back if it cannot begin.

        Returns:
            As `serve`, if nothing is held any more.
        """
        budget, began = self._worker.budget, self._time()
        has_turn = budget.limited and not self._worker.lost_database
        look_at = began + POLL_SECONDS
        self._unread, self._ids = [], 0
        settled = await self._open(start, first)
        while start.held:
            if (reason := self._hindrance(settled, has_turn=has_turn)) is not None:
                await self._give_back(start, reason)
                break
            now, spare = self._time(), self._spare
            due_at = budget.due_at - spare
            # If it is due already, what lies in the lanes is taken, but not for long.
            until, read = began + spare, self._reading.seconds
            # Behind a read, one more message means one more read.
            late = now > max(due_at - read, until if self._unread else until - read)
            room = 0 if late or now >= look_at else start.room(self._ids)
            if came := await self._next(start, room):
                settled = await self._open_each(start, came)
            elif self._unread:
                settled = await self._read(start)
            elif now >= look_at:
                settled = await self._look()
                look_at = self._time() + POLL_SECONDS
            elif (seconds := due_at - self._time()) > 0:
                await self._wait_for_more(start, seconds)
            else:
                break
        return settled

    def _hindrance(self, settled: Outcome | None, *, has_turn: bool) -> str | None:
        """Return why a start cannot begin with what it holds, after its last step.

        Args:
            settled: What that came to.
            has_turn: Whether the connection to the database holds the turn.
        """
        if settled is not None and settled.uncounted:
            return settled.reason
        if has_turn and self._worker.lost_database:
            return "the connection to the database is lost"
        return "the worker ends" if self._stop.is_set() else None

    @property
    def _spare(self) -> float:
        """How much of the wait for a start is left to its charge, in seconds."""
        budget = self._worker.budget
        return min(LEAD_SECONDS, budget.interval / 20) if budget.limited else math.inf

    async def _next(self, start: Start, room: int) -> list[Delivery]:
        """Take messages; without a rate, ask for the next ones while these are read.

        Args:
            start: What is to hold them.
            room: How many may be asked for; 0 for none.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            came = await self._take(room) if room else []
        else:
            came = await ahead
        # Behind a large one the next may be as large.
        small = not any(one.large for one in came)
        if came and room and small and not self._worker.budget.limited:
            more = start.room(self._ids, len(came))
            if more > 1:
                self._ahead = asyncio.create_task(self._take(more))
        return came

    async def _give_back_ahead(self) -> None:
        """Give back what came for a start that takes no more."""
        ahead, self._ahead = self._ahead, None
        for delivery in [] if ahead is None else await ahead:
            await delivery.give_back()

    def _leave_ahead(self) -> None:
        """Leave what comes, where the connection ends: it goes back with that."""
        if self._ahead is not None:
            self._ahead.cancel()
            self._ahead.add_done_callback(lambda one: one.cancelled() or one.exception())
            self._ahead = None

    async def _open_each(self, start: Start, came: list[Delivery]) -> Outcome | None:
        """Hold messages that came at once, as `_open` does; those without room go back."""
        settled = None
        while came and start.has_room(self._ids) and (settled is None or not settled.uncounted):
            if self._ahead is not None:
                await asyncio.sleep(0)  # lets it be sent
            settled = await self._open(start, came.pop(0))
        for delivery in came:
            await delivery.give_back()
        return settled

    async def _open(self, start: Start, delivery: Delivery) -> Outcome | None:
        """Hold a message, if it goes with the others.

        Args:
            start: What holds them.
            delivery: The message.

        Returns:
            What it came to, if it is settled.
        """
        consumer = self._worker.consumer
        settled = await consumer.open(start, delivery, self._lanes)
        if settled is not None:
            return None if settled.kind is Kind.MOVED and not settled.failed else settled
        one = start.held[-1]
        if start.fits(one):
            start.together = min(start.together, one.most)
            self._unread.append(one)
            self._ids += one.ids
        else:
            # It is the first of the next start.
            await consumer.give_back(start, [one], "it fits no other", self._lanes)
            start.closed = True
        return None

    async def _read(self, start: Start) -> Outcome | None:
        """Ask what of the messages that came needs writing; those that need nothing are settled."""
        began, unread = self._time(), self._unread
        self._unread, self._ids = [], 0
        await self._worker.budget.rest(resting=False)
        settled = await self._worker.consumer.need(start, unread, self._lanes)
        self._reading.took(self._time() - began)
        return settled

    async def _look(self) -> Outcome | None:
        """Return why no start may begin any more: somebody paused the task, say."""
        worker = self._worker
        await worker.presence.keep()
        wait = await worker.budget.check()
        return None if wait is None else Outcome(Kind.RELEASED, str(wait.reason))

    async def _wait_for_more(self, start: Start, seconds: float) -> None:
        """Say that it gathers, and wait for more messages, or until the start is due."""
        ids = count(len(start.rows), "id")
        words = f"gathering: {count(len(start.held), 'message')}, {ids} to write"
        self._worker.presence.report(Reason(ReasonKind.GATHERING, words))
        await self._worker.budget.rest(resting=True)
        await self._wait(seconds)

    async def _give_back(self, start: Start, reason: str) -> None:
        await self._worker.consumer.give_back(start, start.held, reason, self._lanes)
