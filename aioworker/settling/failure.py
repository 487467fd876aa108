"""What failed in a run, told in plain values that are made once, where the run ends.

An exception is an object of a user's: its text, its cause, even its class may run code that
raises. Nothing but this module asks it anything; what travels on cannot fail.
"""

from __future__ import annotations

import hashlib
import traceback
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from aioworker.errors import (
    AioworkerError,
    CrashLoopError,
    DeadLetter,
    MessageRefusedError,
    RowsRefusedError,
    TaskExitError,
    TurnLostError,
    family,
    name_of,
)
from aioworker.mysql import trouble
from aioworker.mysql.trouble import MySQLError, Trouble
from aioworker.rabbitmq import broker
from aioworker.rabbitmq.headers import TEXT_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aioworker.errors import DatabaseError

TRACEBACK_LINES = 20


class Fault(StrEnum):
    """Whose fault a failure is, as far as the error can tell; the gentlest for a message first."""

    EVERY_MESSAGE = "every message"  # a wrong table or privilege: no message will do
    ATTEMPT = "attempt"  # another attempt may do
    DATA = "data"  # the data refuses what this message brings
    MESSAGE = "message"  # no attempt of this message will ever do


@dataclass(frozen=True, slots=True)
class Failure:
    """A failure, in words.

    Args:
        fault: Whose it is.
        name: The error's class.
        words: What went wrong, in one line.
        traceback: The last lines of the error's traceback; empty if the words say it all.
        kind: What two failures share that come from the same lines of code.
        lost: Whether the run lost its connection, or its turn with it.
        error: The error itself, for a log's `exc_info`; nothing may be asked of it.
        no_room: What the database's server said in the run if it had no room for a write.
    """

    fault: Fault
    name: str
    words: str
    traceback: str = ""
    kind: str = ""
    lost: bool = False
    error: BaseException | None = None
    no_room: DatabaseError | None = None

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Tell of an error; never raises, whatever the error's own code does."""
        name = name_of(error)
        try:
            fault, words = _judge(error)
            said = _said(error)
            kind = hashlib.sha256(repr(_lines(error)).encode(errors="replace")).hexdigest()
            return cls(
                fault,
                name,
                line(words) or name,
                "" if said else _traceback(error),
                kind,
                isinstance(error, TurnLostError),
                None if said else error,
            )
        except BaseException as second:  # noqa: BLE001 - of a user's code, run by looking at it
            return cls(
                Fault.ATTEMPT,
                name,
                f"{name}, which cannot be told: its own code raises {name_of(second)}",
                kind=name,
            )


def _judge(error: BaseException) -> tuple[Fault, str]:
    """Return whose fault an error is, and its words; of a group, what is gentlest."""
    match error:
        case MessageRefusedError() | CrashLoopError() | DeadLetter():
            return Fault.MESSAGE, str(error)
        case RowsRefusedError():
            return Fault.MESSAGE if error.written else Fault.DATA, str(error)
        case AioworkerError():
            return Fault.ATTEMPT, str(error)
        case MySQLError() if trouble.code(error):
            sort = trouble.sort(error)
            words = f"database, {sort or 'error'}: {trouble.describe(error)}"
            return Fault.ATTEMPT if sort is None else _OF_TROUBLE[sort], words
        case BaseExceptionGroup():
            return _judge_all(error.exceptions)
    name, words = name_of(error), broker.describe(error)
    return Fault.ATTEMPT, name if words == name else f"{name}: {words}"


def _judge_all(errors: Sequence[BaseException]) -> tuple[Fault, str]:
    """Return what is gentlest for the message, and as many words as a header may hold."""
    faults, said = set(), ""
    for error in errors:
        fault, words = _judge(error)
        faults.add(fault)
        if len(said) < TEXT_BYTES:
            said += ("; " if said else "") + words[:TEXT_BYTES]
    return min(faults, key=list(Fault).index), said


_OF_TROUBLE = {
    Trouble.CONTENTION: Fault.ATTEMPT,
    Trouble.DATA: Fault.DATA,
    Trouble.NO_ROOM: Fault.ATTEMPT,
    Trouble.EVERY_MESSAGE: Fault.EVERY_MESSAGE,
}


def _said(error: BaseException) -> bool:
    """Whether an error's words say all there is to know: ours, which name the cure."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(_said, error.exceptions))
    return isinstance(error, AioworkerError) and not isinstance(error, TaskExitError)


def _lines(error: BaseException) -> list[tuple[str, str, int]]:
    """Return the classes of an error and of what it came from, and the lines that raised them."""
    found = set()
    for one in family(error):
        file, number = "", 0
        for frame, at in traceback.walk_tb(one.__traceback__):
            file, number = frame.f_code.co_filename, at
        found.add((name_of(one), file, number))
    return sorted(found)


def _traceback(error: BaseException) -> str:
    lines = "".join(traceback.format_exception(error)).splitlines()
    return _text("\n".join(lines[-TRACEBACK_LINES:]).encode(errors="replace")[-TEXT_BYTES:])


def line(reason: str) -> str:
    """Return a reason as it is told: in one line, and no longer than a header may be."""
    return _text(" ".join(reason.split()).encode(errors="replace")[:TEXT_BYTES])


def _text(cut: bytes) -> str:
    return cut.decode(errors="ignore")
