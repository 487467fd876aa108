"""Several tasks of one database, each with a table of its own, and workers that serve some of them.

Judged by a table that triggers on those tables fill, never by what a worker says.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from aioworker import Producer
from support import servers
from tests.conftest import Worker, execute, importable, rows
from tests.place import Place

MODULE = "several"
BUDGET = "budget:writes"
# Each run is two transactions, of one row each.
_APP = """
from aioworker import Budget, Context, task

{budget}
def register(name, **options):
    @task(name=f"{module}.{{name}}", **options)
    async def write(ctx: Context, number: int) -> None:
        for _ in range(2):
            async with ctx.transaction() as cursor:
                await cursor.execute(f"INSERT INTO {module}_{{name}} VALUES (%s)", (number,))

"""
_NOTED = (
    "CREATE TABLE noted (at DECIMAL(18, 6) NOT NULL, task CHAR(1) NOT NULL, number INT NOT NULL,"
    " session BIGINT NOT NULL)"
)
_TABLE = f"CREATE TABLE {MODULE}_{{0}} (number INT NOT NULL)"
# It reads no table of ours: a read by a trigger locks the rows.
_TRIGGER = (
    f"CREATE TRIGGER noted_{{0}} AFTER INSERT ON {MODULE}_{{0}} FOR EACH ROW INSERT INTO noted"
    " VALUES (UNIX_TIMESTAMP(SYSDATE(6)), '{0}', NEW.number, CONNECTION_ID())"
)
STOP_SECONDS = 30


class Start(NamedTuple):
    """What one run wrote, by the database's clock, in seconds."""

    task: str
    first: float
    last: float
    number: int
    rows: int


def full(task: str) -> str:
    """Return a task's whole name."""
    return f"{MODULE}.{task}"


class Several:
    """A place with several tasks.

    Args:
        private: The run's servers.
        folder: Where the app is, commands run and workers log.
        tasks: The options of each task, as code, by its letter.
        rate: The rate limit of the budget `writes`, which the options may name; None makes none.

    Attributes:
        app: The variables by which a command finds the app.
        place: Where all of it is.
    """

    def __init__(
        self,
        private: servers.Servers,
        folder: Path,
        tasks: Mapping[str, str],
        rate: str | None = None,
    ) -> None:
        self._folder = folder
        self._tasks = "".join(tasks)
        self._numbers = itertools.count(1)
        self.app = self.code("app", tasks, rate)
        self.place = Place(private, folder)
        statements = [one.format(t) for t in self._tasks for one in (_TABLE, _TRIGGER)]
        execute(self.place.shop, _NOTED, *statements)
        self.init(self.app)

    def code(self, name: str, tasks: Mapping[str, str], rate: str | None = None) -> dict[str, str]:
        """Write code of the tasks into a folder of its own; return the variables that name it."""
        folder = self._folder / name
        folder.mkdir()
        budget = "" if rate is None else f'writes = Budget("writes", rate_limit="{rate}")\n'
        lines = [f'register("{task}", {options})\n' for task, options in tasks.items()]
        text = _APP.format(budget=budget, module=MODULE)
        (folder / f"{MODULE}.py").write_text(text + "".join(lines))
        return {"AIOWORKER_APP": MODULE, "PYTHONPATH": importable(folder)}

    def init(self, app: Mapping[str, str]) -> None:
        """Make what an app's tasks need."""
        made = self.place.run("init", **app)
        assert made.returncode == 0, made.stderr

    def worker(self, *tasks: str, app: Mapping[str, str] | None = None) -> Worker:
        """Start a worker of some tasks."""
        return self.place.worker(*map(full, tasks), **(self.app if app is None else app))

    def publish(self, task: str, messages: int = 1, *, urgent: bool = False) -> list[int]:
        """Publish messages of a task; return their numbers."""
        numbers = list(itertools.islice(self._numbers, messages))

        async def publish_all() -> None:
            async with Producer(self.place.servers.amqp_url) as producer:
                for number in numbers:
                    await producer.publish(full(task), number, urgent=urgent)

        asyncio.run(publish_all())
        return numbers

    def say(self, *arguments: str) -> str:
        """Run a command that has to work, without the app; return what it said."""
        done = self.place.run(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def now(self) -> float:
        """Return the database's time."""
        [[now]] = rows(self.place.shop, "SELECT UNIX_TIMESTAMP(SYSDATE(6))")
        return float(now)

    def starts(self, since: float = 0.0) -> list[Start]:
        """Return each start that wrote first since a moment, by its rows, in their order."""
        found = rows(
            self.place.shop,
            "SELECT task, MIN(at) AS first, MAX(at), number, COUNT(*) FROM noted"
            " GROUP BY task, number, session HAVING first >= %s ORDER BY 2",
            since,
        )
        return [Start(task, float(first), float(last), *rest) for task, first, last, *rest in found]

    def done(self) -> int:
        """Return how many messages have run, of all tasks."""
        return len(rows(self.place.shop, "SELECT DISTINCT task, number FROM noted"))

    def reasons(self, task: str) -> list[str]:
        """Return what each worker of a task waits for, or does."""
        found = rows(
            self.place.shop, "SELECT reason FROM aioworker_worker WHERE task = %s", full(task)
        )
        return [reason for [reason] in found]

    def waits(self, task: str, words: str) -> bool:
        """Whether all workers of a task wait for what begins with these words."""
        found = self.reasons(task)
        return bool(found) and all(one.startswith(words) for one in found)

    def status(self, task: str) -> Any:
        """Return what `status --json` tells of a task."""
        return json.loads(self.say("status", full(task), "--json"))

    def row(self, key: str) -> dict[str, Any]:
        """Return what is set at run time in a row, and by whom."""
        columns = (
            "paused, paused_by, paused_at, paused_why, paused_until,"
            " gap_us, set_by, set_at, set_why, set_until, gap_after_us"
        )
        [found] = rows(
            self.place.shop, f"SELECT {columns} FROM aioworker_budget WHERE task = %s", key
        )
        return dict(zip(columns.split(", "), found, strict=True))


def stop(workers: Iterable[Worker]) -> None:
    """End workers as a service manager does."""
    ending = list(workers)
    for worker in ending:
        worker.process.send_signal(signal.SIGTERM)
    assert [worker.process.wait(STOP_SECONDS) for worker in ending] == [0] * len(ending)


def assert_never_two_at_once(starts: Sequence[Start]) -> None:
    """Each run has ended before the next one writes."""
    for one, other in pairwise(starts):
        assert other.first > one.last, starts


def gaps(starts: Sequence[Start]) -> list[float]:
    """Return the seconds between the first writes of starts, one after the other."""
    return [other.first - one.first for one, other in pairwise(starts)]


def of(starts: Iterable[Start], tasks: str) -> list[Start]:
    """Return the starts of some tasks."""
    return [one for one in starts if one.task in tasks]


def until(several: Several, messages: int, seconds: float, each: Callable[[], None]) -> None:
    """Do something again and again until so many messages have run; fail after *seconds*."""
    deadline = time.monotonic() + seconds
    while several.done() < messages:
        assert time.monotonic() < deadline, f"{several.done()} done: {several.starts()}"
        each()
