"""A clock that a test moves: the only thing that is not real here."""

from __future__ import annotations

import asyncio


class FakeClock:
    """Stands in for the time of an event loop; seconds pass when `advance` says so."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.now = 0.0
        self._loop = loop
        loop.time = lambda: self.now  # type: ignore[method-assign]

    async def advance(self, seconds: float, step: float = 1.0) -> None:
        """Move the clock in steps, letting what is due run before and after each."""
        end = self.now + seconds
        while True:
            for _ in range(5):
                await asyncio.sleep(0)
            if self.now >= end:
                return
            self.now = min(self.now + step, end)
