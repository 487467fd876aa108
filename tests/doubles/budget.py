"""A budget in memory, by the event loop's clock.

`tests/services/test_budgets.py` holds it, and both real ones, to what a worker relies on.
"""

from __future__ import annotations

import asyncio
import math
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from aioworker.clock import own_time
from aioworker.errors import DatabaseError
from aioworker.limits import POLL_SECONDS, End, RateLimit, Wait, lead_seconds, next_start
from aioworker.reasons import Reason, ReasonKind

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from datetime import datetime

TAKEN = Wait(Reason(ReasonKind.TURN, "turn: held by another worker"), 0.05)


class MemoryBudget:
    """What all workers of a task may start together, as far as one process can tell.

    Args:
        rate: How often the task may start, such as `2/m`; None is no limit.
        gather_seconds: How long before a start is due messages are gathered for it, at most.

    Attributes:
        refusal: Why no start begins, if it is one of its own; an error is raised.
        holder: Why the turn cannot be had; None while nobody else has it.
        died: How often a worker died while a message ran, by the message's key.
        noted: The keys of what was noted while it was read.
        charged: The keys of what was charged, in that order.
        starts: How many messages each start had.
        moments: When each was, by the event loop's clock.
        forgotten: The keys of what ended, in that order.
        ends: What each start came to.
        shares: Whether other tasks share it.
        wants: What was said to wait in the lanes, urgent and bulk.
        most: With how many a message may run, by its key.
        stop: Why the run that is on may begin no further transaction.
        asked: How often somebody looked.
        turns: How many turns are held now.
        resting: Whether who has the turn only waits.
        bulk_next: As for `TaskBudget`.
    """

    def __init__(self, rate: str | None = None, gather_seconds: float = 0.0) -> None:
        self._gather_seconds = gather_seconds
        self.rate = None if rate is None else RateLimit.parse(rate)
        self.refusal: Wait | DatabaseError | None = None
        self.holder: Wait | None = None
        self.died: dict[str, int] = {}
        self.most: dict[str, int] = {}
        self.noted: list[str] = []
        self.charged: list[str] = []
        self.starts: list[int] = []
        self.moments: list[float] = []
        self.forgotten: list[str] = []
        self.ends: list[End] = []
        self.shares = False
        self.wants: list[tuple[bool, bool]] = []
        self.stop: Reason | None = None
        self.asked = 0
        self.turns = 0
        self.resting = False
        self.bulk_next = False

    @property
    def limited(self) -> bool:
        """Whether starts are counted."""
        return self.rate is not None and not self.rate.paused

    @property
    def interval(self) -> float:
        """Seconds between two starts; 0 without a limit."""
        return 0.0 if self.rate is None else self.rate.interval

    def now(self) -> datetime:
        """Return the time of day, UTC."""
        return own_time()

    async def check(self, contenders: int = 0) -> Wait | None:
        """Return why no start may begin now."""
        self.asked += 1
        if isinstance(self.refusal, DatabaseError):
            raise self.refusal
        if self.refusal is not None:
            return self.refusal
        if self.rate is not None and self.rate.paused:
            return Wait(Reason(ReasonKind.PAUSED, f"paused: rate limit {self.rate}"), POLL_SECONDS)
        seconds = self._due_in()
        lead = lead_seconds(self._gather_seconds, self.interval)
        if seconds <= lead:
            return None
        reason = next_start(self.now() + timedelta(seconds=seconds))
        return Wait(reason, min(seconds - lead, POLL_SECONDS))

    @property
    def due_at(self) -> float:
        """When the next start is due, by the event loop's clock."""
        return asyncio.get_running_loop().time() + max(self._due_in(), 0)

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[Wait | None]:
        """Hold the turn; the value is why not."""
        if self.holder is not None:
            yield self.holder
            return
        if self.limited and self.turns:
            yield TAKEN
            return
        self.turns += 1
        try:
            yield await self.check()
        finally:
            self.turns -= 1

    def deaths(self, message: str) -> int:
        """Return how often a worker died while a message ran."""
        return self.died.get(message, 0)

    def together(self, message: str) -> int | None:
        """Return with how many a message may run."""
        return self.most.get(message)

    async def rest(self, *, resting: bool) -> None:
        """Only wait from now on."""
        self.resting = resting

    @asynccontextmanager
    async def reading(self, message: str) -> AsyncIterator[None]:
        """Note what is read."""
        self.noted.append(message)
        yield

    async def charge(
        self, messages: Sequence[str], *, ids: int | None = None, bulk_next: bool = False
    ) -> Wait | None:
        """Begin a start, at the moment it is due; return why not."""
        if isinstance(self.refusal, DatabaseError):
            raise self.refusal
        if self.refusal is not None:
            return self.refusal
        if (seconds := self._due_in()) > 0:
            await asyncio.sleep(seconds)
        self.bulk_next = bulk_next
        self.charged += messages
        self.starts.append(len(messages))
        self.moments.append(asyncio.get_running_loop().time())
        return None

    async def stops_run(self) -> Reason | None:
        """Return why no further transaction may begin."""
        return self.stop

    async def want(self, *, urgent: bool, bulk: bool) -> None:
        """Note what waits in the lanes."""
        self.wants.append((urgent, bulk))

    async def ended(self, messages: Sequence[str], end: End | None = None) -> None:
        """Note that messages are settled, and their worker lives."""
        self.forgotten += messages
        if end is not None:
            self.ends.append(end)
        for message in messages:
            self.died.pop(message, None)

    def _due_in(self) -> float:
        last = self.moments[-1] if self.moments else -math.inf
        return last + self.interval - asyncio.get_running_loop().time()
