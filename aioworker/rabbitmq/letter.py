"""What a dead letter says of itself, and which ones are meant.

Those that aioworker set aside carry its own headers; those that RabbitMQ set aside carry
`x-death`, and what a retry before noted. Both are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from aio_pika.abc import AbstractIncomingMessage

from aioworker.rabbitmq import message
from aioworker.rabbitmq.delivery import message_id
from aioworker.words import printable

NO_REASON = "no reason is noted"


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter, as `dead list` shows it.

    Args:
        id: The message's id.
        reason: Why it was set aside.
        error: The kind of the error; None where RabbitMQ set it aside.
        attempts: Runs that it had; None where nobody counted.
        lane: Where it came from.
        first_failed_at: When it failed first, ISO 8601; None where nobody noted it.
        failed_at: When it was set aside, ISO 8601; None where nobody noted it.
        worker: Who set it aside; None for RabbitMQ.
    """

    id: str
    reason: str
    error: str | None
    attempts: int | None
    lane: str
    first_failed_at: str | None
    failed_at: str | None
    worker: str | None

    @classmethod
    def of(cls, delivery: AbstractIncomingMessage) -> Letter:
        """Read the headers, whoever wrote them."""
        headers = delivery.headers
        # A copy for the retry queue has a reason too; only a dead letter was set aside.
        if "x-aioworker-failed-at" in headers:
            return cls(
                id=message_id(delivery),
                reason=text(headers.get("x-aioworker-reason")) or NO_REASON,
                error=text(headers.get("x-aioworker-error")),
                attempts=_number(headers.get("x-aioworker-attempts")),
                lane="urgent" if text(headers.get("x-aioworker-lane")) == "urgent" else "bulk",
                first_failed_at=_time(headers.get("x-aioworker-first-failed-at")),
                failed_at=_time(headers["x-aioworker-failed-at"]),
                worker=text(headers.get("x-aioworker-worker")),
            )
        deaths = headers.get("x-death")
        death = deaths[0] if isinstance(deaths, list) and deaths else {}
        death = death if isinstance(death, dict) else {}
        queue = text(death.get("queue")) or ""
        why = NO_REASON
        if death:
            why = f"set aside by RabbitMQ: {text(death.get('reason')) or 'unknown reason'}"
        if (before := text(headers.get("x-aioworker-reason"))) is not None:
            why += f"; the last retry was for: {before}"
        return cls(
            id=message_id(delivery),
            reason=message.unreadable(headers) or why,
            error=None,
            attempts=None,
            lane="urgent" if queue.endswith(".urgent") else "bulk",
            first_failed_at=_time(headers.get("x-aioworker-first-failed-at")),
            failed_at=_time(death.get("time")),
            worker=None,
        )

    @property
    def names(self) -> frozenset[str]:
        """What a person may call it by: its id, or that as a terminal has it, of ASCII too."""
        ascii_word = self.word.encode("ascii", "backslashreplace").decode()
        return frozenset({self.id, self.word, ascii_word})

    @property
    def word(self) -> str:
        """The id as one word, so that the fields behind it are ours."""
        return printable(self.id).replace(" ", "\\x20")


@dataclass(frozen=True, slots=True)
class Filter:
    """Which dead letters are meant; without any condition, all of them.

    Args:
        ids: One of these message ids, each as it is or as it is shown; empty for any.
        reason: A part of the reason; empty for any.
        older_than: Set aside longer ago than this; None for any.
    """

    ids: frozenset[str] = frozenset()
    reason: str = ""
    older_than: timedelta | None = None

    def matches(self, letter: Letter) -> bool:
        """Return whether a letter is meant; one without a time is not older than anything."""
        if self.ids and self.ids.isdisjoint(letter.names):
            return False
        if self.reason.lower() not in letter.reason.lower():
            return False
        if self.older_than is None:
            return True
        failed = message.moment(letter.failed_at)
        return failed is not None and datetime.now(UTC) - failed > self.older_than


def text(value: Any) -> str | None:
    """Return a header's value as a person reads it; None where there is none."""
    if isinstance(value, bytes | bytearray):
        return value.decode("utf-8", "backslashreplace")
    return None if value is None else str(value)


def _number(value: Any) -> int | None:
    return value if type(value) is int else None


def _time(value: Any) -> str | None:
    """Return a time in ISO 8601; None for what is no time, though anybody may send it as one."""
    found = message.moment(text(value))
    return None if found is None else found.isoformat()
