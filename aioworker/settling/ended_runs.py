"""Runs that have ended and could not be settled, since the connection to RabbitMQ was gone.

RabbitMQ delivers such a message again. The process that ran it knows how that ended, and settles
it without a second run. In doubt it runs: a message that has no id, or whose copy looks the same.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from typing import TYPE_CHECKING

from aioworker.errors import let_go
from aioworker.settling.outcome import Kind

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioworker.rabbitmq.delivery import Delivery
    from aioworker.settling.outcome import Outcome

MOST = 1000
# RabbitMQ delivers again once it notices a lost connection, after three heartbeats at the latest.
KNOWN_SECONDS = 600.0

_Known = tuple[str, int, bytes]


class EndedRuns:
    """The last thousand of them within ten minutes, of one task in one process.

    Args:
        clock: Returns seconds that only ever grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ended: OrderedDict[_Known, tuple[float, Outcome]] = OrderedDict()

    def remember(self, delivery: Delivery, result: Outcome) -> None:
        """Note that only the acknowledgement of a delivery is left to do.

        Args:
            delivery: What was run; what is to be copied of it is copied.
            result: What that came to.
        """
        # Of a dead letter or a postponed message a second copy is worse than a second run.
        if result.kind not in (Kind.ACK, Kind.RETRY) or not delivery.has_id:
            return
        if result.failure is not None:
            let_go(result.failure.error)
        self._ended[_known(delivery)] = self._clock(), result
        while len(self._ended) > MOST:
            self._ended.popitem(last=False)

    def take(self, delivery: Delivery) -> Outcome | None:
        """Return how this delivery's run ended, once; None if it is to be run.

        Only a message that RabbitMQ calls redelivered, the same in its id, its attempt and its
        body, is known.
        """
        if not delivery.message.redelivered or not self._ended:
            return None
        ended_at, result = self._ended.pop(_known(delivery), (0.0, None))
        return result if self._clock() - ended_at < KNOWN_SECONDS else None


def _known(delivery: Delivery) -> _Known:
    digest = hashlib.sha256(delivery.message.body).digest()
    return delivery.id, delivery.attempt, digest
