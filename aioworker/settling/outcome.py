"""What an attempt came to, and so how its message is settled."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aioworker.errors import BrokerError, DatabaseError
    from aioworker.settling.failure import Failure


class Kind(StrEnum):
    """How a delivery is settled."""

    ACK = "ack"
    DEAD_LETTER = "dead_letter"
    RETRY = "retry"  # a copy waits in the retry queue, and counts this attempt
    RELEASED = "released"  # given back, as it was: no attempt is counted
    POSTPONED = "postponed"  # goes behind the others by way of the retry queue, uncounted
    MOVED = "moved"  # a copy goes to the end of its own lane: no attempt is counted


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a delivery is settled, and why.

    Args:
        kind: How.
        reason: Why, in one line; empty for what is done. Of an ack it says that it ran too late.
        failure: What went wrong, if something did.
        away: What is wrong with a server, which is why it is given back: the database takes no
            writes, or RabbitMQ no copies.
        attempts: How many attempts the message has, if it failed; 0 if that is not known.
        together: With how many it may run from now on; None leaves that as it is.
    """

    kind: Kind
    reason: str = ""
    failure: Failure | None = None
    away: BrokerError | DatabaseError | None = None
    attempts: int = 0
    together: int | None = None

    @property
    def uncounted(self) -> bool:
        """Whether the message is to run again as if it had not: somebody is to look why."""
        return self.kind in (Kind.RELEASED, Kind.POSTPONED, Kind.MOVED)

    @property
    def failed(self) -> bool:
        """Whether the message was not done because something went wrong."""
        return self.failure is not None or self.away is not None


DONE = Outcome(Kind.ACK)
UNDECIDED = Outcome(Kind.RELEASED)  # what nobody decides is given back
