"""Log lines: a constant phrase, then fields.

Our own lines carry their fields in the record's `fields`; lines of libraries have none.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Hashable
from datetime import UTC, datetime
from itertools import islice
from types import TracebackType
from typing import Any

from aioworker.errors import cause_of, context_of, family, name_of, parts_of, traceback_of
from aioworker.words import as_json, printable

SELDOM_SECONDS = 60.0
TRACEBACK_LENGTH = 16_000  # characters of it in a line of the log
_HALF = TRACEBACK_LENGTH // 2
WHOLE_ERRORS, WHOLE_FRAMES = 100, 2000  # of a traceback that Python itself may format
BRIEF_ERRORS, BRIEF_FRAMES, BRIEF_LENGTH = 10, 5, 1000  # of any larger one
LOOKED_AT = 10_000  # errors of one failure; what is behind them is not looked at


def fields(**values: Any) -> dict[str, dict[str, Any]]:
    """Return the `extra` of a log call: `log.info("chunk done", extra=fields(ids=1000))`."""
    return {"fields": values}


class Seldom:
    """Says whether the same thing may be said again: once a minute.

    Args:
        clock: Returns seconds that only ever grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._said: dict[Hashable, float] = {}

    def allows(self, what: Hashable) -> bool:
        """Return whether this was not said within a minute; from now on it was."""
        now = self._clock()
        if now - self._said.get(what, -math.inf) < SELDOM_SECONDS:
            return False
        lately = {one: at for one, at in self._said.items() if now - at < SELDOM_SECONDS}
        self._said = lately | {what: now}
        return True


class _Formatter(logging.Formatter):
    """What both forms share."""

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's name
        """Return a traceback, even if the error fails to be shown, or is as long as a message."""
        error = ei[1]
        if error is None:
            return super().formatException(ei)
        shown = _safe_text(lambda: traceback_text(error, ei[2]), error)
        middle = len(shown) - TRACEBACK_LENGTH
        return (
            shown if middle <= 0 else f"{shown[:_HALF]}\n… {middle} characters …\n{shown[-_HALF:]}"
        )


def traceback_text(error: BaseException, raised: TracebackType | None) -> str:
    """Return an error's traceback, as Python formats it unless that may take long.

    Python follows every path: a group in a group, twice, in a group, twice, is told 2 to the power
    of its depth times. What is too large is told of in part, each error by itself.

    Args:
        error: What was raised.
        raised: Its traceback.
    """
    if _is_small(error, raised):
        return "".join(traceback.format_exception(type(error), error, raised)).rstrip("\n")
    some = (one for one in islice(family(error), 1, LOOKED_AT) if not parts_of(one))
    told = [_brief(one, traceback_of(one)) for one in islice(some, BRIEF_ERRORS)]
    told += ["… too much to tell all of it …", _brief(error, raised)]
    return "\n\n".join(told)


def _is_small(error: BaseException, raised: TracebackType | None) -> bool:
    """Whether Python comes upon few errors and frames, by the paths that it takes."""
    errors, frames = 0, sum(1 for _ in islice(traceback.walk_tb(raised), WHOLE_FRAMES))
    rest, seen = [error], {id(error)}
    while rest and errors < WHOLE_ERRORS and frames < WHOLE_FRAMES:
        one = rest.pop()
        errors += 1
        if one is not error:
            frames += sum(1 for _ in islice(traceback.walk_tb(traceback_of(one)), WHOLE_FRAMES))
        for origin in (cause_of(one), context_of(one)):
            if origin is not None and id(origin) not in seen:
                seen.add(id(origin))
                rest.append(origin)
        parts = parts_of(one)
        if len(parts) > WHOLE_ERRORS:
            return False
        seen.update(map(id, parts))
        rest += parts
    return not rest and frames < WHOLE_FRAMES


def _brief(error: BaseException, raised: TracebackType | None) -> str:
    """Return the end of an error's own traceback, and its words."""
    frames = "".join(traceback.format_tb(raised, -BRIEF_FRAMES))  # the last ones
    words = _safe_text(lambda: error, error)[:BRIEF_LENGTH]
    return f"Traceback (most recent call last):\n{frames}{name_of(error)}: {words}"


def _safe_text(make: Callable[[], object], thing: object) -> str:
    """Return a text, even where the code of the thing that it is made of raises."""
    try:
        return str.__str__(str(make()))
    except BaseException as error:  # noqa: BLE001 - it is code of a user's
        return f"{name_of(thing)}, which cannot be shown: {name_of(error)}"


def _phrase(record: logging.LogRecord) -> str:
    # A captured warning ends with a newline.
    return _safe_text(record.getMessage, record.msg).rstrip()


def _values(record: logging.LogRecord) -> dict[str, str | float | None]:
    """Return a record's fields, in plain values."""
    found: dict[object, object] = getattr(record, "fields", {})
    return {str(_plain(name)): _plain(value) for name, value in found.items()}


def _plain(value: object) -> str | float | None:
    """Return what JSON has as well as it is, all else as text."""
    kind = type(value)  # which may be asked nothing: it has a class of its own
    if value is None or kind is bool or kind is str:
        return value  # type: ignore[return-value]  # one of these
    # JSON has no NaN, and Python shows no number of thousands of digits.
    if type(value) is int and abs(value) < 2**63:
        return value
    if type(value) is float and math.isfinite(value):
        return value
    return _safe_text(lambda: value, value)


class ConsoleFormatter(_Formatter):
    """Time, level, logger, phrase, then `name=value`; a traceback in lines of its own behind."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        values = "".join(
            f" {_quoted(name)}={_quoted(value)}" for name, value in _values(record).items()
        )
        head = f"{_time(record)} {record.levelname:<7} {record.name} {_phrase(record)}{values}"
        traceback = self.formatException(record.exc_info) if record.exc_info else ""
        indented = (f"    {line}" for line in traceback.splitlines())
        # What others have in it begins no line that could be taken for one of the log's.
        return "\n".join(map(printable, [head, *indented]))


class JsonFormatter(_Formatter):
    """One JSON object a line: time, level, logger, event and the fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": _phrase(record),
            **_values(record),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return as_json(line)


class JournalFormatter(logging.Formatter):
    """Another formatter's lines, each behind its priority, as systemd's journal reads it.

    Args:
        lines: The other formatter.
    """

    def __init__(self, lines: logging.Formatter) -> None:
        super().__init__()
        self._lines = lines

    def format(self, record: logging.LogRecord) -> str:
        """Return the lines."""
        mark = _mark(record.levelno)
        return mark + self._lines.format(record).replace("\n", f"\n{mark}")


# Priorities of syslog(3).
_PRIORITIES = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (logging.NOTSET, 7))


def _mark(level: int) -> str:
    return f"<{next(priority for least, priority in _PRIORITIES if level >= least)}>"


def journal_mark(level: int) -> str:
    """Return what a line on standard error begins with where that goes to the journal."""
    return _mark(level) if _to_journal() else ""


def _to_journal() -> bool:
    """Whether standard error goes to the journal: JOURNAL_STREAM names its device and inode."""
    try:
        stream = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{stream.st_dev}:{stream.st_ino}"


class _OncePerPlace(logging.Filter):
    """Lets the warnings of each line of code through once a minute, whatever their words.

    Python knows them by their words, which may be those of a message.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seldom = Seldom()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether this one may be logged."""
        words = record.getMessage()
        place = re.match(r".*?:\d+: \w+", words)
        return self._seldom.allows(place[0] if place else words)


def configure(level: str, form: str) -> None:
    """Log to standard error.

    Args:
        level: `debug`, `info`, `warning` or `error`, for aioworker's own lines.
        form: `console` or `json`.
    """
    handler = logging.StreamHandler(sys.stderr)
    lines = JsonFormatter() if form == "json" else ConsoleFormatter()
    handler.setFormatter(JournalFormatter(lines) if _to_journal() else lines)
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    # Our lines keep their form and their fields, whatever a user's module does to the root.
    ours = logging.getLogger("aioworker")
    ours.setLevel(level.upper())
    ours.handlers = [handler]
    ours.propagate = False
    for name in list(logging.root.manager.loggerDict):
        if name == ours.name or name.startswith(f"{ours.name}."):
            logging.getLogger(name).disabled = False
    logging.captureWarnings(capture=True)  # Python would print them as they are
    logging.getLogger("py.warnings").filters = [_OncePerPlace()]
    # What goes wrong on a connection is ours to say, once and with its cure.
    for library in ("aio_pika", "aiormq", "aiomysql"):
        logging.getLogger(library).setLevel(logging.CRITICAL)


def _time(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _quoted(value: str | float | None) -> str:
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    plain = text.isprintable() and text and not set(text) & set(' ="')
    return text if plain else json.dumps(text, ensure_ascii=False)
