"""The breaker: whether a task works at all, so that a bad deploy drains no queue.

One bad message after the other says nothing while others succeed. If nothing has succeeded since
they first failed, it may be the task or the database: then the breaker opens, no fourth message is
set aside, and one message at a time, later two, four, up to 32, shows each minute whether the task
works again.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

STREAK = 3  # messages that fail for good one after the other
TEST_SECONDS = 60.0
MOST_TESTS = 32


@dataclass(frozen=True, slots=True)
class Failed:
    """A failed attempt at a message.

    Args:
        message: What the message is known by.
        first_failed: When it failed for the first time, by the budget's clock, if it is known to
            have failed before.
        attempt: Which attempt it was, from 1.
        taken: When it was taken, by the breaker's clock.
        words: What went wrong.
        last: Whether it would set the message aside.
        of_all: Whether it looks like a failure of every message: a missing table or privilege.
    """

    message: str
    first_failed: datetime | None
    attempt: int
    taken: float
    words: str
    last: bool = False
    of_all: bool = False


class Breaker:
    """Tells a message that is bad from a task that fails, for one task of one worker.

    Moments are times of the budget's clock, as in the headers of messages.

    Args:
        clock: Returns seconds that only ever grow.

    Attributes:
        reason: Why it is open; empty while it is closed.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.reason = ""
        self._clock = clock
        self._succeeded_at: datetime | None = None
        # Messages that failed for good, or were set aside, nothing having succeeded since.
        self._streak: set[str] = set()
        self._set_aside: set[str] = set()
        self._split = 0  # starts of several messages that failed, nothing having succeeded since
        self._size = 1  # messages that the round of tests which is on, or comes next, tries
        self._left = 0  # of them, those that were not tried yet
        self._round_at = 0.0
        self._opened_at = 0.0

    def succeed(self, now: datetime) -> None:
        """Note that a run ended well: the task works, and the breaker closes."""
        self._succeeded_at = now
        self._streak.clear()
        self._set_aside.clear()
        self._split = 0
        self.reason = ""

    def fail(self, failed: Failed) -> bool:
        """Note a failed attempt; return whether the failure may be the task's.

        Such a failure costs the message an attempt only if the message is alone, so that no
        other one can tell, and sets it aside only if `may_set_aside` allows that.
        """
        if self.reason:
            if failed.taken > self._opened_at:
                self._fail_test()
        elif self.has_succeeded_since(failed.first_failed) or not (failed.last or failed.of_all):
            return False
        if failed.of_all:
            self._open(failed.words)
        elif failed.last and not self.reason:
            self._streak.add(failed.message)
            if (streak := len(self._streak)) >= STREAK:
                self._open(f"{streak} messages in a row failed for good, the last: {failed.words}")
        if self.reason or failed.attempt > 1 or failed.first_failed is not None:
            return True
        # Nothing can succeed since a first failure: that is no sign of anything.
        self._set_aside.add(failed.message)
        return False

    def fail_together(self, words: str) -> None:
        """Note that a start of several messages failed, whose halves run next.

        If it is one of them that fails, one of its halves succeeds: not more than two such starts
        come one after the other.
        """
        self._split += 1
        if self._split >= STREAK:
            self._open(f"{self._split} starts in a row failed for all they held, the last: {words}")

    def may_set_aside(self, message: str) -> bool:
        """Return whether a message in doubt may be set aside all the same: the first three."""
        if len(self._set_aside | {message}) > STREAK:
            return False
        self._set_aside.add(message)
        return True

    def has_succeeded_since(self, moment: datetime | None) -> bool:
        """Return whether a run has ended well since a moment; not if there is none."""
        succeeded_at = self._succeeded_at
        return succeeded_at is not None and moment is not None and succeeded_at > moment

    def seconds(self) -> float:
        """Return the seconds until a message may be taken: 0 for now."""
        if not self.reason or self._left:
            return 0.0
        seconds = self._round_at - self._clock()
        if seconds > 0:
            return seconds
        self._left = self._size
        return 0.0

    def _fail_test(self) -> None:
        """Count a message that failed while it is open; after a round, the next one is doubled."""
        if not self._left:
            return
        self._left -= 1
        if not self._left:
            self._round_at = self._clock() + TEST_SECONDS
            self._size = min(2 * self._size, MOST_TESTS)

    def _open(self, words: str) -> None:
        if not self.reason:
            self._size = self._left = 1  # another message, at once
            self._opened_at = self._clock()
            self.reason = words
