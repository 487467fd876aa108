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
from statistics import median
from typing import NamedTuple

import pytest

from support import servers
from tests.conftest import TASK, eventually, execute, rows
from tests.place import Place, Start

RATE = ("--rate-limit", "60/m")
INTERVAL = 1.0
CHUNK = 250  # rows of a start: three transactions
LEAST_GAP = 0.98
LEAST_USED = 0.95
TRIES = 6
FULL = 40  # starts
LONGEST_SECONDS = 90
# Of a statement: the trigger notes its first row, the worker the moment when it has returned.
AUDIT_SECONDS = 0.1
NOTED = (
    "CREATE TABLE noted (at DECIMAL(18, 6) NOT NULL, session BIGINT NOT NULL, start BIGINT)",
    "CREATE TRIGGER noted AFTER UPDATE ON addons FOR EACH ROW INSERT INTO noted"
    " SELECT UNIX_TIMESTAMP(SYSDATE(6)), CONNECTION_ID(), starts FROM aioworker_budget",
)


class Mode(NamedTuple):
    """How a start gets its rows.

    Args:
        messages: By how many messages.
        gather_seconds: How long they are gathered.
    """

    messages: int
    gather_seconds: int | None

    def make(self, private: servers.Servers, folder: Path, starts: int, size: int = CHUNK) -> Place:
        """Return a place with rows for so many starts of a size."""
        place = Place(private, folder, gather_seconds=self.gather_seconds, chunk_size=size)
        execute(place.shop, *NOTED)
        place.backlog(starts * self.messages, size // self.messages)
        return place


MODES = {"one message a start": Mode(1, 0), "several messages a start": Mode(2, None)}


def starts_of(place: Place, size: int = CHUNK) -> list[Start]:
    """Return the first and the last row of each start: of what a session wrote by one charge."""
    found = rows(
        place.shop,
        "SELECT MIN(at), MAX(at), COUNT(*) FROM noted GROUP BY session, start ORDER BY 1",
    )
    # The last message of a start may overshoot. Two runs by one charge would have more rows.
    assert max([count for *_, count in found], default=0) < 1.5 * size
    return [Start(float(first), float(last)) for first, last, _ in found]


def assert_audited(place: Place, starts: list[Start], interval: float = INTERVAL) -> None:
    """What the starts' own rows say is what the trigger has noted."""
    told = place.audit()[TASK]
    noted = "SELECT COUNT(*) FROM aioworker_start WHERE first_write IS NOT NULL"
    least = min(other.first - one.first for one, other in pairwise(starts))

    assert told["kept"], told
    assert rows(place.shop, noted) == [(len(starts),)]
    assert told["least_write"] * interval == pytest.approx(
        least, abs=min(AUDIT_SECONDS, interval / 2)
    )


def until_done(place: Place, each: Callable[[], None]) -> None:
    """Do something again and again until every row is right."""
    deadline = time.monotonic() + LONGEST_SECONDS
    while not place.all_done():
        assert time.monotonic() < deadline, f"not all done: {starts_of(place)}"
        each()


def calm(place: Place, *rate: str) -> None:
    """Three workers, and nothing happens to them."""
    place.slow(0)  # what the first statement that writes takes is not made up for
    for _ in range(3):
        place.worker(*rate)
    until_done(place, lambda: time.sleep(0.2))


def killed(place: Place) -> None:
    """One of three is killed and started again every two seconds."""
    place.worker(*RATE)
    place.worker(*RATE)

    def live_and_die() -> None:
        victim = place.worker(*RATE)
        time.sleep(2)
        victim.end()

    until_done(place, live_and_die)


def restarted(place: Place) -> None:
    """One worker in a crash loop: twenty lives of a second and a half."""

    def live_and_die() -> None:
        victim = place.worker(*RATE)
        time.sleep(1.5)
        victim.end()

    for _ in range(20):
        live_and_die()


def terminated(place: Place) -> None:
    """A service manager that restarts both again and again, politely."""

    def live_and_stop() -> None:
        pair = [place.worker(*RATE), place.worker(*RATE)]
        eventually(lambda: len(place.reasons()) == 2, "both are at work")
        time.sleep(1.5)
        for worker in pair:
            worker.process.send_signal(signal.SIGTERM)
        assert [worker.process.wait(30) for worker in pair] == [0, 0]

    until_done(place, live_and_stop)


def frozen(place: Place) -> None:
    """One of two stands still for five seconds, in the middle of a write."""
    place.worker(*RATE)
    place.worker(*RATE)
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


STARTS: dict[Callable[[Place], None], int] = {
    killed: 40,
    restarted: 100,
    terminated: 12,
    frozen: 10,
}


@pytest.fixture(scope="module", params=MODES)
def violent(
    private: servers.Servers,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Iterator[dict[str, Future[list[Start]]]]:
    """All that is done to workers, at the same time, each in a place of its own."""
    folder = tmp_path_factory.mktemp("budget")

    def play(scenario: Callable[[Place], None]) -> list[Start]:
        place = MODES[request.param].make(private, folder, STARTS[scenario])
        try:
            scenario(place)
            starts = starts_of(place)
            assert_audited(place, starts)
            return starts
        finally:
            place.end()

    with ThreadPoolExecutor() as pool:
        yield {scenario.__name__: pool.submit(play, scenario) for scenario in STARTS}


def assert_strict(starts: list[Start], interval: float = INTERVAL) -> None:
    """No two first writes nearer than the interval, and no two runs at once."""
    for one, other in pairwise(starts):
        assert other.first - one.first >= LEAST_GAP * interval, starts
        assert other.first > one.last, starts


@pytest.mark.parametrize("mode", MODES)
def test_three_workers_share_one_budget_and_use_it(
    private: servers.Servers, tmp_path: Path, mode: str
) -> None:
    """Together no more than one worker may alone, and hardly less; each start is full."""
    place = MODES[mode].make(private, tmp_path, FULL)
    try:
        calm(place, *RATE)
        starts = starts_of(place)
        assert_audited(place, starts)
    finally:
        place.end()

    assert_strict(starts)
    # What is due at once takes what it finds at once.
    assert FULL <= len(starts) <= FULL + 1
    assert (len(starts) - 1) * INTERVAL / (starts[-1].first - starts[0].first) >= LEAST_USED


@pytest.mark.timeout(300)
@pytest.mark.parametrize("mode", MODES)
def test_twenty_starts_a_second_are_used_as_well(
    private: servers.Servers, tmp_path: Path, mode: str
) -> None:
    """In the middle, and of six tries in one: a busy machine makes starts so near late."""
    interval, size = 0.05, 4
    gaps: list[float] = []
    while len(gaps) < TRIES and all(gap > interval / LEAST_USED for gap in gaps):
        place = MODES[mode].make(private, tmp_path / str(len(gaps)), 200, size)
        try:
            place.slow(0)  # how long a statement takes is not made up for
            calm(place, "--rate-limit", "20/s")
            starts = starts_of(place, size)
            assert_audited(place, starts, interval)
        finally:
            place.end()
        assert_strict(starts, interval)
        gaps.append(median(b.first - a.first for a, b in pairwise(starts)))

    assert min(gaps) <= interval / LEAST_USED, gaps


@pytest.mark.parametrize("scenario", [one.__name__ for one in STARTS])
def test_the_budget_is_strict_whatever_happens_to_workers(
    violent: dict[str, Future[list[Start]]], scenario: str
) -> None:
    starts = violent[scenario].result(LONGEST_SECONDS)

    assert_strict(starts)
    assert len(starts) >= 10
