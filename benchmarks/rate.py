"""How much of a rate is used, and how far apart the runs' first writes are.

Each run inserts a row with the server's time; what is printed is read from those rows alone.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from aioworker import Context, Producer, task
from aioworker.limits import RateLimit
from support import servers

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

APP = "benchmarks.rate"
LONGEST = 3  # times what it may take
_TABLE = (
    "CREATE TABLE IF NOT EXISTS written (id INT AUTO_INCREMENT PRIMARY KEY,"
    " task VARCHAR(100) NOT NULL, at DATETIME(6) NOT NULL, KEY (task, at))"
)
_SECONDS = "SELECT UNIX_TIMESTAMP(at) FROM written WHERE task = %s ORDER BY at"


class Work(NamedTuple):
    """Parts of the interval that a run spends.

    Args:
        before: Before its transaction.
        behind: The same, but behind one that only reads.
        reading: In it, before it writes.
        writing: In it, once it has written.
    """

    before: float = 0.0
    behind: float = 0.0
    reading: float = 0.0
    writing: float = 0.0


class Case(NamedTuple):
    """What one worker runs.

    Args:
        rate: The rate limit.
        spent: Where each run spends its time, in words.
        work: What it spends.
        starts: How many intervals are looked at.
        each: Which runs spend it: all, or every second one.
    """

    rate: str
    spent: str
    work: Work
    starts: int = 60
    each: int = 1

    @property
    def name(self) -> str:
        """The task's name."""
        return f"{self.rate}-{self.spent}".replace("/", "-").replace(" ", "_").replace(",", "")

    @property
    def interval(self) -> float:
        """Seconds between two starts."""
        return RateLimit.parse(self.rate).interval


def _cases() -> Iterable[Case]:
    for rate in ("1/s", "10/s"):
        for part in (0.6, 0.9):
            yield Case(rate, f"{part} before the transaction", Work(before=part))
            spent = f"{part} behind one that only reads"
            yield Case(rate, spent, Work(behind=part))
            yield Case(rate, f"{spent}, every second run", Work(behind=part), each=2)
            yield Case(rate, f"{part} in it, before the first write", Work(reading=part))
            yield Case(rate, f"{part} in it, after the first write", Work(writing=part))
    yield Case("100/s", "one INSERT", Work(), 600)


CASES = list(_cases())


def _register(case: Case) -> None:
    @task(name=case.name, rate_limit=case.rate)
    async def spend(ctx: Context, number: int) -> None:
        work = Work() if number % case.each else case.work
        seconds = Work(*(part * case.interval for part in work))
        if seconds.before:
            await asyncio.sleep(seconds.before)
        if seconds.behind:
            async with ctx.transaction() as cursor:
                await cursor.execute("SELECT 1")
            await asyncio.sleep(seconds.behind)
        async with ctx.transaction() as cursor:
            if seconds.reading:
                await asyncio.sleep(seconds.reading)
            await cursor.execute(
                "INSERT INTO written (task, at) VALUES (%s, SYSDATE(6))", (case.name,)
            )
            if seconds.writing:
                await asyncio.sleep(seconds.writing)


for _case in CASES:
    _register(_case)


def measure(
    pair: servers.Servers, connection: Connection[Cursor]
) -> list[tuple[Case, list[float]]]:
    """Return, for each case, the seconds at which its runs wrote first.

    What is slow runs side by side, each task by a worker of its own; what is fast, alone.
    """
    with connection.cursor() as cursor:
        cursor.execute(_TABLE)
    connection.commit()
    aioworker(pair, "init", "--app", APP).check_returncode()
    asyncio.run(_publish(pair))
    together = [case for case in CASES if case.interval >= 1]
    alone = [case for case in CASES if case.interval < 1]
    found: dict[Case, list[float]] = {}
    for group in filter(None, (together, *([case] for case in alone))):
        found |= _run(pair, connection, group)
    return [(case, found[case]) for case in CASES]


async def _publish(pair: servers.Servers) -> None:
    async with Producer(pair.amqp_url) as producer:
        for case in CASES:
            await asyncio.gather(
                *(producer.publish(case.name, number) for number in range(2 * case.starts))
            )


def _run(
    pair: servers.Servers, connection: Connection[Cursor], cases: list[Case]
) -> dict[Case, list[float]]:
    """Work until each case has written once more than it has intervals."""
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "aioworker", "consume", case.name, "--app", APP],
            env=pair.environment | {"AIOWORKER_LOG_LEVEL": "warning"},
        )
        for case in cases
    ]
    deadline = time.monotonic() + 10 + LONGEST * max(case.starts * case.interval for case in cases)
    try:
        while any(len(written(connection, case)) <= case.starts for case in cases):
            if time.monotonic() > deadline:
                raise SystemExit(f"not in time: {[case.name for case in cases]}")
            time.sleep(0.2)
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.wait()
    return {case: written(connection, case)[: case.starts + 1] for case in cases}


def written(connection: Connection[Cursor], case: Case) -> list[float]:
    """Return the seconds at which its runs wrote first, in order."""
    with connection.cursor() as cursor:
        cursor.execute(_SECONDS, (case.name,))
        found = [float(seconds) for [seconds] in cursor.fetchall()]
    connection.commit()
    return found


def used(case: Case, seconds: list[float]) -> float:
    """Return the starts begun as a share of those that the rate allows."""
    return case.interval * (len(seconds) - 1) / (seconds[-1] - seconds[0])


def distances(case: Case, seconds: list[float]) -> list[float]:
    """Return the distances from each first write to the next, in intervals, the least first."""
    return sorted((other - one) / case.interval for one, other in pairwise(seconds))


def aioworker(pair: servers.Servers, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    """Run a command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "aioworker", *arguments],
        env=pair.environment,
        stdout=subprocess.DEVNULL,
        check=False,
    )
