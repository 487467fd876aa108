"""Four tasks that share one budget, on workers that serve some of them each.

Judged by a table that triggers on the tasks' own four tables fill, never by what a worker says.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

from aioworker import Producer
from support import servers
from tests.conftest import eventually, execute, importable, rows
from tests.place import Place

APP = """
from aioworker import Budget, Context, task

writes = Budget("writes", rate_limit="60/m")

def register(name, **options):
    @task(name=f"four.{name}", budget=writes, **options)
    async def write(ctx: Context, number: int) -> None:
        for _ in range(2):
            async with ctx.transaction() as cursor:
                await cursor.execute(f"INSERT INTO four_{name} (number) VALUES (%s)", (number,))

for name in "abc":
    register(name)
register("d", rate_limit="20/m")
"""
INTERVAL, OWN_INTERVAL = 1.0, 3.0
LEAST_GAP = 0.98
LEAST_USED = 0.9
AUDIT_SECONDS = 0.1  # of a statement: its trigger notes when it began, the worker when it returned
TASKS = "abcd"
SUBSETS = (("four.a", "four.b"), ("four.b", "four.c"), ("four.c", "four.d", "four.a"))
MESSAGES = 12
NOTED = "CREATE TABLE noted (at DECIMAL(18, 6) NOT NULL, task CHAR(1) NOT NULL, start BIGINT)"
TABLE = "CREATE TABLE four_{0} (number INT NOT NULL)"
TRIGGER = (
    "CREATE TRIGGER noted_{0} AFTER INSERT ON four_{0} FOR EACH ROW INSERT INTO noted"
    " SELECT UNIX_TIMESTAMP(SYSDATE(6)), '{0}', starts FROM aioworker_budget"
    " WHERE task = 'budget:writes'"
)


class Start(NamedTuple):
    """What one run wrote, by the database's clock, in seconds."""

    task: str
    first: float
    last: float


class Four:
    """A place with the four tasks."""

    def __init__(self, private: servers.Servers, folder: Path) -> None:
        (folder / "four.py").write_text(APP)
        self.app = {"AIOWORKER_APP": "four", "PYTHONPATH": importable(folder)}
        self.place = Place(private, folder)
        execute(self.place.shop, NOTED, *(one.format(t) for t in TASKS for one in (TABLE, TRIGGER)))
        made = self.place.run("init", **self.app)
        assert made.returncode == 0, made.stderr
        self._numbers = itertools.count(1)

    def publish(self, task: str, messages: int = 1, *, urgent: bool = False) -> None:
        """Publish messages of a task."""

        async def publish_all() -> None:
            async with Producer(self.place.servers.amqp_url) as producer:
                for number in itertools.islice(self._numbers, messages):
                    await producer.publish(f"four.{task}", number, urgent=urgent)

        asyncio.run(publish_all())

    def starts(self) -> list[Start]:
        """Return each start by its rows, in their order."""
        found = rows(
            self.place.shop,
            "SELECT task, MIN(at), MAX(at) FROM noted GROUP BY task, start ORDER BY 2",
        )
        return [Start(task, float(first), float(last)) for task, first, last in found]

    def done(self) -> int:
        """Return how many messages have run, of all tasks."""
        tables = " UNION ALL ".join(f"SELECT '{t}', number FROM four_{t}" for t in TASKS)
        return len(rows(self.place.shop, f"SELECT DISTINCT * FROM ({tables}) AS found"))


@pytest.fixture
def four(private: servers.Servers, tmp_path: Path) -> Iterator[Four]:
    made = Four(private, tmp_path)
    yield made
    made.place.end()


def assert_strict(starts: list[Start]) -> None:
    """Never two runs at once; the spacing of the budget and of the task with a limit of its own."""
    for one, other in pairwise(starts):
        assert other.first - one.first >= LEAST_GAP * INTERVAL, starts
        assert other.first > one.last, starts
    for one, other in pairwise([one for one in starts if one.task == "d"]):
        assert other.first - one.first >= LEAST_GAP * OWN_INTERVAL, starts


def assert_audited(four: Four, starts: list[Start]) -> None:
    """What the starts' own rows say is what the triggers have noted."""
    told = four.place.audit()
    assert all(one["kept"] for one in told.values()), told
    for key, noted in (
        ("budget:writes", starts),
        ("four.d", [one for one in starts if one.task == "d"]),
    ):
        interval = INTERVAL if key == "budget:writes" else OWN_INTERVAL
        least = min(other.first - one.first for one, other in pairwise(noted))
        assert told[key]["least_write"] * interval == pytest.approx(least, abs=AUDIT_SECONDS)


def until(four: Four, messages: int, each: Callable[[], None]) -> None:
    """Do something again and again until so many messages have run."""
    deadline = time.monotonic() + 3 * messages * INTERVAL
    while four.done() < messages:
        assert time.monotonic() < deadline, f"{four.done()} done: {four.starts()}"
        each()


@pytest.mark.timeout(300)
def test_four_tasks_share_a_budget_while_workers_are_killed(four: Four) -> None:
    """One of three workers is killed every two seconds; every start that is allowed is used."""
    for task in TASKS:
        four.publish(task, MESSAGES)
    subsets = itertools.cycle(SUBSETS)
    lives = [four.place.worker(*next(subsets), **four.app) for _ in SUBSETS]

    def live_and_die() -> None:
        time.sleep(2)
        lives.pop(0).end()
        lives.append(four.place.worker(*next(subsets), **four.app))

    until(four, len(TASKS) * MESSAGES, live_and_die)

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
def test_an_urgent_message_of_any_task_goes_first(four: Four) -> None:
    """And every fifth start is of a bulk lane, so that a stream of urgent ones stops no sweep."""
    for task in "ab":
        four.publish(task, 2 * MESSAGES)
    four.place.worker("four.a", **four.app)
    four.place.worker("four.b", "four.c", **four.app)
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
