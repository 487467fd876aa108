"""What an attempt came to: done, a dead letter, or given back; and the dead letter itself."""

from __future__ import annotations

import reprlib
import struct
import traceback
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import aio_pika
from pamqp.encode import encode_table_value
from pymysql.err import MySQLError

from aioworker import broker, trouble
from aioworker.errors import AioworkerError, MessageRefusedError, RowsRefusedError
from aioworker.message import RETRIES_LIMIT

if TYPE_CHECKING:
    from aio_pika.abc import AbstractIncomingMessage

TRACEBACK_LINES = 20


class Kind(StrEnum):
    """How a delivery is settled."""

    ACK = "ack"
    DEAD_LETTER = "dead_letter"
    RELEASED = "released"  # given back: the same message will come again


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a delivery is settled, and why when it is not an ack."""

    kind: Kind
    reason: str = ""
    error: Exception | None = None

    @property
    def failed(self) -> bool:
        """Whether the message was not done because something went wrong."""
        return self.error is not None


def judge(error: Exception) -> Outcome:
    """Decide what a failed attempt comes to.

    What no other attempt could mend is a dead letter: a message that cannot be read, rows
    that the data refuses. Everything else is given back.
    """
    match error:
        case MessageRefusedError() | RowsRefusedError():
            return Outcome(Kind.DEAD_LETTER, str(error), error)
        case AioworkerError():
            reason = str(error)
        case MySQLError():
            sort = trouble.sort(error)
            reason = f"database, {sort or 'unknown error'}: {trouble.describe(error)}"
            if sort is trouble.Trouble.DATA:
                return Outcome(Kind.DEAD_LETTER, reason, error)
        case TimeoutError():
            reason = "the run took longer than the task timeout and was cut off"
        case _:
            reason = f"{type(error).__name__}: {broker.describe(error)}"
    return Outcome(Kind.RELEASED, reason, error)


def dead_letter(
    delivery: AbstractIncomingMessage, outcome: Outcome, worker: str
) -> aio_pika.Message:
    """Copy a delivery, body and headers, and add the reason and where it failed."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    headers = {name: _portable(value) for name, value in delivery.headers.items()}
    headers.pop("x-delivery-count", None)  # RabbitMQ's own; a copy begins anew
    headers |= {
        "x-aioworker-reason": outcome.reason,
        "x-aioworker-error": type(outcome.error).__name__,
        "x-aioworker-traceback": _traceback(outcome.error),
        "x-aioworker-attempts": attempt(delivery),
        "x-aioworker-lane": lane(delivery),
        "x-aioworker-first-failed-at": headers.get("x-aioworker-first-failed-at", now),
        "x-aioworker-failed-at": now,
        "x-aioworker-worker": worker,
    }
    return aio_pika.Message(
        delivery.body,
        headers=headers,
        content_type=_portable(delivery.content_type),
        content_encoding=_portable(delivery.content_encoding),
        correlation_id=_portable(delivery.correlation_id),
        message_id=_portable(delivery.message_id),
    )


def _portable(value: Any) -> Any:
    """Return what AMQP can carry: some of what it can bring, it cannot take back."""
    try:
        encode_table_value(value)
    except (TypeError, ValueError, OverflowError, struct.error):
        return reprlib.repr(value)
    return value


def attempt(delivery: AbstractIncomingMessage) -> int:
    """Return which run of the message this is, from 1, as far as its headers can tell."""
    retries = delivery.headers.get("retries")
    return retries + 1 if type(retries) is int and 0 <= retries <= RETRIES_LIMIT else 1


def lane(delivery: AbstractIncomingMessage) -> str:
    """Return the lane that a delivery was taken from."""
    return "urgent" if (delivery.routing_key or "").endswith(".urgent") else "bulk"


def message_id(delivery: AbstractIncomingMessage) -> str:
    """Return the message's id, also of one that cannot be decoded."""
    return str(delivery.headers.get("id") or delivery.message_id or "unknown")


def _traceback(error: Exception | None) -> str:
    """Return the last lines of a traceback; nothing where the reason alone says it all."""
    if error is None or isinstance(error, MessageRefusedError | RowsRefusedError):
        return ""
    lines = "".join(traceback.format_exception(error)).splitlines()
    return "\n".join(lines[-TRACEBACK_LINES:])
