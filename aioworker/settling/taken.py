"""How far a worker has emptied the lanes: so old at most is what waits there.

A lane is in order, so what lies behind a message was published later. Messages that came back are
not: a copy from the retry queue, or of a start that failed, lies behind younger ones. Of those
that this worker put back it knows the oldest, and when the lane is emptied so far that none waits.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from aioworker.rabbitmq.lanes import EMPTY_SECONDS
from aioworker.rabbitmq.queues import RETRY_TTL_MS
from aioworker.settling.outcome import Kind
from aioworker.status.waiting import Lane, Waiting, utc

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from aioworker.rabbitmq.delivery import Delivery
    from aioworker.settling.start import Held, Start

_RETRY = timedelta(milliseconds=RETRY_TTL_MS)


class Taken:
    """What one task's worker knows of its lanes.

    Args:
        under_way: The starts whose messages are not settled.
    """

    def __init__(self, under_way: Sequence[Start]) -> None:
        self._under_way = under_way
        self._lanes = {"urgent": Lane(), "bulk": Lane()}

    def tell(self) -> Waiting:
        """Return it as it is now."""
        return Waiting(sum(len(one.held) for one in self._under_way), **self._lanes)

    def settled(self, start: Start, held: Sequence[Held], now: datetime) -> None:
        """Note what became of messages whose outcomes were decided.

        Those of a start may be settled in another order than they lay in: a lane is emptied as
        far as they reach once all are.

        Args:
            start: What held them.
            held: The messages.
            now: What time it is.
        """
        for one in held:
            if one.settled and one.outcome.kind in (Kind.RETRY, Kind.POSTPONED):
                self._put_back(one.delivery, "bulk", now + _RETRY)
            elif one.settled and one.outcome.kind is Kind.MOVED:
                self._put_back(one.delivery, one.delivery.lane, now)
        back = any(not one.settled or one.outcome.kind is Kind.RELEASED for one in held)
        for one in () if back or start.held else held:
            published = utc(one.delivery.published)
            if published is not None and not one.delivery.copied:
                self._empty(one.delivery.lane, min(published, now))

    def found_nothing(self, now: datetime) -> None:
        """Note that both lanes are empty: what comes is published later."""
        for lane in self._lanes:
            self._empty(lane, now - timedelta(seconds=EMPTY_SECONDS))

    def _empty(self, lane: str, since: datetime) -> None:
        before = self._lanes[lane]
        over = before.until is not None and since >= before.until
        self._lanes[lane] = Lane(since) if over else Lane(since, before.back, before.until)

    def _put_back(self, delivery: Delivery, lane: str, at: datetime) -> None:
        published = utc(delivery.published)
        if published is not None:
            before = self._lanes[lane]
            self._lanes[lane] = Lane(
                before.since,
                min(filter(None, (before.back, published))),
                max(filter(None, (before.until, at))),
            )
