"""Who runs beside whom in one process: all of them, unless one is to run alone."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class Gate:
    """Lets runs through: any number at once, or one alone.

    A message whose worker died while it ran may have killed it, or may have run beside the one
    that did. Alone, it shows which.
    """

    def __init__(self) -> None:
        self._door = asyncio.Lock()
        self._empty = asyncio.Event()
        self._empty.set()
        self._inside = 0

    @property
    def busy(self) -> bool:
        """Whether anything runs."""
        return self._inside > 0 or self._door.locked()

    @asynccontextmanager
    async def through(self) -> AsyncIterator[None]:
        """Run beside others, after one that is to run alone."""
        async with self._door:
            self._inside += 1
            self._empty.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._empty.set()

    @asynccontextmanager
    async def alone(self, patience: float) -> AsyncIterator[None]:
        """Run alone: no other run begins, and those that run are waited for.

        Args:
            patience: Seconds to wait for them; one that does not end is run beside.
        """
        async with self._door:
            with suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    await self._empty.wait()
            yield
