"""Four tasks that share one budget, on workers that serve some of them each.

Judged by a table that triggers on the tasks' own four tables fill, never by what a worker says.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from support import servers
from tests.conftest import eventually
from tests.several import (
    BUDGET,
    Several,
    Start,
    assert_never_two_at_once,
    full,
    gaps,
    of,
    until,
)

SHARING = dict.fromkeys("abc", "budget=writes") | {"d": 'budget=writes, rate_limit="20/m"'}
INTERVAL, OWN_INTERVAL = 1.0, 3.0
LEAST_GAP = 0.98
LEAST_USED = 0.9
AUDIT_SECONDS = 0.1  # of a statement: its trigger notes when it began, the worker when it returned
TASKS = "abcd"
SUBSETS = ("ab", "bc", "cda")
MESSAGES = 12


@pytest.fixture
def four(private: servers.Servers, tmp_path: Path) -> Iterator[Several]:
    made = Several(private, tmp_path, SHARING, "60/m")
    yield made
    made.place.end()


def assert_strict(starts: list[Start]) -> None:
    """Never two runs at once; the spacing of the budget and of the task with a limit of its own."""
    assert_never_two_at_once(starts)
    assert min(gaps(starts)) >= LEAST_GAP * INTERVAL, starts
    assert min(gaps(of(starts, "d")), default=OWN_INTERVAL) >= LEAST_GAP * OWN_INTERVAL, starts


def assert_audited(four: Several, starts: list[Start]) -> None:
    """What the starts' own rows say is what the triggers have noted."""
    told = four.place.audit()
    assert all(one["kept"] for one in told.values()), told
    for key, interval, noted in (
        (BUDGET, INTERVAL, starts),
        (full("d"), OWN_INTERVAL, of(starts, "d")),
    ):
        least = min(gaps(noted))
        assert told[key]["least_write"] * interval == pytest.approx(least, abs=AUDIT_SECONDS)


@pytest.mark.timeout(300)
def test_four_tasks_share_a_budget_while_workers_are_killed(four: Several) -> None:
    """One of three workers is killed every two seconds; every start that is allowed is used."""
    for task in TASKS:
        four.publish(task, MESSAGES)
    subsets = itertools.cycle(SUBSETS)
    lives = [four.worker(*next(subsets)) for _ in SUBSETS]

    def live_and_die() -> None:
        time.sleep(2)
        lives.pop(0).end()
        lives.append(four.worker(*next(subsets)))

    messages = len(TASKS) * MESSAGES
    until(four, messages, 3 * messages * INTERVAL, live_and_die)

    starts = four.starts()
    assert_strict(starts)
    assert_audited(four, starts)
    # While others wait. What comes behind is of the task with a limit of its own.
    last = max(n for n, one in enumerate(starts) if one.task != "d")
    used = last * INTERVAL / (starts[last].first - starts[0].first)
    assert used >= LEAST_USED, starts
    for task in "abc":  # none starves: they take turns
        places = [n for n, one in enumerate(starts[: last + 1]) if one.task == task]
        assert max(b - a for a, b in pairwise(places)) <= 2 * len(TASKS), starts


@pytest.mark.timeout(300)
def test_an_urgent_message_of_any_task_goes_first(four: Several) -> None:
    """And every fifth start is of a bulk lane, so that a stream of urgent ones stops no sweep."""
    for task in "ab":
        four.publish(task, 2 * MESSAGES)
    four.worker("a")
    four.worker(*"bc")
    eventually(lambda: len(four.starts()) >= 2, "bulk ones run")
    before = len(four.starts())

    four.publish("c", 7, urgent=True)
    eventually(
        lambda: sum(one.task == "c" for one in four.starts()) == 7, "the urgent ones have run"
    )

    starts = four.starts()
    assert_strict(starts)
    tasks = [one.task for one in starts[before:]]
    places = [n for n, task in enumerate(tasks) if task == "c"]
    assert places[0] <= len(TASKS) + 1, tasks
    # Of those behind the first one, four in a row at most; then a bulk one.
    between = [b - a - 1 for a, b in pairwise(places)]
    assert sum(between) <= 2, tasks
    assert max(len(run) for run in "".join(tasks).split("a") for run in run.split("b")) <= 4, tasks


@pytest.mark.timeout(300)
def test_no_task_starves_beside_a_stream_of_urgent_messages(four: Several) -> None:
    """An urgent message waits for one start of each task and a bulk one; so does a bulk one."""
    most = len(TASKS) + 1
    streams = [four.publish(task, 2 * MESSAGES, urgent=True) for task in "ab"]
    bulk = four.publish("c", 3)
    for tasks in ("ab", "cd", "abcd"):
        four.worker(*tasks)
    eventually(lambda: len(of(four.starts(), "ab")) >= 2, "urgent ones run")

    before = len(four.starts())
    urgent = [*four.publish("d", urgent=True), *four.publish("c", urgent=True)]
    asked = {*bulk, *urgent}
    eventually(lambda: asked <= {one.number for one in four.starts()}, "each of them has run")

    starts = four.starts()
    assert_strict(starts)
    numbers = [one.number for one in starts]
    assert not {*streams[0], *streams[1]} <= {*numbers}, "the streams went on meanwhile"
    # What was under way when they came, and then these.
    assert all(numbers.index(one) - before <= most + 1 for one in urgent), starts
    places = [-1, *(numbers.index(one) for one in bulk)]
    assert max(b - a for a, b in pairwise(places)) <= most + 1, starts
