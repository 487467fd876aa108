"""Bad messages among good ones, and tasks that fail as a whole: what is done, what set aside.

`SHARES_SECONDS=600` offers messages for ten minutes in place of two.
"""

from __future__ import annotations

import asyncio
import json
import os
import textwrap
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from aioworker import Producer
from tests.conftest import Worker, eventually, execute, importable, rows
from tests.faults.conftest import MakePlace
from tests.place import Place

if TYPE_CHECKING:
    from collections.abc import Iterable

SHARES_SECONDS = int(os.environ.get("SHARES_SECONDS", "120"))
A_SECOND = 10  # messages of each task
LEAST = 0.95
HEALS_SECONDS = 150  # the longest wait between two rounds of tests is a minute

SHARES = """
    from aioworker import task

    def add(name, bad, retries):
        async def work(number: int) -> None:
            if bad(number):
                raise ValueError(number)
            with open(f"done {name}", "a") as done:
                print(number, file=done)
        task(name=name, max_retries=retries)(work)

    for retries in (1, 5):
        add(f"none_{retries}", lambda number: False, retries)
        add(f"permille_{retries}", lambda number: number % 1000 == 7, retries)
        add(f"two_{retries}", lambda number: number % 50 == 7, retries)
        add(f"ten_{retries}", lambda number: number % 10 == 7, retries)
        add(f"thirty_{retries}", lambda number: number % 10 < 3, retries)
"""
GOOD = {"none": 1.0, "permille": 0.999, "two": 0.98, "ten": 0.9, "thirty": 0.7}


def begin(place: Place, folder: Path, app: str, text: str, **variables: str) -> Worker:
    """Declare an app's queues, and start a worker of it."""
    (folder / f"{app}.py").write_text(textwrap.dedent(text))
    path = importable(folder)
    initialised = place.run("init", "--app", app, PYTHONPATH=path)
    assert initialised.returncode == 0, initialised.stderr
    return place.worker("--app", app, PYTHONPATH=path, **variables)


def letters(place: Place, task: str) -> list[int]:
    """Return the numbers of a task's dead letters."""
    return [json.loads(body)[0][0] for body in place.take(f"aioworker.{task}.dead")]


async def offer(place: Place, tasks: Iterable[str], seconds: int) -> None:
    """Publish each task's messages evenly."""
    names = list(tasks)
    async with Producer(place.servers.amqp_url, timeout=30) as producer:
        began = time.monotonic()
        for number in range(seconds * A_SECOND):
            await asyncio.sleep(max(began + number / A_SECOND - time.monotonic(), 0))
            await asyncio.gather(*(producer.publish(name, number) for name in names))


@pytest.mark.timeout(SHARES_SECONDS + 300)
def test_bad_messages_slow_no_good_ones(make_place: MakePlace, tmp_path: Path) -> None:
    """Two per cent of them took a task from 2,000 a minute to 15, for good."""
    place = make_place()
    worker = begin(place, tmp_path, "shares", SHARES)
    tasks = [f"{share}_{retries}" for retries in (1, 5) for share in GOOD]
    folder = worker.folder

    asyncio.run(offer(place, tasks, SHARES_SECONDS))

    eventually(lambda: done(folder, "none_1") == SHARES_SECONDS * A_SECOND, "the others are done")
    measured = {name: done(folder, name) for name in tasks}
    control = min(measured["none_1"], measured["none_5"])
    shares = {name: measured[name] / (control * GOOD[name.partition("_")[0]]) for name in tasks}
    print({name: round(share, 3) for name, share in shares.items()})  # noqa: T201 - for the note
    assert {name: share for name, share in shares.items() if share < LEAST} == {}
    assert "breaker open" not in worker.log
    two = letters(place, "two_1")
    assert [number for number in two if number % 50 != 7] == []
    assert two, "those that failed first have failed for good by now"


def done(folder: Path, name: str) -> int:
    """Return how many of a task's messages were done."""
    path = folder / f"done {name}"
    return len(path.read_text().splitlines()) if path.exists() else 0


FAILING = """
    import os
    import pymysql
    from aioworker import Context, task

    def note(name, number):
        with open("done", "a") as done:
            print(name, number, file=done)

    @task(max_retries=1)
    async def deploy(number: int) -> None:
        if not os.path.exists("mended"):
            raise KeyError("shop")
        note("deploy", number)

    @task(max_retries=1)
    async def table(ctx: Context, number: int) -> None:
        async with ctx.transaction() as cursor:
            await cursor.execute("UPDATE shops SET visits = visits + 1")
        note("table", number)

    @task(max_retries=1)
    def second(number: int) -> None:
        if not os.path.exists("mended"):
            pymysql.connect(host="127.0.0.1", port=1, connect_timeout=1)
        note("second", number)

    @task(max_retries=1)
    async def tenant(number: int) -> None:
        if number < 300:
            raise ValueError(number)
        note("tenant", number)
"""
BACKLOG = 40


@pytest.mark.timeout(2 * HEALS_SECONDS + 120)
def test_a_task_that_fails_as_a_whole_loses_no_healthy_message(
    make_place: MakePlace, tmp_path: Path
) -> None:
    """A bad deploy, a missing table, a second database that is away, one tenant's bad messages."""
    place = make_place()
    names = ("deploy", "table", "second", "tenant")
    (tmp_path / "failing.py").write_text(textwrap.dedent(FAILING))
    path = importable(tmp_path)
    assert place.run("init", "--app", "failing", PYTHONPATH=path).returncode == 0
    for name in names:
        # They come back before the last of the others is tried: none is ever alone.
        place.limit(f"aioworker.{name}.retry", "message-ttl", 50)

    async def publish() -> None:
        async with Producer(place.servers.amqp_url, timeout=30) as producer:
            for number in range(BACKLOG):
                for name in names[:3]:
                    await producer.publish(name, number)
            for number in range(600):
                await producer.publish("tenant", number)

    asyncio.run(publish())
    worker = place.worker("--app", "failing", PYTHONPATH=path)
    red = (
        "SELECT task FROM aioworker_worker WHERE state = 'stalled' AND reason LIKE 'breaker open%'"
    )
    expected = {("deploy",), ("table",), ("second",)}
    eventually(lambda: set(rows(place.shop, red)) == expected, "three of them test themselves")
    sick = place.run("health", "deploy", PYTHONPATH=path)
    assert (sick.returncode, "breaker open: 3 messages in a row" in sick.stderr) == (1, True)

    execute(place.shop, "CREATE TABLE shops (visits INT)")
    (worker.folder / "mended").touch()

    def counted() -> Counter[str]:
        path = worker.folder / "done"
        lines = path.read_text().splitlines() if path.exists() else []
        return Counter(line.partition(" ")[0] for line in lines)

    whole = dict.fromkeys(names[:3], BACKLOG) | {"tenant": 300}
    deadline = time.monotonic() + HEALS_SECONDS
    while counted() != whole:
        assert time.monotonic() < deadline, counted()
        time.sleep(0.2)
    assert [letters(place, name) for name in names[:3]] == [[], [], []]
    eventually(lambda: not rows(place.shop, red), "none is red")
    found: list[int] = []

    def all_set_aside() -> bool:
        found.extend(letters(place, "tenant"))
        return len(found) == 300

    eventually(all_set_aside, "the tenant's are dead letters")
    assert sorted(found) == list(range(300))
