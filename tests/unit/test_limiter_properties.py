"""What no sequence of arrivals, runs, lulls, pauses and new rates may break."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from aioworker.limits import PERIODS, Limiter, RateLimit
from tests.fakes import FakeClock

ROUNDING = 1e-6
LATE = 0.002  # the limiter's own rounding of a wait

rates = st.builds(
    RateLimit, st.one_of(st.integers(1, 5), st.integers(1, 200)), st.sampled_from(["s", "m", "h"])
)


@dataclass(frozen=True)
class Arrivals:
    """Messages that come together, and how long each runs, in seconds."""

    runs: list[float]


@dataclass(frozen=True)
class Lull:
    """Seconds without anything new; a pause is the same to the limiter."""

    seconds: float


seconds = st.floats(0, 7200, allow_nan=False)
events = st.lists(
    st.one_of(
        st.builds(Arrivals, st.lists(st.floats(0, 100, allow_nan=False), max_size=12)),
        st.builds(Lull, seconds),
        rates,
    ),
    max_size=12,
)


@dataclass(frozen=True)
class Start:
    """A start, when it could have been at the earliest, and the interval in force."""

    at: float
    possible_at: float
    interval: float


def play(rate: RateLimit, story: list[Arrivals | Lull | RateLimit]) -> list[Start]:
    """Start each message as soon as the limiter lets it; return the starts."""

    async def run() -> list[Start]:
        clock = FakeClock(asyncio.get_running_loop())
        limiter = Limiter(rate.interval)
        starts: list[Start] = []
        for event in story:
            match event:
                case Lull():
                    clock.now += event.seconds
                case RateLimit():
                    await limiter.change(event.interval)
                case Arrivals():
                    for length in event.runs:
                        before = starts[-1].at + limiter.interval if starts else 0.0
                        possible = max(clock.now, before)
                        while wait := limiter.due_in():
                            clock.now += wait
                        async with asyncio.timeout(0):  # it never waits
                            await limiter.charge()
                        starts.append(Start(clock.now, possible, limiter.interval))
                        clock.now += length
        return starts

    return asyncio.run(run())


@given(rates, events)
def test_two_starts_are_never_nearer_than_the_interval(
    rate: RateLimit, story: list[Arrivals | Lull | RateLimit]
) -> None:
    starts = play(rate, story)

    for one, other in pairwise(starts):
        assert other.at - one.at >= other.interval - ROUNDING


@given(rates, events)
def test_no_window_of_one_unit_holds_more_starts_than_the_rate(
    rate: RateLimit, story: list[Arrivals | Lull | RateLimit]
) -> None:
    """Any half-open window, wherever it begins."""
    starts = play(rate, [event for event in story if not isinstance(event, RateLimit)])

    for first, one_too_many in zip(starts, starts[rate.starts :], strict=False):
        assert one_too_many.at - first.at >= PERIODS[rate.unit] - ROUNDING


@given(rates, events)
def test_nothing_waits_longer_than_it_must(
    rate: RateLimit, story: list[Arrivals | Lull | RateLimit]
) -> None:
    """No starvation: a start begins once the interval, and the run before it, are over."""
    for start in play(rate, story):
        assert start.at <= start.possible_at + LATE
