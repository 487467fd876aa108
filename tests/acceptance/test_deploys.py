"""Deploys of code in which tasks begin to share a budget, or no longer do, amid a backlog.

Workers are replaced one after the other. Judged by the rows that starts wrote.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from aioworker.budget.tables import ALIVE_SECONDS
from aioworker.limits import POLL_SECONDS
from support import servers
from tests.acceptance.test_worker import Manager
from tests.conftest import Worker, eventually, execute, rows
from tests.several import (
    BUDGET,
    Several,
    Start,
    assert_never_two_at_once,
    full,
    gaps,
    of,
    stop,
    until,
)

OLD = dict.fromkeys("ab", 'rate_limit="4/s"')
NEW = dict.fromkeys("ab", 'budget=writes, rate_limit="4/s"')
INTERVAL = 0.25  # of the budget, and of each task
LEAST_GAP = 0.98
MESSAGES = 120  # of each task
WORKERS = 3
SETTLED = 6  # starts of a phase
LONGEST_SECONDS = 100
ROWS = 2  # that each message writes
WAITS = "waiting for the end of {}, by whose code {} shares {}"


class Code(NamedTuple):
    """Code, as workers are told where it is.

    Args:
        app: The variables that name it.
        shares: What its tasks share, in words.
    """

    app: Mapping[str, str]
    shares: str


class Site:
    """Workers of both tasks, amid a backlog of each."""

    def __init__(self, private: servers.Servers, folder: Path) -> None:
        self.several = Several(private, folder, OLD)
        self.old = Code(self.several.app, "no budget")
        self.new = Code(self.several.code("new", NEW, "4/s"), "budget writes")
        for task in "ab":
            self.several.publish(task, MESSAGES)
        self.alive = [self.start(self.old) for _ in range(WORKERS)]
        self.runs_on()

    def start(self, code: Code, **variables: str) -> Worker:
        """Start a worker of both tasks."""
        return self.several.worker(*"ab", app={**code.app, **variables})

    def runs_on(self) -> None:
        """Wait for more starts of both tasks."""
        since = self.several.now()
        eventually(
            lambda: all(len(of(self.several.starts(since), t)) >= SETTLED for t in "ab"), "it works"
        )

    def told(self, worker: Worker) -> list[tuple[str, str, str]]:
        """Return each task's kind and reason, as a worker's row has it."""
        return rows(
            self.several.place.shop,
            "SELECT task, kind, reason FROM aioworker_worker WHERE pid = %s ORDER BY task",
            worker.process.pid,
        )

    def name(self, worker: Worker) -> str:
        """Return what a worker is called."""
        found = "SELECT DISTINCT CONCAT(host, ':', pid) FROM aioworker_worker WHERE pid = %s"
        [[name]] = rows(self.several.place.shop, found, worker.process.pid)
        return str(name)

    def waits_for(self, worker: Worker, others: list[Worker], before: Code) -> bool:
        """Whether a worker says that it waits for the end of one of the others, for both tasks."""
        names = [self.name(one) for one in others]
        found = self.told(worker)
        return [(task, kind) for task, kind, _ in found] == [
            (full(task), "other_budget") for task in "ab"
        ] and all(
            reason in [WAITS.format(name, task, before.shares) for name in names]
            for task, _, reason in found
        )

    def wait(self, others: list[Worker], before: Code) -> None:
        """Wait until the workers beside others say that they wait for one of those."""
        new = [one for one in self.alive if one not in others]
        eventually(
            lambda: all(self.waits_for(one, others, before) for one in new),
            "the new ones wait for the old ones",
        )

    def deploy(self, code: Code, before: Code) -> tuple[float, float]:
        """Replace each worker; return when the last one of before was asked to end, and had."""
        for number in range(WORKERS):
            asked = self.several.now()
            stop([self.alive.pop(0)])
            ended = self.several.now()
            self.alive.append(self.start(code))
            theirs = self.alive[: WORKERS - 1 - number]
            if theirs:
                self.wait(theirs, before)
                self.runs_on()
        return asked, ended

    def finish(self) -> None:
        """Have all of it done."""
        until(self.several, 2 * MESSAGES, LONGEST_SECONDS, lambda: None)
        stop(self.alive)


@pytest.fixture
def site(private: servers.Servers, tmp_path: Path) -> Iterator[Site]:
    made = Site(private, tmp_path)
    yield made
    made.several.place.end()


@pytest.fixture
def manager() -> Iterator[Manager]:
    """A service manager."""
    played = Manager()
    yield played
    played.socket.close()


def assert_strict(starts: list[Start]) -> None:
    """Never two runs at once, and their spacing."""
    assert_never_two_at_once(starts)
    assert min(gaps(starts)) >= LEAST_GAP * INTERVAL, starts


def assert_each_done_once(site: Site, kills: int = 0) -> None:
    """Nothing is lost; only a run that was killed comes again; and the audit agrees."""
    starts = site.several.starts()
    for task in "ab":
        assert_strict(of(starts, task))
    runs = Counter((one.task, one.number) for one in starts if one.rows == ROWS)
    assert len(runs) == 2 * MESSAGES
    assert len(starts) - len(runs) <= kills, runs.most_common(3)
    told = site.several.place.audit()
    broken = [told[key] for key in (full("a"), full("b"), BUDGET) if not told[key]["kept"]]
    assert not broken, "\n".join(map(str, broken))
    charged = told[full("a")]["starts"] + told[full("b")]["starts"]
    assert 0 <= charged - len(starts) <= kills, told


@pytest.mark.timeout(300)
def test_tasks_begin_to_share_a_budget_and_end_that_while_they_work(site: Site) -> None:
    """The budget holds from the end of the last old worker until that of the last new one."""
    site.several.init(site.new.app)
    _asked, began = site.deploy(site.new, site.old)
    site.runs_on()
    asked, ended = site.deploy(site.old, site.new)
    site.finish()

    starts = site.several.starts()
    assert_each_done_once(site)
    shared = [one for one in starts if began <= one.first < asked]
    assert_strict(shared)
    assert {one.task for one in shared} == {"a", "b"}
    for alone in ([one for one in starts if one.first < began], site.several.starts(ended)):
        assert min(gaps(alone)) < LEAST_GAP * INTERVAL, "each task goes by its own rate alone"
    assert site.several.place.audit()[BUDGET]["starts"] >= len(shared)


@pytest.mark.timeout(300)
def test_a_worker_that_was_killed_is_waited_for_until_it_counts_as_dead(
    site: Site, manager: Manager
) -> None:
    """Nobody can tell it from one that is cut off, and runs; who waits says for whom."""
    site.several.init(site.new.app)
    [killed, *others] = site.alive
    stop(others)
    site.alive = [
        site.start(site.new),
        site.start(site.new, NOTIFY_SOCKET=manager.name),
    ]
    site.wait([killed], site.old)
    name = site.name(killed)
    words = [f"{full(task)} waiting: waiting for the end of {name}," for task in "ab"]
    while not any(all(one in line for one in words) for line in manager.states):
        manager.receive()
    site.runs_on()

    killed.process.kill()
    killed.process.wait()
    since = site.several.now()
    time.sleep(2 * POLL_SECONDS)  # each has looked again
    assert site.several.starts(since) == []
    for task in "ab":
        told = site.several.status(task)
        assert told["waits_kind"] == "other_budget", told
        assert told["waits"].startswith(WAITS.format(name, full(task), site.old.shares))

    execute(
        site.several.place.shop,
        f"UPDATE aioworker_worker SET seen = SYSDATE(6) - INTERVAL {ALIVE_SECONDS + 1} SECOND"
        f" WHERE pid = {killed.process.pid}",
    )
    site.finish()

    assert_strict(site.several.starts(since))
    assert_each_done_once(site, kills=1)
