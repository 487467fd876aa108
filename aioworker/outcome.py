"""What an attempt came to, and the copies that go to the retry queue and the dead letters."""

from __future__ import annotations

import hashlib
import traceback
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import aio_pika
from pymysql.err import MySQLError

from aioworker import broker, trouble
from aioworker.errors import (
    AioworkerError,
    CrashLoopError,
    DatabaseError,
    DeadLetter,
    MessageRefusedError,
    RowsRefusedError,
    TaskExitError,
    family,
)
from aioworker.headers import LEFT_OUT, TEXT_BYTES, fitting, portable
from aioworker.message import PROPERTIES, UNREADABLE, retries
from aioworker.trouble import Trouble

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable

    from aio_pika.abc import AbstractIncomingMessage

TRACEBACK_LINES = 20
KEY_LENGTH = 64
ID_BYTES = 200  # of what others call their messages: AMQP has room for 255
_COUNTS = frozenset({"x-delivery-count", "x-acquired-count"})
# Whoever publishes these has RabbitMQ send the message to other queues too.
_ROUTES = frozenset({"CC", "BCC"})
# What of ours tells of the message as it was published.
_STAYING = frozenset({UNREADABLE, PROPERTIES, LEFT_OUT})
# When a message is to run: somebody who brings it back says now.
_TIMES = frozenset({"eta", "expires"})
_BROKERS = (
    _COUNTS
    | _ROUTES
    | {
        "x-death",
        "x-first-death-exchange",
        "x-first-death-queue",
        "x-first-death-reason",
        "x-last-death-exchange",
        "x-last-death-queue",
        "x-last-death-reason",
    }
)


class Kind(StrEnum):
    """How a delivery is settled."""

    ACK = "ack"
    DEAD_LETTER = "dead_letter"
    RETRY = "retry"  # a copy waits in the retry queue, and counts this attempt
    RELEASED = "released"  # given back, as it was: no attempt is counted


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a delivery is settled, and why when it is not an ack.

    Args:
        kind: How.
        reason: Why; empty for an ack.
        error: What went wrong, where something did.
        behind: Whether a message that is released goes behind the others, by way of the
            retry queue, this attempt not counted.
        pause: Seconds in which no other message is taken; 0 leaves it to the supervisor.
    """

    kind: Kind
    reason: str = ""
    error: Exception | None = None
    behind: bool = False
    pause: float = 0.0

    @property
    def failed(self) -> bool:
        """Whether the message was not done because something went wrong."""
        return self.error is not None

    @property
    def doubtful(self) -> bool:
        """Whether a message is set aside for what may be no fault of its own."""
        if isinstance(self.error, RowsRefusedError):
            return not self.error.written
        return self.kind is Kind.DEAD_LETTER and not isinstance(
            self.error, MessageRefusedError | CrashLoopError | DeadLetter
        )


def judge(error: Exception) -> Outcome:
    """Decide what a failed attempt comes to.

    What no other attempt could mend is a dead letter: a message that cannot be read, rows
    that the data refuses. What is no fault of the message is given back: a database that is
    away, a wrong table or privilege. Everything else is tried again later. A group of errors
    comes to what is gentlest for the message.
    """
    match error:
        case MessageRefusedError() | RowsRefusedError() | CrashLoopError() | DeadLetter():
            return Outcome(Kind.DEAD_LETTER, str(error), error)
        case DatabaseError():
            return Outcome(Kind.RELEASED, str(error), error)
        case AioworkerError():
            reason = str(error)
        case MySQLError():
            sort = trouble.sort(error)
            reason = f"database, {sort or 'unknown error'}: {trouble.describe(error)}"
            return Outcome(_OF_TROUBLE.get(sort, Kind.RETRY), reason, error)
        case ExceptionGroup():
            parts = [judge(one) for one in error.exceptions]
            kind = next(kind for kind in _GENTLEST if any(part.kind is kind for part in parts))
            reason = "; ".join(part.reason for part in parts)
            return Outcome(kind, reason, parts[0].error if len(parts) == 1 else error)
        case _:
            name, words = type(error).__name__, broker.describe(error)
            reason = name if words == name else f"{name}: {words}"
    return Outcome(Kind.RETRY, reason, error)


def explained(error: BaseException) -> bool:
    """Whether an error's words say all there is to know: no traceback would add to them.

    So do ours, which name the cure, and those of a database that is away.
    """
    match error:
        case TaskExitError():
            return False
        case AioworkerError():
            return True
        case MySQLError():
            return trouble.sort(error) is Trouble.UNAVAILABLE
        case BaseExceptionGroup():
            return all(map(explained, error.exceptions))
    return False


def kind_of(error: BaseException) -> Hashable:
    """Return what two errors share that are of one kind: types, and the lines that raised them."""
    return frozenset((type(one).__qualname__, *_line_of(one)) for one in family(error))


def _line_of(error: BaseException) -> tuple[str, int]:
    found = ("", 0)
    for frame, line in traceback.walk_tb(error.__traceback__):
        found = (frame.f_code.co_filename, line)
    return found


_GENTLEST = (Kind.RELEASED, Kind.RETRY, Kind.DEAD_LETTER)
_OF_TROUBLE: dict[Trouble | None, Kind] = {
    Trouble.DATA: Kind.DEAD_LETTER,
    Trouble.UNAVAILABLE: Kind.RELEASED,
    Trouble.EVERY_MESSAGE: Kind.RELEASED,
}


def retry(delivery: AbstractIncomingMessage, outcome: Outcome, now: datetime) -> aio_pika.Message:
    """Copy a delivery for the retry queue: one attempt older, if this one counts."""
    return _copy(
        delivery,
        {
            "retries": attempt(delivery) - outcome.behind,
            "x-aioworker-reason": line(outcome.reason),
            "x-aioworker-first-failed-at": _first_failed_at(delivery, now),
        },
    )


def revived(delivery: AbstractIncomingMessage) -> aio_pika.Message:
    """Copy a dead letter for its lane: as it was published first, to be run whatever the time."""
    ours = {name for name in delivery.headers if name.startswith("x-aioworker-")}
    return _copy(delivery, {"retries": 0}, without=_TIMES | (ours - _STAYING))


def kept(delivery: AbstractIncomingMessage, users: Collection[str]) -> aio_pika.Message:
    """Copy a dead letter to lie where it lay: all that RabbitMQ will not act on stays as it is.

    What finds no room in a frame, beside what RabbitMQ added, is left out.

    Args:
        delivery: The letter.
        users: Who publishes the copy, by any of its connections' names.
    """
    headers = {}
    for name, value in delivery.headers.items():
        if name not in _COUNTS:
            headers[f"x-aioworker-{name}" if name in _ROUTES else name] = portable(value)
    user = delivery.user_id
    # RabbitMQ takes a message in its publisher's own name only.
    if user is not None and set(users) != {user}:
        headers["x-aioworker-user-id"], user = user, None
    copy = aio_pika.Message(
        delivery.body,
        headers=headers,
        content_type=delivery.content_type,
        content_encoding=delivery.content_encoding,
        priority=delivery.priority,
        correlation_id=delivery.correlation_id,
        reply_to=delivery.reply_to,
        message_id=delivery.message_id or message_id(delivery),
        timestamp=delivery.timestamp,
        type=delivery.type,
        user_id=user,
        app_id=delivery.app_id,
    )
    return fitting(copy)


def dead_letter(
    delivery: AbstractIncomingMessage, outcome: Outcome, worker: str, now: datetime
) -> aio_pika.Message:
    """Copy a delivery, body and headers, and add the reason and where it failed."""
    return _copy(
        delivery,
        {
            "x-aioworker-reason": line(outcome.reason),
            "x-aioworker-error": type(outcome.error).__name__,
            "x-aioworker-traceback": _traceback(outcome.error),
            "x-aioworker-attempts": attempt(delivery),
            "x-aioworker-lane": lane(delivery),
            "x-aioworker-first-failed-at": _first_failed_at(delivery, now),
            "x-aioworker-failed-at": _shown(now),
            "x-aioworker-worker": worker,
        },
    )


def _shown(now: datetime) -> str:
    return now.isoformat(timespec="seconds")


def _first_failed_at(delivery: AbstractIncomingMessage, now: datetime) -> str:
    noted = delivery.headers.get("x-aioworker-first-failed-at")
    return _shown(moment(noted if isinstance(noted, str) else None) or now)


def moment(text: str | None) -> datetime | None:
    """Return a time in ISO 8601, UTC unless it says otherwise; None for what is none."""
    try:
        found = datetime.fromisoformat(text or "")
    except ValueError:
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _copy(
    delivery: AbstractIncomingMessage,
    headers: dict[str, Any],
    without: Collection[str] = frozenset(),
) -> aio_pika.Message:
    """Copy a delivery's body and headers; RabbitMQ's own headers begin anew."""
    copied = {
        name: portable(value)
        for name, value in delivery.headers.items()
        if name not in _BROKERS and name not in without
    }
    copy = aio_pika.Message(
        delivery.body,
        headers=copied | headers,
        content_type=portable(delivery.content_type),
        content_encoding=portable(delivery.content_encoding),
        correlation_id=portable(delivery.correlation_id),
        message_id=portable(delivery.message_id) or message_id(delivery),
    )
    return fitting(copy, headers)


def attempt(delivery: AbstractIncomingMessage) -> int:
    """Return which run of the message this is, from 1, as far as its headers can tell."""
    return (retries(delivery.headers) or 0) + 1


def lane(delivery: AbstractIncomingMessage) -> str:
    """Return the lane that a delivery was taken from."""
    return "urgent" if (delivery.routing_key or "").endswith(".urgent") else "bulk"


def deliveries(delivery: AbstractIncomingMessage) -> int:
    """Return how often a message was delivered before, as quorum queues count it.

    As of RabbitMQ 4.3 what a worker gives back is not counted, only what it held when
    it died or lost its connection; see `counts_releases`.
    """
    count = delivery.headers.get("x-delivery-count")
    return count if type(count) is int else 0


def counts_releases(delivery: AbstractIncomingMessage) -> bool:
    """Whether `deliveries` counts what a worker gave back; RabbitMQ 4.3 has another header."""
    return "x-acquired-count" not in delivery.headers


def key(delivery: AbstractIncomingMessage) -> str:
    """Return what a message is known by while it runs: its id, or a digest where that will not do.

    Up to 64 printable characters of ASCII.
    """
    known = message_id(delivery)
    if len(known) <= KEY_LENGTH and known.isascii() and known.isprintable():
        return known
    return hashlib.sha256(known.encode(errors="replace") + delivery.body).hexdigest()


def message_id(delivery: AbstractIncomingMessage) -> str:
    """Return the message's id; of one without, a name made of its body."""
    known = delivery.headers.get("id") or delivery.message_id
    if not known:
        return f"unknown-{hashlib.sha256(delivery.body).hexdigest()[:16]}"
    return _text(str(known).encode(errors="replace")[:ID_BYTES])


def _traceback(error: Exception | None) -> str:
    """Return the last lines of a traceback; nothing if the reason alone says it all."""
    if error is None or explained(error):
        return ""
    lines = "".join(traceback.format_exception(error)).splitlines()
    return _text("\n".join(lines[-TRACEBACK_LINES:]).encode(errors="replace")[-TEXT_BYTES:])


def line(reason: str) -> str:
    """Return a reason as it is told: in one line, and no longer than a header may be."""
    return _text(" ".join(reason.split()).encode(errors="replace")[:TEXT_BYTES])


def _text(cut: bytes) -> str:
    return cut.decode(errors="ignore")
