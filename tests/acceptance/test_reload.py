"""SIGHUP under load: new code in the same process, or the old code and the reason."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
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
from aioworker.worker.reload import FRESH_SECONDS
from tests.conftest import (
    AIOWORKER,
    ModuleWorker,
    Run,
    Worker,
    eventually,
    execute,
    importable,
    rows,
)

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
        ("import os\nos._exit(0)\n", "a module ended the process, with status 0"),
    ],
    ids=["syntax", "import", "setting", "talkative", "end"],
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


@pytest.mark.parametrize(
    ("left", "says"),
    [
        ("", "the new code begins"),
        (
            "import os\ndel os.memfd_create\n",
            "no file for what the check says: [Errno 2] No such file",
        ),
    ],
    ids=["in memory", "nowhere"],
)
async def test_a_reload_needs_no_folder_to_write_to(
    start: Start, tmp_path: Path, shop: Connection[Cursor], code: Code, left: str, says: str
) -> None:
    """In a container that only reads nothing was said, and the service manager waited."""
    code.write(
        f"import tempfile\ntempfile.tempdir = '/nowhere'\n{left}"
        + textwrap.dedent(CODE.format(version=0))
    )
    worker = start("consume", "--app", "reloaded_tasks", PYTHONPATH=importable(tmp_path))
    eventually(lambda: rows(shop, "SELECT 1 FROM aioworker_worker"), "it waits")

    worker.process.send_signal(signal.SIGHUP)

    eventually(lambda: says in worker.log, "it reloads, or says why not")


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


RELEASE = """
    import pathlib
    from aioworker import task

    @task(name="released")
    async def tell() -> None:
        pathlib.Path({file!r}).touch()
"""


class Releases:
    """Folders of releases, and the link to the current one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.current = folder / "current"

    def make(self, name: str) -> None:
        """Make a release whose task touches a file of its name."""
        release = self.folder / name
        release.mkdir()
        code = RELEASE.format(file=str(self.folder / f"ran-{name}"))
        (release / "released_tasks.py").write_text(textwrap.dedent(code))

    def change(self, name: str) -> None:
        """Let the link lead to a release, at once."""
        new = self.folder / "new"
        new.symlink_to(name)
        new.replace(self.current)

    def ran(self, name: str) -> bool:
        """Return whether a release's task ran."""
        return (self.folder / f"ran-{name}").exists()


class LinkWorker(Worker):
    """A worker that a shell started in the folder of the current release."""

    command = ("sh", "-c", f'cd ../current && exec {AIOWORKER} "$@"', "sh")


async def test_a_reload_follows_the_link_that_it_was_started_in(
    start: Start, run: Run, pair: Servers, tmp_path: Path, shop: Connection[Cursor]
) -> None:
    """A deploy makes a release, changes the link, and removes the one before."""
    releases = Releases(tmp_path)
    releases.make("v1")
    releases.change("v1")
    assert run("init", "--app", "released_tasks", PYTHONPATH=str(releases.current)).returncode == 0
    worker = start("consume", "--app", "released_tasks", kind=LinkWorker)
    async with Producer(pair.amqp_url, timeout=10) as producer:
        await producer.publish("released")
        eventually(lambda: releases.ran("v1"), "the first release runs")
        for number, name in enumerate(("v2", "v3"), start=2):
            releases.make(name)
            releases.change(name)
            if name == "v3":
                shutil.rmtree(tmp_path / "v2")
            worker.process.send_signal(signal.SIGHUP)
            eventually(lambda n=number: worker.log.count("worker started") == n, "it reloads")  # type: ignore[misc]
            await producer.publish("released")
            eventually(lambda n=name: releases.ran(n), "the new release runs")  # type: ignore[misc]


async def test_a_folder_that_is_gone_is_said_in_a_line(
    start: Start, run: Run, tmp_path: Path, shop: Connection[Cursor]
) -> None:
    releases = Releases(tmp_path)
    releases.make("v1")
    releases.change("v1")
    assert run("init", "--app", "released_tasks", PYTHONPATH=str(releases.current)).returncode == 0
    worker = start("consume", "--app", "released_tasks", kind=LinkWorker)
    eventually(lambda: "nothing queued" in worker.log, "it waits")
    releases.current.unlink()

    worker.process.send_signal(signal.SIGHUP)

    eventually(lambda: "reload failed" in worker.log, "it says so")
    [line] = [line for line in worker.log.splitlines() if "reload failed" in line]
    reason = f"cannot enter {releases.current}, where it was started: No such file or directory"
    assert line.endswith(f'reason="{reason}"')


BEGINS = {
    "thread": "import threading, time\nthreading.Thread(target=time.sleep, args=(3600,)).start()\n",
    "process": "import subprocess\nsubprocess.Popen(['sleep', '3600'])\n",
}
THREADS = (
    "import threading, time\nfor _ in range(4):\n"
    "    threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()\n"
)


@pytest.mark.parametrize("begins", BEGINS.values(), ids=BEGINS)
async def test_what_a_module_begins_holds_up_no_reload(
    start: Start, tmp_path: Path, shop: Connection[Cursor], code: Code, begins: str
) -> None:
    """A thread that would keep a process alive, a process that keeps its output open."""
    worker = start("consume", "--app", "reloaded_tasks", PYTHONPATH=importable(tmp_path))
    eventually(lambda: "nothing queued" in worker.log, "it waits")
    code.write(textwrap.dedent(CODE.format(version=1)) + begins)

    worker.process.send_signal(signal.SIGHUP)

    eventually(lambda: worker.log.count("worker started") == 2 * len(TASKS), "it reloads")
    running = children(worker)  # the check left none behind
    assert len(running) == (begins == BEGINS["process"])
    for process in running:
        process.terminate()
        eventually(lambda p=process: p.status() == psutil.STATUS_ZOMBIE, "a signal ends it")  # type: ignore[misc]


def test_a_check_says_what_it_loaded_and_ends(run: Run, code: Code) -> None:
    code.write(textwrap.dedent(CODE.format(version=1)) + BEGINS["thread"])

    done = run("consume", "--app", "reloaded_tasks", "--check")

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "aioworker: loaded reloaded.flow, reloaded.thread, reloaded\n"


HELD = """
    import asyncio, pathlib, sys, time
    from aioworker import task

    here = pathlib.Path({folder!r})
    with (here / "imports").open("a") as file:
        file.write("x")
    if (here / ("slow-check" if "--check" in sys.argv else "slow")).exists():
        (here / "importing").touch()
        while (here / "importing").exists():
            time.sleep(0.02)

    @task(name="held")
    async def hold() -> None:
        (here / "running").touch()
        while not (here / "let").exists():
            await asyncio.sleep(0.02)
"""


@pytest.fixture
def held(tmp_path: Path, run: Run, shop: Connection[Cursor]) -> Path:
    """A folder with a module that counts its imports, and with what holds up its task."""
    (tmp_path / "held_tasks.py").write_text(textwrap.dedent(HELD.format(folder=str(tmp_path))))
    assert run("init", "--app", "held_tasks").returncode == 0
    (tmp_path / "imports").unlink()
    return tmp_path


async def test_an_idle_worker_loads_its_code_twice_for_a_reload(start: Start, held: Path) -> None:
    """Once in the check and once for good: nothing is consumed while it loads."""
    worker = start("consume", "--app", "held_tasks", PYTHONPATH=importable(held))
    eventually(lambda: "nothing queued" in worker.log, "it waits")

    worker.process.send_signal(signal.SIGHUP)
    eventually(lambda: worker.log.count("worker started") == 2, "it reloads")

    assert (held / "imports").read_text() == "x" * 3


async def test_a_stop_cuts_short_the_second_check(start: Start, pair: Servers, held: Path) -> None:
    """What ran took a while: the code is loaded again, and a stop does not wait for that."""
    worker = start("consume", "--app", "held_tasks", PYTHONPATH=importable(held))
    async with Producer(pair.amqp_url, timeout=10) as producer:
        await producer.publish("held")
    eventually((held / "running").exists, "it runs")
    worker.process.send_signal(signal.SIGHUP)
    eventually(lambda: "draining" in worker.log, "it finishes what runs")
    (held / "slow-check").touch()
    time.sleep(FRESH_SECONDS)  # noqa: ASYNC251 - the age of the first check is what is tested
    (held / "let").touch()
    eventually((held / "importing").exists, "it checks once more")

    worker.process.send_signal(signal.SIGTERM)

    assert worker.process.wait(15) == 0, worker.log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
async def test_a_signal_while_the_new_code_is_imported_is_heard_when_it_listens(
    start: Start, held: Path, number: signal.Signals
) -> None:
    worker = start("consume", "--app", "held_tasks", PYTHONPATH=importable(held))
    eventually(lambda: "nothing queued" in worker.log, "it waits")
    (held / "slow").touch()
    worker.process.send_signal(signal.SIGHUP)
    eventually((held / "importing").exists, "the new code is imported")

    worker.process.send_signal(number)
    (held / "slow").unlink()
    (held / "importing").unlink()

    if number == signal.SIGTERM:
        assert worker.process.wait(30) == 0
    else:
        eventually(lambda: worker.log.count("worker started") == 3, "it reloads again")


async def test_hangups_at_any_moment_end_no_worker(
    start: Start, tmp_path: Path, shop: Connection[Cursor], code: Code
) -> None:
    """Nor where a module has threads: the kernel gives a signal to any that does not block it."""
    code.write(textwrap.dedent(CODE.format(version=1)) + THREADS)
    worker = start("consume", "--app", "reloaded_tasks", PYTHONPATH=importable(tmp_path))
    eventually(lambda: "nothing queued" in worker.log, "it waits")

    for number in range(1, 9):
        worker.process.send_signal(signal.SIGHUP)
        eventually(lambda n=number: worker.log.count("code begins") >= n, "it is replaced")  # type: ignore[misc]
        while worker.log.count("worker started") < (number + 1) * len(TASKS):
            assert worker.process.poll() is None, worker.log
            worker.process.send_signal(signal.SIGHUP)
            # About a thousand a second: a flood leaves a busy machine's event loop no time.
            await asyncio.sleep(0.001)
