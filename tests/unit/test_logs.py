"""Log lines: their tracebacks, and what is not said again and again."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable

import pytest

from aioworker.logs import ConsoleFormatter, JournalFormatter, JsonFormatter, Seldom
from aioworker.settling.failure import Failure


class UnshowableError(Exception):
    """One that a traceback cannot be made of: it asks for the cause."""

    @property
    def __cause__(self) -> BaseException | None:  # type: ignore[override]
        raise AttributeError


def fail(error: BaseException) -> None:
    password = "hidden"  # noqa: F841 - a local that no traceback may show
    raise error


def failed(error: BaseException) -> logging.LogRecord:
    """Return the record of a run that failed, as the worker logs it."""
    with pytest.raises(type(error)):
        fail(error)
    info = (type(error), error, error.__traceback__)
    return logging.LogRecord("aioworker", logging.WARNING, "", 0, "chunk failed", None, info)


def test_a_traceback_stands_behind_its_line() -> None:
    first, *rest = ConsoleFormatter().format(failed(ValueError("no shop"))).split("\n")

    assert first.endswith(" WARNING aioworker chunk failed")
    assert rest[0] == "    Traceback (most recent call last):"
    assert rest[-1] == "    ValueError: no shop"
    assert "hidden" not in "".join(rest)


def test_no_line_of_a_traceback_passes_for_one_of_the_logs() -> None:
    """What a message brings is often an error's text."""
    forged = "x\n2026-01-01T00:00:00Z INFO aioworker chunk done\r\x1b[2J\u2028\u202e"

    lines = ConsoleFormatter().format(failed(ValueError(forged))).split("\n")

    assert [line for line in lines[1:] if not line.startswith("    ")] == []
    assert [line for line in lines if not line.isprintable()] == []
    assert lines[-2:] == ["    \\x1b[2J", "    \\u202e"]


def test_a_warning_of_the_same_line_is_logged_once_a_minute_whatever_its_words() -> None:
    """One for each message, with the message's words in it, would fill the disk."""
    code = """if True:
        import warnings; from aioworker import logs; logs.configure('info', 'console')
        for shop in range(100):
            warnings.warn(f'no shop {shop}', stacklevel=1)
        warnings.warn('another', stacklevel=1)
    """

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
    )

    first, second = done.stderr.splitlines()
    assert first.endswith("UserWarning: no shop 0")
    assert second.endswith("UserWarning: another")


FORGED = "\x1b[31mred\x7f\n2026-01-01T00:00:00.000Z INFO    aioworker.worker worker stopped\r\u2028"


@pytest.mark.parametrize(
    ("name", "level", "phrase", "values"),
    [
        ("aioworker", "INFO", FORGED, {}),
        (FORGED, "INFO", "done", {}),
        ("aioworker", FORGED, "done", {}),
        ("aioworker", "INFO", "done", {FORGED: FORGED}),
    ],
    ids=["phrase", "logger", "level", "field"],
)
def test_nothing_of_a_record_begins_a_line_of_its_own(
    name: str, level: str, phrase: str, values: dict[str, str]
) -> None:
    """A task logs what a message brings; the journal would give each line a priority, too."""
    record = logging.LogRecord(name, logging.INFO, "", 0, "bad name %s", (phrase,), None)
    record.levelname = level
    record.fields = values

    line = JournalFormatter(ConsoleFormatter()).format(record)

    assert line.isprintable()
    assert line.startswith("<6>2")


def test_a_warning_is_one_line_of_the_log() -> None:
    """A module's `warnings.warn` may show what a message brings."""
    program = (
        "import warnings; from aioworker import logs; logs.configure('info', 'console');"
        f"warnings.warn({FORGED!r}, stacklevel=1)"
    )

    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )

    [line] = done.stderr.splitlines()
    assert line.isprintable()
    assert " WARNING py.warnings <string>:1: UserWarning: \\x1b[31mred\\x7f\\n2026-" in line
    assert not line.endswith("\\n")


def test_a_traceback_is_a_field_of_a_json_line() -> None:
    line = JsonFormatter().format(failed(ValueError("no\nshop")))

    assert "\n" not in line
    assert json.loads(line)["traceback"].startswith("Traceback (most recent call last):\n")
    assert json.loads(line)["traceback"].endswith("ValueError: no\nshop")


@pytest.mark.parametrize("formatter", [ConsoleFormatter(), JsonFormatter()], ids=["text", "json"])
def test_an_error_that_cannot_be_shown_loses_no_line(formatter: logging.Formatter) -> None:
    line = formatter.format(failed(UnshowableError()))

    assert "chunk failed" in line
    assert "UnshowableError, which cannot be shown: AttributeError" in line


def test_every_line_of_a_traceback_has_its_priority_in_the_journal() -> None:
    lines = JournalFormatter(ConsoleFormatter()).format(failed(ValueError("no"))).split("\n")

    assert [line for line in lines if not line.startswith("<4>")] == []


def test_the_same_is_said_once_a_minute() -> None:
    now = 0.0
    seldom = Seldom(lambda: now)
    said = []

    for now in (0.0, 1.0, 59.0, 60.0, 61.0, 125.0):
        said.append((seldom.allows("one"), seldom.allows(("another", now))))

    assert said == [
        (True, True),
        (False, True),
        (False, True),
        (True, True),
        (False, True),
        (True, True),
    ]


def test_what_was_said_long_ago_is_forgotten() -> None:
    """A worker lives for months, and each outage has words of its own."""
    now = 0.0
    seldom = Seldom(lambda: now)

    for minute in range(100):
        now = 61.0 * minute
        seldom.allows(minute)

    assert len(vars(seldom)["_said"]) == 1


def lookup(at: int) -> None:
    if at == 1:
        [][0]
    elif at == 2:
        [][1]
    {0: None}[at]


def cut_off(at: int) -> None:
    try:
        lookup(at)
    except LookupError as error:
        raise TimeoutError("cut off") from error


def grouped(at: int) -> None:
    try:
        lookup(at)
    except LookupError as error:
        raise ExceptionGroup("all", [error]) from None


@pytest.mark.parametrize("work", [lookup, cut_off, grouped])
def test_errors_are_of_one_kind_if_the_same_lines_raised_them(work: Callable[[int], None]) -> None:
    """Behind what wraps them, too: a task group, the end of a run's time."""
    kinds = []
    for at in (1, 1, 2, 3):
        with pytest.raises(Exception) as raised:  # noqa: PT011 - whatever it is
            work(at)
        kinds.append(Failure.of(raised.value).fingerprint)

    assert kinds[0] == kinds[1]
    assert len(set(kinds)) == 3
