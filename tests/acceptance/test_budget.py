"""One budget over real processes that are killed, restarted and frozen.

Judged by a table that a trigger on the site's own table fills, never by what a worker says.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from support import servers, site
from tests.conftest import (
    COMMAND_SECONDS,
    Worker,
    eventually,
    execute,
    rows,
    simple_addons,
)

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

RATE = "60/m"
INTERVAL = 1.0
CHUNK = 250  # three transactions
LEAST_GAP = 0.98
LONGEST_SECONDS = 90

AUDIT = (
    "CREATE TABLE audit (at DATETIME(6) NOT NULL, session BIGINT NOT NULL, addon INT NOT NULL)",
    "CREATE TRIGGER slow BEFORE UPDATE ON addons FOR EACH ROW"
    " SET NEW.modified = IF(SLEEP(0.0005), NEW.modified, NEW.modified)",
    "CREATE TRIGGER audited AFTER UPDATE ON addons FOR EACH ROW"
    " INSERT INTO audit VALUES (SYSDATE(6), CONNECTION_ID(), NEW.id)",
)


class Start(NamedTuple):
    """What one run wrote, by the database's clock, in seconds."""

    first: float
    last: float


class Place:
    """A site, a virtual host and workers of a scenario's own."""

    def __init__(self, private: servers.Servers, folder: Path, chunks: int) -> None:
        assert private.broker is not None
        assert private.maria is not None
        folder.mkdir()
        name = folder.name
        private.broker.control("add_vhost", name)
        private.broker.control("set_permissions", "-p", name, "guest", ".*", ".*", ".*")
        self.servers = servers.Servers(private.broker.url(name), private.maria.url(name))
        self.shop: Connection[Cursor] = servers.connect(self.servers.mysql_url, create=True)
        self.chunks = chunks
        self._folder = folder
        self._workers: list[Worker] = []
        site.create(self.shop)
        simple_addons(self.shop, CHUNK * chunks)
        execute(self.shop, *AUDIT)
        self.run("init")
        self.run("publish-all", "--chunk-size", str(CHUNK))

    def run(self, *arguments: str) -> None:
        """Run a command to its end."""
        command = Worker(self.servers, self._folder, *arguments)
        assert command.process.wait(COMMAND_SECONDS) == 0, command.log
        command.end()

    def worker(self) -> Worker:
        """Start a worker."""
        self._workers.append(Worker(self.servers, self._folder, "consume", "--rate-limit", RATE))
        return self._workers[-1]

    def all_done(self) -> bool:
        """Whether every row is right."""
        return not rows(self.shop, "SELECT 1 FROM addons WHERE current_version IS NULL LIMIT 1")

    def starts(self) -> list[Start]:
        """Return each run's first and last row: a session's rows of one chunk."""
        found = rows(
            self.shop,
            "SELECT MIN(UNIX_TIMESTAMP(at)), MAX(UNIX_TIMESTAMP(at)) FROM audit"
            f" GROUP BY session, (addon - 1) DIV {CHUNK} ORDER BY 1",
        )
        return [Start(float(first), float(last)) for first, last in found]

    def end(self) -> None:
        """End what runs."""
        for worker in self._workers:
            worker.end()
        self.shop.close()


def until_done(place: Place, each: Callable[[], None]) -> None:
    """Do something again and again until every row is right."""
    deadline = time.monotonic() + LONGEST_SECONDS
    while not place.all_done():
        assert time.monotonic() < deadline, f"not all done: {place.starts()}"
        each()


def calm(place: Place) -> None:
    """Three workers, and nothing happens to them."""
    for _ in range(3):
        place.worker()
    until_done(place, lambda: time.sleep(0.2))


def killed(place: Place) -> None:
    """One of three is killed and started again every two seconds."""
    place.worker()
    place.worker()

    def live_and_die() -> None:
        victim = place.worker()
        time.sleep(2)
        victim.end()

    until_done(place, live_and_die)


def restarted(place: Place) -> None:
    """One worker in a crash loop: twenty lives of a second and a half."""

    def live_and_die() -> None:
        victim = place.worker()
        time.sleep(1.5)
        victim.end()

    for _ in range(20):
        live_and_die()


def terminated(place: Place) -> None:
    """A service manager that restarts both again and again, politely."""

    def live_and_stop() -> None:
        pair = [place.worker(), place.worker()]
        time.sleep(2.2)
        for worker in pair:
            worker.process.send_signal(signal.SIGTERM)
        assert [worker.process.wait(20) for worker in pair] == [0, 0]

    until_done(place, live_and_stop)


def frozen(place: Place) -> None:
    """One of two stands still for five seconds, in the middle of a write."""
    place.worker()
    place.worker()
    writing = (
        "SELECT worker.pid FROM information_schema.processlist AS process"
        " JOIN aioworker_worker AS worker ON worker.session = process.id"
        " WHERE process.db = DATABASE() AND process.info LIKE 'UPDATE /* aioworker%'"
    )
    for _ in range(2):
        pid = eventually(lambda: rows(place.shop, writing), "a write runs")[0][0]
        os.kill(pid, signal.SIGSTOP)
        time.sleep(5)
        os.kill(pid, signal.SIGCONT)
        time.sleep(2)
    until_done(place, lambda: time.sleep(0.2))


CHUNKS: dict[Callable[[Place], None], int] = {
    killed: 40,
    restarted: 100,
    terminated: 12,
    frozen: 10,
}


@pytest.fixture(scope="module")
def violent(
    private: servers.Servers, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[list[Start]]]]:
    """All that is done to workers, at the same time, each in a place of its own."""
    folder = tmp_path_factory.mktemp("budget")

    def play(scenario: Callable[[Place], None]) -> list[Start]:
        place = Place(private, folder / scenario.__name__, CHUNKS[scenario])
        try:
            scenario(place)
            return place.starts()
        finally:
            place.end()

    with ThreadPoolExecutor() as pool:
        yield {scenario.__name__: pool.submit(play, scenario) for scenario in CHUNKS}


def assert_strict(starts: list[Start]) -> None:
    """No two first writes nearer than the interval, and no two runs at once."""
    for one, other in pairwise(starts):
        assert other.first - one.first >= LEAST_GAP, starts
        assert other.first > one.last, starts


def test_three_workers_share_one_budget_and_use_it(
    private: servers.Servers, tmp_path: Path
) -> None:
    """Together no more than one worker may alone, and hardly less."""
    place = Place(private, tmp_path / "calm", chunks=40)
    try:
        calm(place)
        starts = place.starts()
    finally:
        place.end()

    assert_strict(starts)
    assert len(starts) == 40
    assert starts[-1].first - starts[0].first <= 39 * INTERVAL / 0.9


@pytest.mark.parametrize("scenario", [one.__name__ for one in CHUNKS])
def test_the_budget_is_strict_whatever_happens_to_workers(
    violent: dict[str, Future[list[Start]]], scenario: str
) -> None:
    starts = violent[scenario].result(LONGEST_SECONDS)

    assert_strict(starts)
    assert len(starts) >= 10
