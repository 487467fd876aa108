"""The breaker: whether a task works at all, so that a bad deploy drains no queue.

One bad message after the other says nothing while others succeed. If nothing has succeeded since
they first failed, it may be the task or the database: then the breaker opens, no message is set
aside, and one message at a time, later two, four, up to 32, shows each minute whether the task
works again.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

STREAK = 3  # messages that fail for good one after the other
TEST_SECONDS = 60.0
MOST_TESTS = 32


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
        self._size = 1  # messages that the round of tests which is on, or comes next, tries
        self._left = 0  # of them, those that were not tried yet
        self._round_at = 0.0

    def succeed(self, now: datetime) -> None:
        """Note that a run ended well: the task works, and the breaker closes."""
        self._succeeded_at = now
        self._streak.clear()
        self._set_aside.clear()
        self.reason = ""

    def doubts(self, message: str, first_failed: datetime, words: str) -> bool:
        """Return whether a failure that would set a message aside may be the task's.

        Args:
            message: What the message is known by.
            first_failed: When it failed first.
            words: What went wrong.
        """
        if not self.reason and self._has_succeeded_since(first_failed):
            return False
        self._streak.add(message)
        if len(self._streak) >= STREAK:
            self._open(f"{len(self._streak)} messages in a row failed for good, the last: {words}")
        return True

    def blames_all(self, first_failed: datetime, words: str) -> bool:
        """Return whether a failure that looks like one of every message may be just that.

        Args:
            first_failed: When the message failed first.
            words: What went wrong.
        """
        if not self.reason and self._has_succeeded_since(first_failed):
            return False
        self._open(words)
        return True

    def may_set_aside(self, message: str) -> bool:
        """Return whether a message in doubt may be set aside all the same: the first three."""
        if len(self._set_aside) >= STREAK:
            return False
        self._set_aside.add(message)
        return True

    def fail_test(self) -> None:
        """Note that a message failed while it is open; after a round, the next one is doubled."""
        if not self._left:
            return  # it ran already when the breaker opened
        self._left -= 1
        if not self._left:
            self._round_at = self._clock() + TEST_SECONDS
            self._size = min(2 * self._size, MOST_TESTS)

    def seconds(self) -> float:
        """Return the seconds until a message may be taken: 0 for now."""
        if not self.reason or self._left:
            return 0.0
        seconds = self._round_at - self._clock()
        if seconds > 0:
            return seconds
        self._left = self._size
        return 0.0

    def _has_succeeded_since(self, moment: datetime) -> bool:
        return self._succeeded_at is not None and self._succeeded_at > moment

    def _open(self, words: str) -> None:
        if not self.reason:
            self._size = self._left = 1  # another message, at once
            self.reason = words
