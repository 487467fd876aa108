"""A start: the messages that it holds, what of them is to be written, and what that came to."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aioworker.errors import RunStoppedError
from aioworker.rabbitmq.lanes import CHANNELS
from aioworker.settling.outcome import UNDECIDED, Kind, Outcome
from aioworker.settling.rows import Ids

if TYPE_CHECKING:
    from datetime import datetime

    from aioworker.rabbitmq.delivery import Delivery
    from aioworker.reasons import Reason
    from aioworker.settling.failure import Failure
    from aioworker.settling.rows import Rows
    from aioworker.tasks.context import Context

MOST_MESSAGES = 1000
AT_ONCE = CHANNELS  # messages, over one each: the wait for RabbitMQ is no more the most of it then
MOST_BYTES = 8 * 1024 * 1024  # of all messages together; the last one may be larger


@dataclass(slots=True, eq=False)
class Held:
    """A message in hand.

    Args:
        delivery: The delivery.
        ctx: What a run of it alone gets; its log line counts what that counts.
        args: The positional arguments as the task's function gets them, once they are checked; of
            a chunk only what is to be written, once that is known.
        kwargs: Its keyword arguments, likewise.
        ids: How many ids or rows it names.
        constants: What is passed behind them, as JSON has it.
        seconds: How long its publisher lets it run; None leaves that to the worker.
        most: With how many it may run at most, itself among them.
        expires: When it is too late to begin; None for never.
        bytes: What it keeps in memory: its body, and of rows the text that they were read from.
        read: Seconds that were spent in asking what of it, and of nothing else, needs writing.
        taken: When it was taken, by the monotonic clock.
        again: Whether its run had ended before, and could not be settled then.
        failure: What went wrong, if something did.
        outcome: What it comes to.
        settled: Whether RabbitMQ knows that.
    """

    delivery: Delivery
    ctx: Context
    args: list[Any] = field(default_factory=list)
    kwargs: dict[str, Any] = field(default_factory=dict)
    ids: int = 0
    constants: tuple[list[Any], dict[str, Any]] = field(default_factory=lambda: ([], {}))
    seconds: float | None = None
    most: int = MOST_MESSAGES
    expires: datetime | None = None
    bytes: int = 0
    read: float = 0.0
    taken: float = field(default_factory=time.monotonic)
    again: bool = False
    failure: Failure | None = None
    outcome: Outcome = UNDECIDED
    settled: bool = False

    @property
    def gone(self) -> bool:
        """Whether it is settled, and does not come again as it was."""
        return self.settled and self.outcome.kind not in (Kind.RELEASED, Kind.MOVED)


@dataclass(slots=True, eq=False)
class Start:
    """What every step of a start takes.

    Times are the monotonic clock's; 0 is for what has not happened.

    Args:
        rows: What they ask for, and what of that is to be written.
        most: How many messages it may hold, at most.
        size: How many ids are to be written, before it takes no more messages.
        together: How many those allow that it holds.
        held: Its messages that are not settled.
        closed: Whether it takes no more messages, whatever room it has.
        runs: Those that run together.
        ctx: What their run gets, or the read of what needs nothing.
        counts: What reads of several messages have counted, that some of them needed.
        limit: Ends the step that is on when its time is up.
        seconds: How long that may take.
        began: When its run began.
        ended: When its last step ended.
        cut_off: Whether that ended because its time was up.
        stopped: Why its run may begin no further transaction; None if it may.
    """

    rows: Ids | Rows
    most: int = 1
    size: int = 1
    together: int = MOST_MESSAGES
    held: list[Held] = field(default_factory=list)
    closed: bool = False
    runs: list[Held] = field(default_factory=list)
    ctx: Context | None = None
    counts: Counter[str] = field(default_factory=Counter)
    limit: asyncio.Timeout = field(default_factory=lambda: asyncio.Timeout(None))
    seconds: float = 0.0
    began: float = 0.0
    ended: float = 0.0
    cut_off: bool = False
    stopped: Reason | None = None
    _bytes: int = 0
    _largest: int = 1

    @property
    def urgent(self) -> bool:
        """Whether it holds nothing of the bulk lane: that goes first in the next start."""
        return all(one.delivery.lane == "urgent" for one in self.held)

    def may_take(self, seconds: float, spent: float = 0.0) -> asyncio.Timeout:
        """Let the next step take so long, less what was spent before."""
        self.seconds, self.limit, self.cut_off = seconds, asyncio.timeout(seconds - spent), False
        return self.limit

    def refuse_stopped(self) -> None:
        """See that the run may begin a further transaction, and be done.

        Raises:
            RunStoppedError: It may not: what it has committed stays.
        """
        if self.stopped is not None:
            raise RunStoppedError(f"no further transaction in this run: {self.stopped.words}")

    def weigh(self, one: Held) -> None:
        """Count what the message that was taken last keeps in memory."""
        self._bytes += one.bytes
        self._largest = max(self._largest, one.ids)

    def let_go(self) -> None:
        """Hold those messages no longer whose outcome is decided."""
        self.held = [one for one in self.held if one.outcome is UNDECIDED]
        self._bytes = sum(one.bytes for one in self.held)
        self.together = min((one.most for one in self.held), default=MOST_MESSAGES)

    # Which messages go together.

    def has_room(self, unread: int = 0) -> bool:
        """Whether it may take one more message.

        Args:
            unread: Ids or rows of which it is not known yet whether they are to be written.
        """
        return (
            not self.closed
            and not self.rows.full
            and len(self.held) < min(self.most, self.together)
            and len(self.rows) + unread < self.size
            and self._bytes < MOST_BYTES
        )

    def room(self, unread: int = 0, coming: int = 0) -> int:
        """Return how many more to take at once, so that few of them go back.

        It is no more than fitted before. If one fits no other, all that came behind it go back, and
        a queue does not keep the order of what goes back twice.

        Args:
            unread: As for `has_room`.
            coming: How many came, and are not held yet.
        """
        if not self.has_room(unread):
            return 0
        # Of two rows of one id the order of taking may decide, and several at once have none.
        if not isinstance(self.rows, Ids):
            return 1
        fitted = len(self.held) - coming
        messages = min(self.most, self.together) - len(self.held) - coming
        ids = (self.size - len(self.rows) - unread) // self._largest - coming
        return max(1, min(AT_ONCE, fitted, messages, ids))

    def fits(self, one: Held) -> bool:
        """Whether a message that it took last may run with the others."""
        first = self.held[0]
        # As text: to Python 1, 1.0 and True are equal.
        alike = repr(one.constants) == repr(first.constants)
        return one is first or (len(self.held) <= one.most and alike)
