"""Rate limits: how often a task may start, and the wait that keeps to it.

A limit is written as in Celery: ``"2/m"`` is one start every 30 seconds. The limiter
holds inside one process: two workers with ``"2/m"`` start up to four tasks a minute.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass

from aiolimiter import AsyncLimiter

from aioworker.errors import RateLimitError

PERIODS = {"s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True, slots=True)
class RateLimit:
    """How often a task may start: *starts* times in every period of *unit*.

    Starts are evenly spaced and idle time is not saved up: a sweep that begins after a
    quiet hour does not begin with a burst of writes.

    Args:
        starts: Starts allowed in one period; 0 pauses the task.
        unit: `s`, `m` or `h`: a second, a minute, an hour.
    """

    starts: int
    unit: str

    @classmethod
    def parse(cls, text: str) -> RateLimit:
        """Read COUNT/UNIT, such as ``"2/m"``; ``"0/m"`` is paused, never unlimited.

        Raises:
            RateLimitError: The text is anything else, what Celery takes for it included
                (`"2"`, `"2/min"`, `"nan/m"`).
        """
        match = re.fullmatch(r"([0-9]{1,9})/([smh])", text)
        if match is None:
            raise RateLimitError(f"expected rate limit as COUNT/UNIT, such as '2/m', got: {text!r}")
        return cls(int(match[1]), match[2])

    @property
    def paused(self) -> bool:
        """Whether nothing may start at all."""
        return self.starts == 0

    @property
    def interval(self) -> float:
        """Seconds from one start to the next at least; infinite when paused."""
        return PERIODS[self.unit] / self.starts if self.starts else float("inf")

    def __str__(self) -> str:
        return f"{self.starts}/{self.unit}"


class Limiter:
    """The wait for a rate limit, inside one process and one event loop.

    It forgets everything when the process ends: a worker that is restarted may start at
    once. Nothing is held while waiting: look at `due_in`, sleep, look again, and `charge`
    at the moment the start begins.
    """

    def __init__(self, rate: RateLimit) -> None:
        self.rate = rate
        # One start at a time: AsyncLimiter(starts, period) would let nearly twice the
        # limit through in the first period.
        self._limiter = None if rate.paused else AsyncLimiter(1, rate.interval)
        self._free_at = 0.0

    def due_in(self) -> float:
        """Return the seconds until a start is due: 0 when one is, infinite when paused."""
        if self._limiter is None:
            return float("inf")
        if self._limiter.has_capacity():
            return 0.0
        # The limiter's arithmetic may lag behind ours by a rounding error: never 0 here.
        return max(self._free_at - asyncio.get_running_loop().time(), 0.001)

    async def charge(self) -> None:
        """Take one start; returns at once when one is due."""
        if self._limiter is None:
            raise RateLimitError(f"expected a rate that starts anything, got: '{self.rate}'")
        await self._limiter.acquire()
        self._free_at = asyncio.get_running_loop().time() + self.rate.interval
