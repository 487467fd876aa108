"""How often one row of the budget lets something start, as one worker follows it.

A task has a row; so has a budget that tasks share, under the key `budget:NAME`, which is no task's
name. A start is charged to both.
"""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

from aioworker.budget.other_server import OtherServer
from aioworker.limits import Limiter, NoLimit, RateLimit, in_force, next_start
from aioworker.logs import fields
from aioworker.reasons import Reason, ReasonKind

if TYPE_CHECKING:
    from datetime import datetime

    from aioworker.budget.tables import Row

log = logging.getLogger(__name__)

_KEY = "budget:"


def budget_key(name: str) -> str:
    """Return the key of a shared budget's row."""
    return _KEY + name


def budget_name(key: str) -> str | None:
    """Return the name of the shared budget that a row is of; None for a task's row."""
    return key.removeprefix(_KEY) if key.startswith(_KEY) else None


class Look(NamedTuple):
    """What a row says of the next start.

    Args:
        seconds: Until it may be charged; below 0 where it might have been so long ago.
        write_in_us: Microseconds until it may first write.
    """

    seconds: float
    write_in_us: int


class Pace:
    """A row's rate, and the wait for it in this process.

    Args:
        key: The row's key.
        own: The rate where the row says nothing; None is no limit.

    Attributes:
        gap_us: The interval between starts as of the last look; None without a limit.
        limiter: The wait for it in this process; None where there never was a limit.
        other_server: Whether another server writes the row.
        force: What is in force, as of the last look.
    """

    def __init__(self, key: str, own: RateLimit | None) -> None:
        self.key = key
        self.own = in_force(own or NoLimit.NONE)
        self.gap_us: int | None = None
        self.limiter: Limiter | None = None
        self.other_server = OtherServer()
        self.force = self.own
        self._limit = own or NoLimit.NONE
        self._shown = self.own.rate
        self._budget = budget_name(key)

    @property
    def interval(self) -> float:
        """Seconds between two starts; 0 without a limit."""
        return (self.gap_us or 0) / 1e6

    @property
    def words(self) -> str:
        """What a reason names it: the budget that is shared, or nothing."""
        return f"budget {self._budget}: " if self._budget else ""

    async def follow(self, row: Row) -> None:
        """Take over the row's rate, and log what is new."""
        self.force = force = in_force(self._limit, row=row)
        self.gap_us = force.gap_us
        if self.gap_us is not None:
            if self.limiter is None:
                self.limiter = Limiter(self.interval)
            elif self.limiter.interval != self.interval:
                await self.limiter.change(self.interval)
        limit = "paused" if row.paused else force.rate
        if limit != self._shown:
            by, why = row.set_by, row.set_why
            if "paused" in (limit, self._shown):
                by, why = row.paused_by, row.paused_why
            whose = {"budget": self._budget} if self._budget else {"task": self.key}
            log.warning(
                "rate limit changed",
                extra=fields(
                    **whose, old=self._shown, new=limit, by=by or "unknown", why=why or "not said"
                ),
            )
            self._shown = limit

    def look(self, row: Row, usual_us: int) -> Look:
        """Return when the next start may be charged, and first write.

        Args:
            row: The row, just read.
            usual_us: Microseconds from a charge to its first write, usually.
        """
        if self.gap_us is None or self.limiter is None:
            return Look(0.0, 0)
        write_in_us = self.gap_us - row.write_age_us
        due_in_us = max(self.gap_us - row.charge_age_us, write_in_us - usual_us)
        left = self.limiter.due_in()  # never below 0
        return Look(max(due_in_us / 1e6, left) if left else due_in_us / 1e6, write_in_us)

    def paused(self, words: str) -> Reason:
        """Return the reason to begin nothing, by what is said of the pause."""
        return Reason(ReasonKind.PAUSED, self.words + words)

    def reason(self, now: datetime, seconds: float) -> Reason:
        """Return the reason to wait for a start that is due in so many seconds."""
        return next_start(now + timedelta(seconds=seconds), self._budget)
