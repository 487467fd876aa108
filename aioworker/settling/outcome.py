"""What an attempt came to, and the copies that go to the retry queue and the dead letters."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import aio_pika

from aioworker.rabbitmq.headers import LEFT_OUT, fitting, portable
from aioworker.rabbitmq.message import PROPERTIES, UNREADABLE, retries
from aioworker.settling.failure import line

if TYPE_CHECKING:
    from collections.abc import Collection

    from aio_pika.abc import AbstractIncomingMessage

    from aioworker.errors import BrokerError, DatabaseError
    from aioworker.settling.failure import Failure

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
    POSTPONED = "postponed"  # goes behind the others by way of the retry queue, uncounted


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a delivery is settled, and why if it is not an ack.

    Args:
        kind: How.
        reason: Why, in one line; empty for an ack.
        failure: What went wrong, if something did.
        away: What is wrong with a server, which is why it is given back: the database takes no
            writes, or RabbitMQ no copies.
        attempts: How many attempts the message has, if it failed; 0 if that is not known.
    """

    kind: Kind
    reason: str = ""
    failure: Failure | None = None
    away: BrokerError | DatabaseError | None = None
    attempts: int = 0

    @property
    def uncounted(self) -> bool:
        """Whether the message is to run again as if it had not: somebody is to look why."""
        return self.kind in (Kind.RELEASED, Kind.POSTPONED)

    @property
    def failed(self) -> bool:
        """Whether the message was not done because something went wrong."""
        return self.failure is not None or self.away is not None


def retry(delivery: AbstractIncomingMessage, outcome: Outcome, now: datetime) -> aio_pika.Message:
    """Copy a delivery for the retry queue: one attempt older, if this one counts."""
    headers = {
        "retries": attempt(delivery) - (outcome.kind is Kind.POSTPONED),
        "x-aioworker-reason": line(outcome.reason),
    }
    if outcome.failed:
        headers["x-aioworker-first-failed-at"] = _shown(first_failed(delivery) or now)
    if outcome.failure is not None and outcome.failure.lost:
        headers["x-aioworker-lost"] = times_lost(delivery) + 1
    return _copy(delivery, headers)


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
    failure = outcome.failure
    return _copy(
        delivery,
        {
            "x-aioworker-reason": line(outcome.reason),
            "x-aioworker-error": "" if failure is None else failure.name,
            "x-aioworker-traceback": "" if failure is None else failure.traceback,
            "x-aioworker-attempts": attempt(delivery),
            "x-aioworker-lane": lane(delivery),
            "x-aioworker-first-failed-at": _shown(first_failed(delivery) or now),
            "x-aioworker-failed-at": _shown(now),
            "x-aioworker-worker": worker,
        },
    )


def _shown(now: datetime) -> str:
    return now.isoformat(timespec="milliseconds")


def first_failed(delivery: AbstractIncomingMessage) -> datetime | None:
    """Return when a message failed first, as its headers have it; None if it has not yet."""
    noted = delivery.headers.get("x-aioworker-first-failed-at")
    return moment(noted if isinstance(noted, str) else None)


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


def times_lost(delivery: AbstractIncomingMessage) -> int:
    """Return how many attempts lost their connection before this one."""
    count = delivery.headers.get("x-aioworker-lost")
    return count if type(count) is int else 0


def lane(delivery: AbstractIncomingMessage) -> str:
    """Return the lane that a delivery was taken from."""
    return "urgent" if (delivery.routing_key or "").endswith(".urgent") else "bulk"


def deliveries(delivery: AbstractIncomingMessage) -> int:
    """Return how often a message was delivered before, as quorum queues count it.

    As of RabbitMQ 4.3 what a worker gives back is not counted, only what it held when
    it died or lost its connection.
    """
    count = delivery.headers.get("x-delivery-count")
    return count if type(count) is int else 0


def key(delivery: AbstractIncomingMessage) -> str:
    """Return what a message is known by while it runs: its id, or a digest where that will not do.

    Up to 64 printable characters of ASCII.
    """
    known = message_id(delivery)
    if len(known) <= KEY_LENGTH and known.isascii() and known.isprintable():
        return known
    return hashlib.sha256(known.encode(errors="replace") + delivery.body).hexdigest()


def has_id(delivery: AbstractIncomingMessage) -> bool:
    """Whether whoever published a message gave it an id."""
    return bool(delivery.headers.get("id") or delivery.message_id)


def message_id(delivery: AbstractIncomingMessage) -> str:
    """Return the message's id; of one without, a name made of its body."""
    known = delivery.headers.get("id") or delivery.message_id
    if not known:
        return f"unknown-{hashlib.sha256(delivery.body).hexdigest()[:16]}"
    return _text(str(known).encode(errors="replace")[:ID_BYTES])


def _text(cut: bytes) -> str:
    return cut.decode(errors="ignore")
