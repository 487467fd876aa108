"""SIGHUP under load: new code in the same process, or the old code and the reason."""

from __future__ import annotations

import itertools
import os
import signal
import textwrap
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from aioworker import Producer
from tests.conftest import ModuleWorker, Run, Worker, eventually, execute, importable, rows

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

    from support.servers import Servers

Start = Callable[..., Worker]
RELOADS = 20
INTERVAL = 0.1
TASKS = ("reloaded", "reloaded.flow", "reloaded.thread")
CODE = """
    import asyncio, time
    from aioworker import Context, task

    def write(number):
        with open("written", "a") as file:
            print(number, {version}, file=file)

    @task(name="reloaded.flow")
    async def flow(number: int) -> None:
        await asyncio.sleep(0.02)
        write(number)

    @task(name="reloaded.thread")
    def thread(number: int) -> None:
        time.sleep(0.02)
        write(number)

    @task(name="reloaded", rate_limit="10/s")
    async def note(ctx: Context, number: int) -> None:
        async with ctx.transaction() as cursor:
            await cursor.execute(
                "INSERT INTO notes VALUES (%s, {version}, SYSDATE(6))", (number,)
            )
"""


class Code:
    """The worker's module, which the test changes."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "reloaded_tasks.py"

    def write(self, text: str) -> None:
        """Put new code in its place at once, as a deploy does."""
        new = self._file.with_suffix(".new")
        new.write_text(textwrap.dedent(text))
        new.replace(self._file)

    def version(self, number: int) -> None:
        """Write a version that notes its number."""
        self.write(CODE.format(version=number))


@pytest.fixture
def code(tmp_path: Path, run: Run, shop: Connection[Cursor]) -> Code:
    """Version 0 of the module, its table and its queues."""
    found = Code(tmp_path)
    found.version(0)
    execute(shop, "CREATE TABLE notes (number INT, version INT, at DATETIME(6))")
    assert run("init", "--app", "reloaded_tasks").returncode == 0
    return found


def versions(shop: Connection[Cursor]) -> list[int]:
    """Return the version of each run, in their order."""
    return [row[0] for row in rows(shop, "SELECT version FROM notes ORDER BY at")]


def written(tmp_path: Path) -> dict[int, int]:
    """Return the version that ran each message of the tasks that use no database, each once."""
    file = tmp_path / "0" / "written"
    lines = file.read_text().splitlines() if file.exists() else []
    found = {int(number): int(version) for number, version in map(str.split, lines)}
    assert len(found) == len(lines)
    return found


def children(worker: Worker) -> list[psutil.Process]:
    return psutil.Process(worker.process.pid).children(recursive=True)


@pytest.mark.parametrize("kind", [Worker, ModuleWorker])
@pytest.mark.timeout(300)
async def test_twenty_reloads_lose_nothing_and_run_nothing_by_old_code(
    start: Start,
    pair: Servers,
    tmp_path: Path,
    shop: Connection[Cursor],
    code: Code,
    kind: type[Worker],
) -> None:
    """The same process throughout; its budget holds over every exchange."""
    reloads = RELOADS if kind is Worker else 3
    numbers, others = itertools.count(), itertools.count()
    options = {
        "PYTHONPATH": importable(tmp_path),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = ("consume", "--app", "reloaded_tasks")
    worker = start(*command, kind=kind, **options)
    process = psutil.Process(worker.process.pid)
    async with Producer(pair.amqp_url, timeout=10) as producer:
        await producer.publish("reloaded", next(numbers))
        eventually(lambda: versions(shop) == [0], "it runs")
        eventually(lambda: rows(shop, "SELECT 1 FROM aioworker_worker"), "it tells of itself")
        files = process.num_fds()
        for version in range(1, reloads + 1):
            for _ in range(5):
                await producer.publish("reloaded", next(numbers))
                for name in ("reloaded.flow", "reloaded.thread"):
                    await producer.publish(name, next(others))
            code.version(version)
            worker.process.send_signal(signal.SIGHUP)
            began = len(TASKS) * (version + 1)
            eventually(lambda b=began: worker.log.count("worker started") == b, "it reloads")  # type: ignore[misc]
            done = len(versions(shop))
            new = [next(others), next(others)]
            await producer.publish("reloaded", next(numbers))
            await producer.publish("reloaded.flow", new[0])
            await producer.publish("reloaded.thread", new[1])
            eventually(lambda d=done: len(versions(shop)) > d, "it goes on")  # type: ignore[misc]
            assert set(versions(shop)[done:]) == {version}
            eventually(lambda n=new: {*n} <= {*written(tmp_path)}, "the others do too")  # type: ignore[misc]
            assert {written(tmp_path)[number] for number in new} == {version}

    assert sorted(written(tmp_path)) == list(range(next(others)))
    published = next(numbers)
    eventually(lambda: len(versions(shop)) == published, "all is done")
    found = rows(shop, "SELECT number, UNIX_TIMESTAMP(at) FROM notes ORDER BY at")
    assert sorted(number for number, _at in found) == list(range(published))
    gaps = [float(after - before) for (_, before), (_, after) in pairwise(found)]
    assert min(gaps) >= INTERVAL * 0.98
    assert children(worker) == []
    assert process.num_fds() <= files + 1
    worker.process.send_signal(signal.SIGTERM)
    assert worker.process.wait(30) == 0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("def f(:\n", "SyntaxError"),
        ("import nothing_like_it\n", "No module named 'nothing_like_it'"),
        ("import os\nos.environ['SHOP_KEY']\n", "KeyError: 'SHOP_KEY'"),
        (
            "import atexit\natexit.register(print, 'bye', file=__import__('sys').stderr)\n"
            "import nothing_like_it\n",
            "No module named 'nothing_like_it'",
        ),
    ],
    ids=["syntax", "import", "setting", "talkative"],
)
async def test_code_that_does_not_load_changes_nothing(
    start: Start,
    pair: Servers,
    tmp_path: Path,
    shop: Connection[Cursor],
    code: Code,
    text: str,
    reason: str,
) -> None:
    worker = start(
        "consume",
        "--app",
        "reloaded_tasks",
        PYTHONPATH=importable(tmp_path),
    )
    eventually(lambda: rows(shop, "SELECT 1 FROM aioworker_worker"), "it waits")
    code.write(text)

    worker.process.send_signal(signal.SIGHUP)

    eventually(lambda: "reload failed, the old code goes on" in worker.log, "it says so")
    assert reason in worker.log
    assert "Traceback" not in worker.log
    async with Producer(pair.amqp_url, timeout=10) as producer:
        await producer.publish("reloaded", 1)
    eventually(lambda: versions(shop) == [0], "the old code goes on")
    assert children(worker) == []


async def test_a_stop_beside_a_reload_is_a_stop(
    start: Start, tmp_path: Path, shop: Connection[Cursor], code: Code
) -> None:
    """A service manager that stops what is just being reloaded must not wait for ever."""
    options = {
        "PYTHONPATH": importable(tmp_path),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    for pause in (0.0, 0.05, 0.2, 0.35, 0.5, 0.7):
        worker = start("consume", "--app", "reloaded_tasks", **options)
        pid = worker.process.pid
        eventually(
            lambda p=pid: rows(shop, f"SELECT 1 FROM aioworker_worker WHERE pid = {p}"),  # type: ignore[misc]
            "it waits",
        )
        os.kill(pid, signal.SIGHUP)
        time.sleep(pause)  # noqa: ASYNC251 - the signals' distance is what is tested
        os.kill(pid, signal.SIGTERM)

        assert worker.process.wait(15) == 0, (pause, worker.log)
