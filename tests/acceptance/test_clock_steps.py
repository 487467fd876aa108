"""A clock that steps, beside running workers of tasks that share a budget.

For the budget that is as if all moments in its rows were earlier, or later. Those of one row alone
may be: a server that took over has perhaps not all of what the one before it wrote.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from support import servers
from tests.conftest import eventually, execute
from tests.several import BUDGET, Several, Start, assert_never_two_at_once, full, gaps, of

TASKS = {"a": "budget=writes", "b": 'budget=writes, rate_limit="2/s"'}
INTERVAL, OWN_INTERVAL = 0.2, 0.5
LEAST_GAP = 0.98
MESSAGES = 200  # more than run while a test lasts
WORKERS = 3
SETTLED = 5  # starts behind a step, one of them of the task with a limit of its own
SLACK_SECONDS = 2.0  # of a busy machine; less than the steps that would be waited for
# Forward makes what is noted earlier.
SECONDS = (-0.15, -3, -3600, 0.15, 3, 3600)
TIMES = 2  # each of them, at whatever moment of a start it comes
COLUMNS = ("last_start", "last_charge", "last_write", "wants_urgent", "wants_bulk")
MOVED = ", ".join(f"{column} = {column} + INTERVAL {{0}} SECOND" for column in COLUMNS)
ROWS = {
    "all rows": "TRUE",
    "the budget's row": f"task = '{BUDGET}'",
    "a task's row": f"task = '{full('b')}'",
}


class Step(NamedTuple):
    """A step of the clock.

    Args:
        seconds: By which what is noted was moved: below 0 where the clock was set forward.
        at: When, by the real clock.
        until: When the next one came.
    """

    seconds: float
    at: float
    until: float


@pytest.fixture
def several(private: servers.Servers, tmp_path: Path) -> Iterator[Several]:
    """Workers at work."""
    made = Several(private, tmp_path, TASKS, "5/s")
    for task in TASKS:
        made.publish(task, MESSAGES)
    for _ in range(WORKERS):
        made.worker(*TASKS)
    eventually(lambda: len(of(made.starts(), "b")) >= 2, "both tasks run")
    yield made
    made.place.end()


def play(several: Several, seconds: float, statement: str) -> Step:
    """Have the clock step, and wait until starts have come behind that."""
    at = several.now()
    execute(several.place.shop, statement)

    def settled() -> bool:
        found = several.starts(at)
        return len(found) >= SETTLED and bool(of(found, "b"))

    eventually(settled, f"starts behind a step by {seconds} s")
    return Step(seconds, at, several.now())


def behind(step: Step, starts: list[Start]) -> list[float]:
    """Return how far those starts that came behind a step were behind the one before them."""
    found = zip(starts[1:], gaps(starts), strict=True)
    return [gap for start, gap in found if step.at <= start.first < step.until]


def assert_promised(step: Step, starts: list[Start], interval: float) -> None:
    """One start early at most, none behind a step back; none later than one interval more."""
    found = behind(step, starts)
    early = [gap for gap in found if gap < LEAST_GAP * interval]
    assert len(early) <= (step.seconds < 0), (step, found)
    assert max(found) < 2 * interval + SLACK_SECONDS, (step, found)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("moved", ROWS)
def test_a_step_of_the_clock_gives_one_early_start_at_most(several: Several, moved: str) -> None:
    """By seconds or hours, and whichever row it is; runs never overlap."""
    steps = [
        play(
            several,
            seconds,
            f"UPDATE aioworker_budget SET {MOVED.format(seconds)} WHERE {ROWS[moved]}",
        )
        for seconds in SECONDS * TIMES
    ]

    starts = several.starts()
    assert_never_two_at_once(starts)
    for step in steps:
        assert_promised(step, starts, INTERVAL)
        assert_promised(step, of(starts, "b"), OWN_INTERVAL)


def test_a_replica_that_is_promoted_gives_no_early_start(several: Several) -> None:
    """Its rows lack the last start, and name the server before it: that costs an interval."""
    older = f"{MOVED.format(-INTERVAL)}, starts = GREATEST(starts, 1) - 1"
    step = play(several, 0, f"UPDATE aioworker_budget SET {older}, server = 'another:3306:1'")

    starts = several.starts()
    assert_never_two_at_once(starts)
    assert_promised(step, starts, INTERVAL)
    assert_promised(step, of(starts, "b"), OWN_INTERVAL)
