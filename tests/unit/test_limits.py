"""Rate limits as people write them."""

from __future__ import annotations

import pytest

from aioworker.errors import RateLimitError
from aioworker.limits import Limiter, NoLimit, RateLimit, in_force, parse_limit, shown_interval
from tests.fakes import FakeClock


@pytest.mark.parametrize(
    ("text", "interval"),
    [("2/m", 30.0), ("1/s", 1.0), ("20/h", 180.0), ("1000/m", 0.06), ("0/m", float("inf"))],
)
def test_a_rate_is_read_as_the_seconds_between_starts(text: str, interval: float) -> None:
    rate = RateLimit.parse(text)

    assert rate.interval == pytest.approx(interval)
    assert str(rate) == text


@pytest.mark.parametrize(
    ("text", "cure"),
    [
        ("2", "; write '2/s'"),
        ("2/min", "; write '2/m'"),
        ("2 / m", "; write '2/m'"),
        ("2/M", "; write '2/m'"),
        ("1e1/m", "; write '10/m'"),
        ("1.5/m", "; write '90/h'"),
        ("nan/m", "; write '0/m' to pause, or 'none' for no limit"),
        ("inf/m", "; write '0/m' to pause, or 'none' for no limit"),
        ("-1/m", "; write '0/m' to pause, or 'none' for no limit"),
        ("null", "; write 'none' for no limit"),
        ("unlimited", "; write 'none' for no limit"),
        ("1/day", ""),
        ("0.0001/h", ""),
        ("", ""),
        ("/m", ""),
        ("٢/m", ""),
    ],
)
def test_anything_but_count_and_unit_is_refused_with_what_to_write(text: str, cure: str) -> None:
    """Celery takes `2` for two a second, and `nan/m` for no limit."""
    with pytest.raises(RateLimitError) as refusal:
        RateLimit.parse(text)

    assert str(refusal.value) == (
        f"expected rate limit as COUNT/UNIT, such as '2/m', or none, got: {text!r}{cure}"
    )


@pytest.mark.parametrize("text", ["none", "None", "NONE", " none", "none\n"])
def test_none_is_no_limit_however_it_is_written(text: str) -> None:
    """Python writes it with a capital letter, a secret's file with a newline."""
    assert parse_limit(text) is NoLimit.NONE


@pytest.mark.parametrize("text", ["", "null", "nolimit", "no ne", "none/m"])
def test_nothing_but_none_is_no_limit(text: str) -> None:
    with pytest.raises(RateLimitError, match=r"^expected rate limit as COUNT/UNIT"):
        parse_limit(text)


@pytest.mark.parametrize(
    ("said", "own", "limit"),
    [
        (None, "2/m", "2/m"),
        (None, None, None),
        ("none", "2/m", None),
        ("none", None, None),
        ("5/m", "2/m", "5/m"),
        ("0/m", None, "0/m"),
    ],
)
def test_no_limit_that_is_said_wins_over_the_tasks_own(
    said: str | None, own: str | None, limit: str | None
) -> None:
    """Nothing that is said leaves the task its own; `none` does not."""
    found = in_force(
        None if said is None else parse_limit(said), None if own is None else RateLimit.parse(own)
    )

    assert found == (None if limit is None else RateLimit.parse(limit))


@pytest.mark.parametrize(
    ("text", "gap_us"),
    [("2/m", 30_000_000), ("20/h", 180_000_000), ("7/m", 8_571_429), ("3/s", 333_334)],
)
def test_an_interval_is_rounded_up_and_shown_as_the_rate_it_is(text: str, gap_us: int) -> None:
    """Rounded down, a seventh start would fit into the minute."""
    assert RateLimit.parse(text).gap_us == gap_us
    assert shown_interval(gap_us) == text


@pytest.mark.parametrize(
    ("gap_us", "shown"), [(0, "none"), (1_000_000, "60/m"), (45_500_000, "1 in 45.5 s")]
)
def test_any_interval_that_an_operator_writes_is_shown(gap_us: int, shown: str) -> None:
    assert shown_interval(gap_us) == shown


async def test_a_start_that_is_not_due_is_waited_for_to_its_moment(clock: FakeClock) -> None:
    limiter = Limiter(30)
    await limiter.charge()

    await clock.advance(12)

    assert limiter.due_in() == pytest.approx(18)


def test_a_paused_rate_has_no_interval_to_charge() -> None:
    with pytest.raises(RateLimitError, match="expected a rate that starts anything, got: '0/h'"):
        _ = RateLimit.parse("0/h").gap_us
