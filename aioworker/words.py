"""Words of what a person reads: numbers, durations, commands, what came from outside."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime

MINUTE, HOUR = 60, 3600  # seconds
_app = ""  # as the user gave it to this command, for those that a hint names


def remember_app(modules: str | None) -> None:
    """Have the commands that hints name carry the app that this one was given as an option."""
    global _app
    _app = f" --app {modules}" if modules else ""


def command(words: str) -> str:
    """Return a command as the user would type it, such as `init --print`, for a hint."""
    return f"aioworker {words}{_app}"


def count(number: int, noun: str) -> str:
    """Return "1 chunk", "2 chunks"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def duration(seconds: float) -> str:
    """Return seconds as a person says them: `17 s`, `4 min 5 s`, `4 h 25 min`."""
    whole = math.ceil(seconds)
    if whole < MINUTE:
        return f"{whole} s"
    if whole < HOUR:
        minutes, rest = divmod(whole, MINUTE)
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, rest = divmod(whole, HOUR)
    return f"{hours} h {rest // MINUTE} min" if rest >= MINUTE else f"{hours} h"


def moment(at: datetime) -> str:
    """Return a moment, UTC, as a person reads it: `2026-11-24 02:10:00 UTC`."""
    return f"{at:%Y-%m-%d %H:%M:%S} UTC"


def printable(line: str) -> str:
    r"""Return a line as a terminal may have it: what is not printable, as what it is, `\x1b`.

    What comes from outside could else move the cursor, fill the clipboard, turn the order of
    what is read, or begin a line that looks like one of ours.
    """
    if line.isprintable():
        return line
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode() for one in line
    )


def as_json(value: object) -> str:
    """Return JSON in one line, all of it printable; a time, UTC if it has no zone, as ISO 8601.

    Raises:
        TypeError: JSON has no such value.
    """
    return json.dumps(value, default=_encoded).replace("\x7f", "\\u007f")


def _encoded(value: object) -> str:
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).isoformat()
    raise TypeError(f"expected a value of JSON, got: {value!r}")
