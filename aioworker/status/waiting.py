"""What a worker can tell of the messages that wait, in its row: nobody touches them to find out."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from aioworker.rabbitmq.message import milliseconds, moment


@dataclass(frozen=True, slots=True)
class Lane:
    """A lane, as far as a worker has emptied it; times are UTC.

    Args:
        since: What waits in it was published later, but for messages that came back; None if the
            worker has taken nothing from it.
        back: Those were published at this moment or later; None if it has put none back.
        until: Once a lane is emptied up to this moment, they are taken; None likewise.
    """

    since: datetime | None = None
    back: datetime | None = None
    until: datetime | None = None


@dataclass(frozen=True, slots=True)
class Waiting:
    """What a worker tells.

    Args:
        held: Messages in its hands, which RabbitMQ does not call ready.
        urgent: The urgent lane.
        bulk: The bulk lane.
    """

    held: int = 0
    urgent: Lane = field(default_factory=Lane)
    bulk: Lane = field(default_factory=Lane)

    @classmethod
    def read(cls, text: str | None) -> Waiting | None:
        """Read it with care: anybody may have written something else; None is for nothing."""
        try:
            found = json.loads(text or "null")
        except (ValueError, RecursionError):
            return None
        if not isinstance(found, dict) or type(held := found.get("held")) is not int:
            return None
        return cls(held, _lane(found.get("urgent")), _lane(found.get("bulk")))

    def __str__(self) -> str:
        return json.dumps(asdict(self), default=milliseconds)


def _lane(found: Any) -> Lane:
    values = found if isinstance(found, dict) else {}
    return Lane(*(utc(moment(values.get(name))) for name in ("since", "back", "until")))


def utc(time: datetime | None) -> datetime | None:
    """Return a moment by the clock of UTC; None for one that no calendar has there."""
    try:
        return time and time.astimezone(UTC)
    except OverflowError:
        return None
