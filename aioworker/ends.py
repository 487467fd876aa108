"""Runs that have ended and could not be settled, since the connection to RabbitMQ was gone.

RabbitMQ delivers such a message again. The process that ran it knows how that ended, and settles
it without a second run.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import TYPE_CHECKING

from aioworker import outcome

if TYPE_CHECKING:
    from aio_pika.abc import AbstractIncomingMessage

    from aioworker.outcome import Outcome

MOST = 1000

_Known = tuple[str, int, bytes]


class Ends:
    """The last thousand of them, of one task in one process."""

    def __init__(self) -> None:
        self._ended: OrderedDict[_Known, Outcome] = OrderedDict()

    def remember(self, delivery: AbstractIncomingMessage, result: Outcome) -> None:
        """Note that only the acknowledgement of a delivery is left to do.

        Args:
            delivery: What was run; what is to be copied of it is copied.
            result: What that came to.
        """
        self._ended[_known(delivery)] = result
        while len(self._ended) > MOST:
            self._ended.popitem(last=False)

    def take(self, delivery: AbstractIncomingMessage) -> Outcome | None:
        """Return how this delivery's run ended, once; None if it is to be run.

        Only a message that RabbitMQ calls redelivered, the same in its id, its attempt and its
        body, is known.
        """
        if not delivery.redelivered or not self._ended:
            return None
        return self._ended.pop(_known(delivery), None)


def _known(delivery: AbstractIncomingMessage) -> _Known:
    digest = hashlib.sha256(delivery.body).digest()
    return outcome.message_id(delivery), outcome.attempt(delivery), digest
