"""Rate limits as people write them."""

from __future__ import annotations

import pytest

from aioworker.errors import RateLimitError
from aioworker.limits import Limiter, RateLimit
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
    "text",
    ["2", "2/min", "nan/m", "inf/m", "-1/m", "2 / m", "1e1/m", "1.5/m", "2/M", "", "/m", "٢/m"],
)
def test_anything_but_count_and_unit_is_refused_with_an_example(text: str) -> None:
    """Celery takes `2` for two a second, and `nan/m` for no limit."""
    with pytest.raises(RateLimitError) as refusal:
        RateLimit.parse(text)

    assert str(refusal.value) == f"expected rate limit as COUNT/UNIT, such as '2/m', got: {text!r}"


async def test_a_start_that_is_not_due_is_waited_for_to_its_moment(clock: FakeClock) -> None:
    limiter = Limiter(RateLimit.parse("2/m"))
    await limiter.charge()

    await clock.advance(12)

    assert limiter.due_in() == pytest.approx(18)


async def test_a_paused_rate_cannot_be_charged(clock: FakeClock) -> None:
    with pytest.raises(RateLimitError, match="expected a rate that starts anything, got: '0/h'"):
        await Limiter(RateLimit.parse("0/h")).charge()
