"""Rate limits as people write them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from aioworker.errors import RateLimitError
from aioworker.limits import (
    Interval,
    Limiter,
    NoLimit,
    RateLimit,
    Source,
    in_force,
    parse_limit,
)
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


@dataclass(frozen=True)
class Row:
    """What is set at run time."""

    gap_us: int | None = None
    pause: str = ""


SAID = [None, "none", "5/m", "0/m"]
ROWS = [None, Row(), Row(0), Row(12_000_000), Row(45_500_000)]
PAUSE = "paused by alice since 2026-11-29 12:00:00 UTC: lag"


def said(text: str | None) -> RateLimit | NoLimit | None:
    return None if text is None else parse_limit(text)


@pytest.mark.parametrize("own", SAID)
@pytest.mark.parametrize("setting", SAID)
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_first_who_says_anything_sets_the_rate(
    row: Row | None, setting: str | None, own: str | None
) -> None:
    """At run time, by setting, by the task: what says no limit says something."""
    at_run_time = {None: None, 0: "none", 12_000_000: "5/m", 45_500_000: "1 in 45.5 s"}
    words = [
        (at_run_time[row.gap_us if row else None], Source.RUN_TIME),
        (setting, Source.SETTING),
        (own, Source.TASK),
        ("unknown", Source.UNKNOWN),
    ]

    found = in_force(said(own), said(setting), row)

    [first, *_others] = [one for one in words if one[0] is not None]
    assert (found.rate, found.source) == first


@pytest.mark.parametrize(
    ("workers", "rate", "source"),
    [
        ([], "2/m", Source.TASK),
        (["2/m"], "2/m", Source.TASK),
        (["3/m"], "3/m", Source.WORKERS),
        (["none"], "none", Source.WORKERS),
        (["0/m"], "0/m", Source.WORKERS),
        (["3/m", "4/m"], "2/m", Source.TASK),
    ],
    ids=str,
)
def test_workers_that_agree_know_their_rate_better(
    workers: list[str], rate: str, source: Source
) -> None:
    """They may have another setting than this process, or another version of the task."""
    own = RateLimit.parse("2/m")

    found = in_force(own, None, Row(), workers)

    assert (found.rate, found.source) == (rate, source)


@pytest.mark.parametrize(
    ("row", "setting", "workers", "rate", "source"),
    [
        (None, "2/m", ["3/m"], "3/m", Source.WORKERS),
        (None, "2/m", ["2/m"], "2/m", Source.SETTING),
        (Row(12_000_000), "2/m", ["3/m"], "5/m", Source.RUN_TIME),
        (Row(0), None, ["3/m"], "none", Source.RUN_TIME),
        (None, None, ["3/m"], "3/m", Source.WORKERS),
        (None, None, ["3/m", "4/m"], "unknown", Source.UNKNOWN),
    ],
    ids=str,
)
def test_workers_rates_stand_behind_what_is_set_at_run_time(
    row: Row | None, setting: str | None, workers: list[str], rate: str, source: Source
) -> None:
    found = in_force(None, said(setting), row, workers)

    assert (found.rate, found.source) == (rate, source)


@pytest.mark.parametrize(
    ("row", "setting", "pause"),
    [
        (None, "2/m", ""),
        (None, "0/m", "paused: rate limit 0/m"),
        (Row(), "0/m", "paused: rate limit 0/m"),
        (Row(12_000_000), "0/m", ""),
        (Row(0), "0/m", ""),
        (Row(pause=PAUSE), "2/m", PAUSE),
        (Row(pause=PAUSE), "none", PAUSE),
        (Row(pause=PAUSE), "0/m", PAUSE),
        (Row(12_000_000, PAUSE), "0/m", PAUSE),
    ],
    ids=str,
)
def test_a_pause_is_of_the_row_or_of_a_rate_of_nothing(
    row: Row | None, setting: str, pause: str
) -> None:
    """A rate that is set at run time ends the pause that a rate of nothing is."""
    found = in_force(None, said(setting), row)

    assert (found.pause, found.paused) == (pause, bool(pause))


def test_workers_whose_rate_is_nothing_pause_the_task() -> None:
    assert in_force(None, None, None, ["0/h"]).pause == "paused: rate limit 0/h"


@pytest.mark.parametrize(
    ("row", "setting", "gap_us", "interval"),
    [
        (None, None, None, None),
        (None, "none", None, None),
        (None, "0/m", None, None),
        (None, "2/m", 30_000_000, 30.0),
        (None, "7/m", 8_571_429, 60 / 7),
        (Row(0), "2/m", None, None),
        (Row(45_500_000), "2/m", 45_500_000, 45.5),
        (Row(45_500_000, PAUSE), "2/m", 45_500_000, 45.5),
    ],
    ids=str,
)
def test_a_rate_in_force_has_the_interval_of_its_limit(
    row: Row | None, setting: str | None, gap_us: int | None, interval: float | None
) -> None:
    """None without a limit; also where a pause lets none begin, and then the pause is told."""
    found = in_force(None, said(setting), row)

    assert (found.gap_us, found.interval) == (gap_us, interval)


@pytest.mark.parametrize(
    ("text", "gap_us"),
    [("2/m", 30_000_000), ("20/h", 180_000_000), ("7/m", 8_571_429), ("3/s", 333_334)],
)
def test_an_interval_is_rounded_up_and_shown_as_the_rate_it_is(text: str, gap_us: int) -> None:
    """Rounded down, a seventh start would fit into the minute."""
    assert RateLimit.parse(text).gap_us == gap_us
    assert str(Interval(gap_us)) == text


@pytest.mark.parametrize(("gap_us", "shown"), [(1_000_000, "60/m"), (45_500_000, "1 in 45.5 s")])
def test_any_interval_that_an_operator_writes_is_shown(gap_us: int, shown: str) -> None:
    assert str(Interval(gap_us)) == shown


async def test_a_start_that_is_not_due_is_waited_for_to_its_moment(clock: FakeClock) -> None:
    limiter = Limiter(30)
    await limiter.charge()

    await clock.advance(12)

    assert limiter.due_in() == pytest.approx(18)


def test_a_paused_rate_has_no_interval_to_charge() -> None:
    with pytest.raises(RateLimitError, match="expected a rate that starts anything, got: '0/h'"):
        _ = RateLimit.parse("0/h").gap_us
