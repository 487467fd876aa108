"""What a worker says of its waits: each change once, no warning again and again."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import pytest

from aioworker import logs
from aioworker.status.presence import Presence

WARNING, INFO = logging.WARNING, logging.INFO


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


def reasons(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.fields["reason"] for one in caplog.records]  # type: ignore[attr-defined]


def test_a_failure_that_comes_and_goes_is_a_line_a_minute(
    presence: Presence, passing: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that flaps fills no log: its outages differ by their times alone."""
    for second in range(120):
        passing.now = second
        presence.tell("waiting", f"broker unreachable since 12:00:{second:02}: gone", WARNING)
        presence.tell("waiting", "budget", logging.DEBUG)

    assert len(reasons(caplog)) == 2


def test_another_failure_is_said_at_once(
    presence: Presence, caplog: pytest.LogCaptureFixture
) -> None:
    for reason in ("broker unreachable", "database unreachable", "broker unreachable"):
        presence.tell("waiting", reason, WARNING)

    assert reasons(caplog) == ["broker unreachable", "database unreachable"]


def test_a_failure_that_came_back_and_stays_is_said_when_its_minute_is_over(
    presence: Presence, passing: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """An hour's outage may begin half a minute after a short one."""
    for second, reason in ((0, "away since 1"), (5, "budget"), (30, "away since 2")):
        passing.now = second
        presence.tell("waiting", reason, WARNING if "away" in reason else logging.DEBUG)
    for second in range(31, 3600):
        passing.now = second
        presence.tell("waiting", "away since 2", WARNING)

    assert reasons(caplog) == ["away since 1", "away since 2"]


def test_what_is_well_is_said_at_each_change(
    presence: Presence, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(INFO, "aioworker")

    for _ in range(3):
        presence.tell("waiting", "nothing queued", INFO)
        presence.tell("running", "shop", logging.DEBUG)

    assert reasons(caplog) == ["nothing queued"] * 3
