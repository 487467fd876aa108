"""A sweep of which little is stale, under a rate limit: how many starts, and how long.

What is printed is read from rows: the starts that were counted, and when the last one was right.
"""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from aioworker.limits import RateLimit
from support import site

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

    from support.servers import Servers

CHUNKS = 200
ONE_IN = 100  # rows is stale
GATHERING = "20"  # seconds; the interval bounds it
LONGEST = 3  # times what one message a start may take
AIOWORKER = f"{sys.executable} -m aioworker"
CELERY = "benchmarks.contenders.sweep_with_celery"

_STALE = f"""CREATE TABLE stale AS SELECT id, current_version FROM (
SELECT a.id, spoiled.current_version, ROW_NUMBER() OVER (ORDER BY a.id) AS n
FROM spoiled JOIN addons a ON a.id = spoiled.id WHERE {site.SWEPT}) AS swept
WHERE MOD(n, {ONE_IN}) = {ONE_IN // 2}"""
_SPOIL = """UPDATE addons JOIN stale USING (id)
SET addons.current_version = stale.current_version WHERE id > %s"""
_STARTS = "SELECT starts FROM aioworker_budget"
_BEHIND = f"SELECT a.id FROM addons a WHERE {site.SWEPT} ORDER BY a.id DESC LIMIT 1 OFFSET %s"
_ANY_LEFT = """SELECT EXISTS (SELECT 1 FROM stale JOIN addons USING (id)
WHERE addons.current_version <=> stale.current_version)"""


class Size(NamedTuple):
    """How large a sweep is, and how often it may start.

    Args:
        rate: The rate limit.
        ids: Ids in a chunk.
        few: How many chunks are swept where each has a start of its own.
    """

    rate: str
    ids: int
    few: int

    @property
    def interval(self) -> float:
        """Seconds between two starts."""
        return RateLimit.parse(self.rate).interval


SCALED = Size("15/m", 100, 5)
REAL = Size("2/m", 1000, 10)


class Case(NamedTuple):
    """A way to sweep.

    Args:
        by: What it is called.
        gather_seconds: As the setting.
        most: Starts that it may take.
        options: More options of `publish-all`.
        few: Whether it sweeps only a few chunks.
        celery: Whether Celery does it.
    """

    by: str
    gather_seconds: str
    most: int
    options: tuple[str, ...] = ()
    few: bool = False
    celery: bool = False


CASES = (
    Case("aioworker", GATHERING, 3),
    Case("aioworker, `publish-all --only-needed`", GATHERING, 2, ("--only-needed",)),
    Case("aioworker, one message a start", "0", CHUNKS, few=True),
    Case("Celery", "0", CHUNKS, few=True, celery=True),
)


class Found(NamedTuple):
    """What a sweep took.

    Args:
        chunks: How many were published.
        starts: How many starts those took.
        seconds: From the start of the worker to the last row.
    """

    chunks: int
    starts: int
    seconds: float


class Sweeps:
    """Sweeps the same site again and again.

    Args:
        pair: The servers.
        connection: To a site of `CHUNKS` chunks with aioworker's tables; the table `spoiled` has
            a wrong version of each add-on.
        size: How large the sweeps are.
    """

    def __init__(self, pair: Servers, connection: Connection[Cursor], size: Size) -> None:
        self._pair = pair
        self._connection = connection
        self._size = size
        site.answer_all(connection)
        self._execute(_STALE)
        self._execute("CREATE TABLE started (id INT AUTO_INCREMENT PRIMARY KEY)")

    def measure(self, case: Case) -> Found:
        """Make some rows stale, publish, and work until all are right."""
        after = self._ask(_BEHIND, self._size.few * self._size.ids) if case.few else 0
        self._execute(_SPOIL, after)
        self._execute("UPDATE aioworker_budget SET last_start = '2000-01-01', starts = 0")
        variables = self._pair.environment | {
            "AIOWORKER_GATHER_SECONDS": case.gather_seconds,
            "AIOWORKER_CHUNK_SIZE": str(self._size.ids),
            "AIOWORKER_RATE_LIMIT": self._size.rate,
            "AIOWORKER_LOG_LEVEL": "warning",
        }
        if case.celery:
            publisher = f"{sys.executable} -m {CELERY} {self._size.ids} {after}"
            worker = (
                f"{sys.executable} -m celery -A {CELERY} worker -c 1 -l error"
                " --without-gossip --without-mingle --without-heartbeat"
            )
        else:
            publisher = f"{AIOWORKER} publish-all --append --after {after}"
            worker = f"{AIOWORKER} consume"
        published = subprocess.run(
            [*publisher.split(), *case.options],
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            check=True,
            text=True,
        ).stdout
        began = time.monotonic()
        with _running(worker, variables):
            self._wait(began + LONGEST * self._size.few * self._size.interval)
            seconds = time.monotonic() - began
        if left := site.count_stale(self._connection):
            raise SystemExit(f"{case.by} left {left} rows stale")
        counted = "SELECT COUNT(*) FROM started" if case.celery else _STARTS
        # Both say "published 200 chunks …".
        found = Found(int(published.split()[1]), self._ask(counted), seconds)
        if found.starts > case.most:
            raise SystemExit(f"{case.by} took {found.starts} starts, more than {case.most}")
        return found

    def _wait(self, deadline: float) -> None:
        while self._ask(_ANY_LEFT):
            if time.monotonic() > deadline:
                raise SystemExit("the rows were not right in time")
            time.sleep(0.05)

    def _ask(self, query: str, *arguments: int) -> int:
        """Return the number that a query answers with."""
        with self._connection.cursor() as cursor:
            cursor.execute(query, arguments)
            [[number]] = cursor.fetchall()
        self._connection.commit()  # the next one reads what others wrote meanwhile
        return int(number)

    def _execute(self, statement: str, *arguments: int) -> None:
        with self._connection.cursor() as cursor:
            cursor.execute(statement, arguments)
        self._connection.commit()


@contextmanager
def _running(command: str, environment: dict[str, str]) -> Iterator[None]:
    """Have a worker run inside; it is ended by a signal."""
    worker = subprocess.Popen(
        command.split(),
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        worker.terminate()
        worker.wait()
