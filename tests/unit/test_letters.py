"""A dead letter's line has fields, and no sender writes them in our place."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from aioworker.cli.dead import line
from aioworker.rabbitmq.letter import Filter, Letter
from tests.fakes import delivered

FAILED_AT = "2026-01-02T03:04:05+00:00"


def letter(**ours: Any) -> Letter:
    """Read a letter that says this of itself, each name after `x-aioworker-`."""
    told = {f"x-aioworker-{name.replace('_', '-')}": value for name, value in ours.items()}
    return Letter.of(delivered(headers={"id": "a", **told}))


@pytest.mark.parametrize(
    ("lane", "read"),
    [("urgent", "urgent"), ("bulk", "bulk"), ("bulk attempts=9", "bulk"), (7, "bulk")],
)
def test_a_lane_is_urgent_or_bulk(lane: Any, read: str) -> None:
    assert letter(failed_at=FAILED_AT, lane=lane).lane == read


@pytest.mark.parametrize(
    "at",
    [
        f"{FAILED_AT} lane=urgent attempts=1 all is well",
        "yesterday",
        "",
        "2026-02-30",
        7,
        None,
        bytearray(b"\xff"),
    ],
)
def test_what_is_no_time_is_an_unknown_time(at: Any) -> None:
    found = letter(failed_at=at, first_failed_at=at, reason="why")

    assert (found.failed_at, found.first_failed_at) == (None, None)
    assert line(found) == "a unknown time lane=bulk why"
    assert not Filter(older_than=timedelta()).matches(found)


@pytest.mark.parametrize(
    ("at", "read"),
    [
        (FAILED_AT, FAILED_AT),
        ("2026-01-02T03:04:05", FAILED_AT),
        ("2026-01-02 03:04:05Z", FAILED_AT),
        (datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), FAILED_AT),
        ("0001-01-01T00:00:00+23:59", "0001-01-01T00:00:00+23:59"),
    ],
)
def test_a_time_is_told_in_one_way(at: Any, read: str) -> None:
    """ISO 8601 lets any character stand between day and hour, a space too."""
    found = letter(failed_at=at)

    assert found.failed_at == read
    assert Filter(older_than=timedelta(days=1)).matches(found)


def test_an_id_is_one_word_of_its_line_and_is_known_by_it() -> None:
    """Its spaces would begin fields: `a 2026-01-01 lane=urgent`."""
    sent = f"a {FAILED_AT} lane=urgent\n\x1b[2J\u6ce8"
    found = Letter.of(delivered(headers={"id": sent, "x-aioworker-failed-at": FAILED_AT}))

    word = line(found).split(" ")[0]

    assert word == f"a\\x20{FAILED_AT}\\x20lane=urgent\\n\\x1b[2J\u6ce8"
    for name in (sent, word, word.replace("\u6ce8", r"\u6ce8")):
        assert Filter(ids=frozenset({name})).matches(found)
    assert not Filter(ids=frozenset({"a"})).matches(found)


@pytest.mark.parametrize("attempts", ["1 all is well", 1.5, True, None])
def test_attempts_that_are_no_number_are_not_told(attempts: Any) -> None:
    assert line(letter(failed_at=FAILED_AT, attempts=attempts, reason="why")) == (
        f"a {FAILED_AT} lane=bulk why"
    )


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ({}, "no reason is noted"),
        ({"x-aioworker-failed-at": FAILED_AT}, "no reason is noted"),
        ({"x-aioworker-reason": "lock"}, "no reason is noted; the last retry was for: lock"),
        ({"x-death": "forged"}, "no reason is noted"),
        ({"x-death": [{"queue": "q"}]}, "set aside by RabbitMQ: unknown reason"),
        ({"x-death": [{"reason": "expired"}]}, "set aside by RabbitMQ: expired"),
    ],
)
def test_rabbitmq_is_named_only_if_it_says_so(headers: dict[str, Any], reason: str) -> None:
    """A letter that somebody published there was told to be set aside by RabbitMQ."""
    assert Letter.of(delivered(headers=headers)).reason == reason
