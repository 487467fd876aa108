"""What failed in a run, told in plain values that are made once, where the run ends.

An exception is an object of a user's: its text, its cause, even its class may run code that
raises. Nothing but this module asks it anything; what travels on cannot fail.
"""

from __future__ import annotations

import hashlib
import traceback
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice
from typing import TYPE_CHECKING

from aioworker.errors import (
    AioworkerError,
    CrashLoopError,
    DeadLetter,
    MessageRefusedError,
    RowsContendedError,
    RowsRefusedError,
    TaskExitError,
    TurnLostError,
    family,
    name_of,
    parts_of,
    traceback_of,
)
from aioworker.logs import LOOKED_AT, traceback_text
from aioworker.mysql import errors
from aioworker.mysql.errors import ErrorKind, MySQLError
from aioworker.rabbitmq.errors import describe
from aioworker.rabbitmq.headers import TEXT_BYTES, line

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from aioworker.errors import DatabaseError

TRACEBACK_LINES = 20
LINES_OF = 1000  # errors, and frames of each, by whose lines a failure's kind is known


class Fault(StrEnum):
    """Whose fault a failure is, as far as the error can tell; the gentlest for a message first."""

    EVERY_MESSAGE = "every message"  # a wrong table or privilege: no message will do
    CONTENTION = "contention"  # others hold the rows, or change them: another attempt later may do
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
        fingerprint: What two failures share that come from the same lines of code.
        lost: Whether the run lost its connection, or its turn with it.
        error: The error itself, for a log's `exc_info`; nothing may be asked of it.
        no_room: What the database's server said in the run if it had no room for a write.
        refused: The server's words for each id whose row the data refused; the others are written.
    """

    fault: Fault
    name: str
    words: str
    traceback: str = ""
    fingerprint: str = ""
    lost: bool = False
    error: BaseException | None = None
    no_room: DatabaseError | None = None
    refused: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Tell of an error; never raises, whatever the error's own code does."""
        name = name_of(error)
        try:
            members = _Members(error)
            said = members.say_all()
            rows = error if type(error) is RowsRefusedError else None
            fingerprint = hashlib.sha256(repr(_lines(error)).encode(errors="replace")).hexdigest()
            return cls(
                members.fault(),
                name,
                line(members.words()) or name,
                "" if said else _traceback(error),
                fingerprint,
                isinstance(error, TurnLostError),
                None if said else error,
                refused={} if rows is None else rows.reasons,
            )
        except BaseException as second:  # noqa: BLE001 - of a user's code, run by looking at it
            return cls(
                Fault.ATTEMPT,
                name,
                f"{name}, which cannot be told: its own code raises {name_of(second)}",
                fingerprint=name,
            )


class _Members:
    """The errors that a failure consists of, each once: itself, or those of its groups.

    Attributes:
        whole: Whether these are all of them.
    """

    def __init__(self, error: BaseException) -> None:
        self._error = error
        self._found: list[BaseException] = []
        rest: list[Iterator[BaseException]] = [iter((error,))]
        seen, looks = set(), 0
        while rest and looks < LOOKED_AT:
            one = next(rest[-1], None)
            looks += 1
            if one is None:
                rest.pop()
            elif id(one) not in seen:
                seen.add(id(one))
                # One of ours tells of itself, group or not.
                parts = () if issubclass(type(one), AioworkerError) else parts_of(one)
                if parts:
                    rest.append(iter(parts))
                else:
                    self._found.append(one)
        self.whole = not rest

    def fault(self) -> Fault:
        """Return whose fault they are: what is gentlest for the message."""
        faults = set(map(_fault, self._found))
        if not self.whole:
            faults.add(Fault.ATTEMPT)  # as one that is not known may be
        return min(faults, key=list(Fault).index)

    def words(self) -> str:
        """Return as many of their words as a header may hold."""
        said = ""
        for one in self._found or [self._error]:
            if len(said) >= TEXT_BYTES:
                break
            said += ("; " if said else "") + _words(one)[:TEXT_BYTES]
        return said

    def say_all(self) -> bool:
        """Whether their words say all there is to know: ours, which name the cure."""
        return self.whole and all(
            isinstance(one, AioworkerError) and not isinstance(one, TaskExitError)
            for one in self._found
        )


def _fault(error: BaseException) -> Fault:
    match error:
        case MessageRefusedError() | CrashLoopError() | DeadLetter():
            return Fault.MESSAGE
        case RowsRefusedError():
            return Fault.MESSAGE if error.written else Fault.DATA
        case RowsContendedError():
            return Fault.CONTENTION
    match errors.kind(error):
        case ErrorKind.CONTENTION:
            return Fault.CONTENTION
        case ErrorKind.DATA:
            return Fault.DATA
        case ErrorKind.EVERY_MESSAGE:
            return Fault.EVERY_MESSAGE
    return Fault.ATTEMPT


def _words(error: BaseException) -> str:
    match error:
        case AioworkerError():
            return str(error)
        case MySQLError() if errors.code(error):
            return f"database, {errors.kind(error) or 'error'}: {errors.describe(error)}"
    name, words = name_of(error), describe(error)
    return name if words == name else f"{name}: {words}"


def _lines(error: BaseException) -> list[tuple[str, str, int]]:
    """Return the classes of an error and of what it came from, and the lines that raised them."""
    found = set()
    for one in islice(family(error), LINES_OF):
        file, number = "", 0
        for frame, at in islice(traceback.walk_tb(traceback_of(one)), LINES_OF):
            file, number = frame.f_code.co_filename, at
        found.add((name_of(one), file, number))
    return sorted(found)


def _traceback(error: BaseException) -> str:
    lines = traceback_text(error, traceback_of(error)).splitlines()
    text = "\n".join(lines[-TRACEBACK_LINES:])
    return text.encode(errors="replace")[-TEXT_BYTES:].decode(errors="ignore")
