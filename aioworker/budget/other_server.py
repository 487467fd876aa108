"""Whether the budget's row is written by another server than the one that this worker uses.

Once is a failover: the row is taken over. Again, over the same connection, is somebody who
writes the same row elsewhere, where neither the turn's lock nor the clock is ours: a second
primary, or a proxy that sends reads and writes to different servers. No start is safe then.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from aioworker.budget.tables import Row

# A row that stays another's for so long is taken over again, and the other one, if it is still
# there, does the same: neither then has it alone for as long as it would need to start.
AGAIN_SECONDS = 30.0
ALONE_SECONDS = 60.0


class OtherServer:
    """What one worker has seen of another server that writes its row.

    Args:
        clock: Returns seconds that only ever grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._taken_by: tuple[str, int] | None = None  # this server, and the session there
        self._theirs_since: float | None = None
        self._met_at = -math.inf
        self._split = False
        self._servers = ""

    @property
    def reason(self) -> str | None:
        """Why no start may begin; None where one may."""
        if self._split:
            return (
                f"reads and writes go to different servers, {self._servers}: let the address"
                " lead to the one that is written to, without a proxy that splits them"
            )
        if self._clock() - self._met_at < ALONE_SECONDS:
            return (
                f"two servers are both writing this row, {self._servers}: let all workers"
                " use the same one"
            )
        return None

    def see(self, row: Row) -> bool:
        """Take note of a row that was read; return whether to take it over."""
        if row.same_server:
            self._theirs_since, self._split = None, False
            return False
        now, self._servers = self._clock(), f"{row.here} and {row.server}"
        again = self._taken_by == (row.here, row.session)
        if again and not self._split:
            self._met_at = now
        if self._theirs_since is None:
            self._theirs_since = now
        if again and now - self._theirs_since < AGAIN_SECONDS:
            return False
        self._taken_by, self._theirs_since = (row.here, row.session), None
        return True

    def took_over(self, row: Row) -> None:
        """Take note of the row as it is read once it was taken over: ours, if it took the write."""
        self._split = not row.same_server
