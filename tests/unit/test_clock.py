"""The database's time of day, and how it differs from this machine's."""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta

import pytest

from aioworker.clock import Clock

NOW = datetime(2026, 11, 28, 12, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


def test_before_the_database_was_asked_it_is_this_machines_time() -> None:
    assert Clock("shop", lambda: NOW).now() == NOW


def test_a_step_of_this_machines_clock_is_none_of_the_databases() -> None:
    own, seconds = NOW, 0.0
    made = Clock("shop", lambda: own, lambda: seconds)
    made.set(NOW + MINUTE, took=0)

    own += 60 * MINUTE
    seconds += 60

    assert made.now() == NOW + 2 * MINUTE


def test_clocks_that_differ_are_said_once_until_they_agree(
    caplog: pytest.LogCaptureFixture,
) -> None:
    made = Clock("shop", lambda: NOW)

    for theirs in (NOW, NOW + MINUTE, NOW + 2 * MINUTE, NOW, NOW - MINUTE):
        made.set(theirs, took=0)

    ahead = [one.fields["ahead_seconds"] for one in caplog.records]  # type: ignore[attr-defined]
    assert ahead == [-60, 60]
    assert {one.levelno for one in caplog.records} == {logging.WARNING}


def test_an_answer_that_took_its_time_is_no_other_clock(caplog: pytest.LogCaptureFixture) -> None:
    Clock("shop", lambda: NOW).set(NOW - timedelta(seconds=8), took=9)

    assert caplog.records == []
