"""After a failure: how long to wait, and how a worker notices that it stands still."""

from __future__ import annotations

import asyncio
import math
import random
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from aioworker.errors import StalledError
from aioworker.reasons import Reason
from aioworker.status.errors import kind_of

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any

    from aioworker.errors import BrokerError, DatabaseError

FIRST_SECONDS = 0.5
# A start begins again within 10 s of a broker that is back, within 5 s of a database.
LONGEST_AWAY_SECONDS = 3.0
# A server that answers and refuses: asking often mends nothing.
LONGEST_REFUSED_SECONDS = 30.0
HEALED_SECONDS = 30.0  # a server that answered for so long is asked soon again
STALL_SECONDS = 10.0  # a worker stands still after two intervals, and not before this
WATCH_SECONDS = 1.0


class Outage:
    """A server that cannot be used: since when, and how long to wait before the next try.

    It ends when the server answers again. The waits grow on, unless it stays so for a while: one
    that answers and is gone a moment later is not asked in a hurry.

    Args:
        what: `broker` or `database`.
        nodes: How many there are of it: each is tried once without a wait.
        clock: Returns seconds that only ever grow.
    """

    def __init__(
        self, what: str, nodes: int = 1, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._what = what
        self._nodes = nodes
        self._clock = clock
        self._failures = 0
        self._since: datetime | None = None
        self._healed_at = math.inf

    def end(self) -> None:
        """The server can be used again, or still can."""
        self._since = None
        self._healed_at = min(self._healed_at, self._clock())

    def seconds(self, error: BrokerError | DatabaseError) -> float:
        """Return the next wait: longer each time, at random so that workers come apart."""
        if self._clock() - self._healed_at > HEALED_SECONDS:
            self._failures = 0
        self._healed_at = math.inf
        self._failures += 1
        if self._failures < self._nodes:
            return 0.0
        return _backoff(
            self._failures - self._nodes + 1,
            LONGEST_AWAY_SECONDS if error.unreachable else LONGEST_REFUSED_SECONDS,
        )

    def tell(self, error: BrokerError | DatabaseError) -> Reason:
        """Return the reason to wait: since when, where the server itself is away."""
        if not error.unreachable:
            self._since = None
            return Reason(kind_of(error), str(error))
        self._since = self._since or datetime.now(UTC)
        words = f"{self._what} unreachable since {self._since:%H:%M:%S} UTC: {error}"
        return Reason(kind_of(error), words)


def _backoff(failures: int, longest: float) -> float:
    """Return seconds between 0.1 and a bound that doubles: full jitter."""
    return random.uniform(0.1, min(longest, FIRST_SECONDS * 2.0 ** min(failures, 10)))


class Stall:
    """Notices that messages wait, a start is due, and nothing starts.

    Whoever serves says when a start is due (`due`) and when it got anywhere (`moves`); each
    wait with a reason of its own is getting somewhere.

    Args:
        patience: Seconds that one step of whoever serves may take by its own timeouts.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._limit = STALL_SECONDS
        self._since: float | None = None

    def due(self, interval: float) -> None:
        """Messages wait and a start is due.

        Args:
            interval: Seconds between two starts.

        Raises:
            StalledError: That is so for two intervals now, and for ten seconds.
        """
        self._limit = max(2 * interval, STALL_SECONDS)
        if self._since is None:
            self._since = asyncio.get_running_loop().time()
        self._check(0.0)

    def moves(self) -> None:
        """There is nothing to do, or it is being done, or it is known why not."""
        self._since = None

    async def watch(self, work: Coroutine[Any, Any, None]) -> None:
        """Do the work of whoever serves; cut it off where one step of it never ends.

        Raises:
            StalledError: It was cut off.
        """
        serving = asyncio.create_task(work)
        try:
            while not serving.done():
                await asyncio.wait({serving}, timeout=WATCH_SECONDS)
                if not serving.done():
                    self._check(self._patience)
            serving.result()
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)

    def _check(self, patience: float) -> None:
        if self._since is None:
            return
        seconds = asyncio.get_running_loop().time() - self._since
        if seconds > self._limit + patience:
            self._since = None
            raise StalledError(
                f"stalled: messages wait and the budget is free, but nothing started for"
                f" {seconds:.0f} s; connecting anew"
            )
