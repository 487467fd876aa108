"""Which kind of reason to wait an error is."""

from __future__ import annotations

from aioworker.errors import BrokerError, DatabaseError, TurnLostError
from aioworker.mysql import errors
from aioworker.mysql.errors import ErrorKind
from aioworker.reasons import ReasonKind


def kind_of(error: BrokerError | DatabaseError) -> ReasonKind:
    """Return the kind of reason that an error of a server is, or what else ended the work."""
    if isinstance(error, BrokerError):
        return ReasonKind.BROKER_UNREACHABLE if error.unreachable else ReasonKind.BROKER_REFUSES
    if isinstance(error, TurnLostError):
        return ReasonKind.TURN_LOST
    if error.unreachable:
        return ReasonKind.DATABASE_UNREACHABLE
    cause = error.__cause__
    if cause is not None and errors.kind(cause) is ErrorKind.CONTENTION:
        return ReasonKind.CONTENTION
    return ReasonKind.DATABASE_REFUSES
