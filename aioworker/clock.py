"""What time of day it is: the database's, once it was asked, and this machine's before."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from aioworker.logs import fields

log = logging.getLogger(__name__)

APART_SECONDS = 5.0  # and two clocks differ


def own_time() -> datetime:
    """Return this machine's time of day, UTC."""
    return datetime.now(UTC)


class Clock:
    """One clock for all workers: a machine whose own is wrong judges as the others do.

    Args:
        task: Whose worker reads it, for the log.
        own: Returns this machine's time of day, UTC.
        passing: Returns seconds that only ever grow.
    """

    def __init__(
        self,
        task: str,
        own: Callable[[], datetime] = own_time,
        passing: Callable[[], float] = time.monotonic,
    ) -> None:
        self._passing = passing
        self._task = task
        self._own = own
        self._theirs: datetime | None = None
        self._set_at = 0.0
        self._apart = False

    def now(self) -> datetime:
        """Return the time of day, UTC."""
        if self._theirs is None:
            return self._own()
        return self._theirs + timedelta(seconds=self._passing() - self._set_at)

    def set(self, theirs: datetime, took: float) -> None:
        """Go on from the database's time; say once if this machine's is another one.

        Args:
            theirs: What the database has just answered, UTC.
            took: Seconds that its answer took.
        """
        self._theirs, self._set_at = theirs, self._passing()
        here = self._own()
        ahead = (here - theirs).total_seconds()
        apart = abs(ahead) > APART_SECONDS + took
        if apart and not self._apart:
            log.warning(
                "this machine's clock is not the database's, which counts",
                extra=fields(
                    task=self._task,
                    here=here.isoformat(timespec="seconds"),
                    database=theirs.isoformat(timespec="seconds"),
                    ahead_seconds=round(ahead),
                ),
            )
        self._apart = apart
