"""What a worker says of its waits: each change once, no warning again and again."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import pytest

from aioworker import logs
from aioworker.reasons import Reason, ReasonKind
from aioworker.status.presence import Presence

BUDGET = Reason(ReasonKind.BUDGET, "budget")


@dataclass
class Clock:
    """Seconds that the test lets pass."""

    now: float = 0.0


@pytest.fixture
def passing(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of what was said."""
    clock = Clock()
    monkeypatch.setattr("aioworker.status.presence.Seldom", lambda: logs.Seldom(lambda: clock.now))
    return clock


@pytest.fixture
def presence(passing: Clock) -> Presence:
    """A worker that keeps no row."""
    return Presence("shop", "here", 1, None, lambda _doing: None, None)


def away(words: str) -> Reason:
    return Reason(ReasonKind.BROKER_UNREACHABLE, words)


def reasons(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.fields["reason"] for one in caplog.records]  # type: ignore[attr-defined]


def test_a_failure_that_comes_and_goes_is_a_line_a_minute(
    presence: Presence, passing: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that flaps fills no log: its outages differ by their times alone."""
    for second in range(120):
        passing.now = second
        presence.report(away(f"broker unreachable since 12:00:{second:02}: gone"))
        presence.report(BUDGET)

    assert len(reasons(caplog)) == 2


def test_another_failure_is_said_at_once(
    presence: Presence, caplog: pytest.LogCaptureFixture
) -> None:
    for reason in ("broker unreachable", "database unreachable", "broker unreachable"):
        presence.report(away(reason))

    assert reasons(caplog) == ["broker unreachable", "database unreachable"]


def test_a_failure_that_came_back_and_stays_is_said_when_its_minute_is_over(
    presence: Presence, passing: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """An hour's outage may begin half a minute after a short one."""
    for second, reason in ((0, away("away since 1")), (5, BUDGET), (30, away("away since 2"))):
        passing.now = second
        presence.report(reason)
    for second in range(31, 3600):
        passing.now = second
        presence.report(away("away since 2"))

    assert reasons(caplog) == ["away since 1", "away since 2"]


@pytest.mark.parametrize("kind", ReasonKind)
def test_each_kind_is_said_with_its_level_and_its_state(
    presence: Presence, caplog: pytest.LogCaptureFixture, kind: ReasonKind
) -> None:
    """A program reads the kind, where a person reads the words."""
    caplog.set_level(logging.DEBUG, "aioworker")

    presence.report(Reason(kind, "words"))

    [line] = caplog.records
    assert (line.levelno, line.getMessage()) == (kind.level, kind.state)
    said = {"task": "shop", "kind": kind, "reason": "words"}
    assert line.fields == said  # type: ignore[attr-defined]


def test_waits_that_come_with_each_start_are_a_line_for_the_first_of_them(
    presence: Presence, caplog: pytest.LogCaptureFixture
) -> None:
    """Each start has its own moment, and two a minute would fill the log."""
    caplog.set_level(logging.INFO, "aioworker")
    kinds = (ReasonKind.BUDGET, ReasonKind.TURN, ReasonKind.BUDGET, ReasonKind.EMPTY)

    for number, kind in enumerate((*kinds, ReasonKind.BUDGET)):
        presence.report(Reason(kind, f"moment {number}"))

    assert reasons(caplog) == ["moment 0", "moment 3", "moment 4"]


def test_what_is_well_is_said_at_each_change(
    presence: Presence, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aioworker")

    for _ in range(3):
        presence.report(Reason(ReasonKind.EMPTY, "nothing queued"))
        presence.report(Reason(ReasonKind.RUNNING, "shop"))

    assert reasons(caplog) == ["nothing queued"] * 3
