"""Tasks that start processes and threads, and modules that do so when they are imported."""

from __future__ import annotations

import json
import signal
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from aioworker import Producer
from tests.conftest import Run, Worker, eventually, importable

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

    from support.servers import Servers

Start = Callable[..., Worker]

FORKS = """
    import json, multiprocessing, os, pathlib, time
    from aioworker import task

    forking = multiprocessing.get_context("fork")

    def fork() -> None:
        with forking.Pool(2) as pool:
            squares = pool.map(square, range(4))
        ends = []
        for pause in [0.2] + [0] * 20:
            child = forking.Process(target=time.sleep, args=(60,))
            child.start()
            time.sleep(pause)
            child.terminate()
            child.join(5)
            ends.append(child.exitcode)
            child.kill()
        pathlib.Path("new").write_text(json.dumps([squares, ends]))
        os.rename("new", "done")

    def square(number: int) -> int:
        return number * number

    @task(name="forks.thread")
    def in_thread() -> None:
        fork()

    @task(name="forks.loop")
    async def in_loop() -> None:
        fork()
"""


@pytest.mark.parametrize("name", ["forks.thread", "forks.loop"])
async def test_a_task_that_ends_its_children_ends_them_alone(
    start: Start, run: Run, pair: Servers, tmp_path: Path, shop: Connection[Cursor], name: str
) -> None:
    """Pools end their processes by SIGTERM; the worker hears nothing of it."""
    (tmp_path / "forks.py").write_text(textwrap.dedent(FORKS))
    assert run("init", "--app", "forks").returncode == 0
    worker = start("consume", "--app", "forks", PYTHONPATH=importable(tmp_path))
    async with Producer(pair.amqp_url, timeout=10) as producer:
        await producer.publish(name)

    done = eventually(lambda: [*tmp_path.glob("*/done")], "it ends")

    assert json.loads(done[0].read_text()) == [[0, 1, 4, 9], [-signal.SIGTERM] * 21]
    eventually(lambda: "outcome=ack" in worker.log, "it is acknowledged")
    assert "draining" not in worker.log
    worker.process.send_signal(signal.SIGTERM)
    assert worker.process.wait(30) == 0


LINGERS = """
    import threading, time
    from aioworker import task

    threading.Thread(target=time.sleep, args=(3600,), name="lingers").start()

    @task(name="lingers")
    def linger() -> None: ...
"""


def test_a_thread_of_a_module_keeps_no_command_alive(
    run: Run, tmp_path: Path, shop: Connection[Cursor]
) -> None:
    """It is named, and the status is that of what was done."""
    (tmp_path / "lingers.py").write_text(textwrap.dedent(LINGERS))

    for command in (("init",), ("consume", "--burst")):
        done = run(*command, "--app", "lingers")

        assert done.returncode == 0
        assert done.stderr.splitlines()[-1] == "aioworker: ended without waiting for lingers"
