"""What a worker knows of failures: how long to wait, and whether it stands still."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable
from datetime import UTC, datetime

from aioworker.errors import BrokerError, DatabaseError
from aioworker.reasons import Reason, ReasonKind
from aioworker.status.presence import kind_of

FIRST_SECONDS = 0.5
# A start begins again within 10 s of a broker that is back, within 5 s of a database.
LONGEST_AWAY_SECONDS = 3.0
# A server that answers and refuses: asking often mends nothing.
LONGEST_REFUSED_SECONDS = 30.0
HEALED_SECONDS = 30.0  # a server that answered for so long is asked soon again
STALL_SECONDS = 10.0  # a worker stands still after two intervals, and not before this


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
        longest = LONGEST_AWAY_SECONDS if error.unreachable else LONGEST_REFUSED_SECONDS
        doublings = min(self._failures - self._nodes + 1, 10)
        # Full jitter up to a bound that doubles each time.
        return random.uniform(0.1, min(longest, FIRST_SECONDS * 2.0**doublings))

    def reason(self, error: BrokerError | DatabaseError) -> Reason:
        """Return the reason to wait: since when, where the server itself is away."""
        if not error.unreachable:
            self._since = None
            return Reason(kind_of(error), str(error))
        self._since = self._since or datetime.now(UTC)
        words = f"{self._what} unreachable since {self._since:%H:%M:%S} UTC: {error}"
        return Reason(kind_of(error), words)


class Stall:
    """Notices that a start is due, and somebody unknown holds the turn all the time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since: float | None = None

    def end(self) -> None:
        """The turn was had."""
        self._since = None

    def judge(self, reason: Reason, interval: float) -> Reason:
        """Return the reason to wait, or that nothing starts, after two intervals of it.

        Args:
            reason: Why the worker waits.
            interval: Seconds between two starts.
        """
        if reason.kind is not ReasonKind.TURN_UNOWNED:
            self._since = None
            return reason
        if self._since is None:
            self._since = self._clock()
        seconds = self._clock() - self._since
        if seconds <= max(2 * interval, STALL_SECONDS):
            return reason
        words = (
            "stalled: messages wait and the budget is free, but nothing started for"
            f" {seconds:.0f} s; {reason}"
        )
        return Reason(ReasonKind.STALLED, words)


class Recovery:
    """What one worker knows of failures, over all its connections.

    Args:
        nodes: How many nodes RabbitMQ has.
        patience: Seconds that one step of the worker may take by its own timeouts.
        stood_still: Returns what stood still a moment ago, and cost a connection perhaps.

    Attributes:
        broker: RabbitMQ's outage.
        database: The database's.
        copies: RabbitMQ's, for copies of messages.
        stall: Whether nothing starts, for no reason that is known.
        patience: As above.
        trusted: Whether task and budget could be used since the last failure.
        due_by: When the step that is on has to end, by the event loop's clock; never before the
            first one and behind the last one.
    """

    def __init__(
        self, nodes: int, patience: float, stood_still: Callable[[], str] = lambda: ""
    ) -> None:
        self.broker = Outage("broker", nodes)
        self.database = Outage("database")
        self.copies = Outage("broker")
        self.stall = Stall()
        self.patience = patience
        self.trusted = False
        self.due_by = math.inf
        self._stood_still = stood_still

    def progress(self, seconds: float = 0.0) -> None:
        """Note that the worker has come to its next step.

        Args:
            seconds: How long that waits on purpose.
        """
        self.due_by = asyncio.get_running_loop().time() + seconds + self.patience

    def reason(self, outage: Outage, error: BrokerError | DatabaseError) -> Reason:
        """Return the reason to wait: a server is not blamed for what this process did."""
        reason, own = outage.reason(error), self._stood_still()
        return reason._replace(words=f"{reason}; {own}") if own else reason
