"""An event loop, or a process, that stands still is named: how long, whose code, which line."""

from __future__ import annotations

import re
import signal
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from aioworker.tasks.loop_monitor import LONGEST_SECONDS
from support import servers
from tests.conftest import Lanes, Worker, eventually, importable

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

Start = Callable[..., Worker]
STILL = LONGEST_SECONDS + 3
BEGINS = "event loop stands still: an `async def` must not block; a `def` runs in a thread"
ENDED = "event loop stood still task="
STOPPED = "process stood still: stopped, suspended or out of CPU"
KEPT = "process stood still: code in C let no thread run"
UNREACHABLE = 'reason="broker unreachable since'
# Each takes many seconds. There are two, since the thread that looks on may have no CPU when the
# first ends.
KEEP = "sum(range(10**9)), sum(range(10**9))"
SHOP = f"""
    import time
    from aioworker import task

    @task
    async def block() -> None:
        pause()

    def pause() -> None:
        time.sleep({STILL})

    @task
    async def compute() -> None:
        spin()

    @task
    def thread() -> None:
        spin()
        spin()

    @task
    async def keep() -> None:
        {KEEP}

    @task
    async def mark() -> None:
        with open("marks", "a") as marks:
            print("began", file=marks)
        pause()

    def spin() -> None:
        until = time.monotonic() + {STILL}
        while time.monotonic() < until:
            sum(range(1000))

"""


@pytest.fixture
async def app(
    start: Start, shop: Connection[Cursor], lanes: Lanes, tmp_path: Path
) -> dict[str, str]:
    """What a command needs to know of a shop of tasks; their queues are declared, and empty."""
    (tmp_path / "shop.py").write_text(textwrap.dedent(SHOP))
    variables = {
        "AIOWORKER_APP": "shop",
        "AIOWORKER_QUEUE_TYPE": "classic",
        "PYTHONPATH": importable(tmp_path),
    }
    initialised = start("init", **variables)
    assert initialised.process.wait(30) == 0, initialised.log
    for name in ("block", "compute", "keep", "mark", "thread"):
        await (await lanes.channel.get_queue(f"aioworker.{name}", ensure=False)).purge()
    return variables


async def send(lanes: Lanes, *names: str) -> None:
    for name in names:
        await lanes.send(b"[[], {}, null]", f"aioworker.{name}", headers={"task": name})


def said(worker: Worker, phrase: str) -> list[dict[str, str]]:
    """Return the fields of each line with a phrase."""
    lines = [line for line in worker.log.splitlines() if phrase in line]
    return [
        {name: value.strip('"') for name, value in re.findall(r'(\w+)=("[^"]*"|\S+)', line)}
        for line in lines
    ]


def freeze(worker: Worker) -> None:
    worker.process.send_signal(signal.SIGSTOP)
    time.sleep(STILL)
    worker.process.send_signal(signal.SIGCONT)


def line_of(code: str) -> int:
    return textwrap.dedent(SHOP).split("\n").index(code) + 1


async def test_a_task_that_blocks_the_event_loop_is_named_with_its_line_while_it_still_does(
    start: Start, app: dict[str, str], lanes: Lanes, tmp_path: Path
) -> None:
    """At three in the morning the line is what one needs to know; and its length, afterwards."""
    worker = start("consume", **app)
    await send(lanes, "block")

    eventually(lambda: BEGINS in worker.log, "it says that it stands still")
    assert ENDED not in worker.log
    eventually(lambda: ENDED in worker.log, "it says how long it did")

    [begun], [ended] = said(worker, BEGINS), said(worker, ENDED)
    outer, inner = line_of("    pause()"), line_of(f"    time.sleep({STILL})")
    shop = tmp_path / "shop.py"
    at = f"{shop}:{outer} in block, {shop}:{inner} in pause"
    assert (begun["task"], begun["at"]) == ("block", at)
    assert (ended["task"], ended["at"]) == ("block", at)
    assert STILL - 1 < float(ended["seconds"]) < 3 * STILL


async def test_a_task_that_computes_in_the_event_loop_is_named_and_no_more_than_once_a_minute(
    start: Start, app: dict[str, str], lanes: Lanes
) -> None:
    worker = start("consume", **app)
    await send(lanes, "compute")
    eventually(lambda: ENDED in worker.log, "it says how long it did")

    await send(lanes, "compute")
    eventually(lambda: worker.log.count("chunk done task=compute") == 2, "both have run")

    assert [one["task"] for one in said(worker, BEGINS)] == ["compute"]
    assert [one["task"] for one in said(worker, ENDED)] == ["compute"]


async def test_a_task_whose_c_code_lets_no_thread_run_is_named(
    start: Start, app: dict[str, str], lanes: Lanes, tmp_path: Path
) -> None:
    """A regular expression may, as `sum` does here: the thread that looks on stands still, too."""
    worker = start("consume", **app)
    await send(lanes, "keep")

    eventually(lambda: KEPT in worker.log, "it says so")

    [told] = said(worker, KEPT)
    at = f"{tmp_path / 'shop.py'}:{line_of(f'    {KEEP}')} in keep"
    assert (told["task"], told["at"]) == ("keep", at)


async def test_a_thread_that_computes_is_no_standstill(
    start: Start, app: dict[str, str], lanes: Lanes
) -> None:
    worker = start("consume", **app)
    await send(lanes, "thread")

    eventually(lambda: "chunk done task=thread" in worker.log, "it has run")

    assert not re.search("stands? still|stood still", worker.log)


async def test_a_process_that_was_stopped_says_so_and_blames_no_task(
    start: Start, app: dict[str, str]
) -> None:
    worker = start("consume", **app)
    eventually(lambda: "nothing queued" in worker.log, "it waits")

    freeze(worker)

    eventually(lambda: STOPPED in worker.log, "it says so")
    [told] = said(worker, STOPPED)
    assert "task" not in told
    assert STILL - 1 < float(told["seconds"]) < 3 * STILL
    assert BEGINS not in worker.log


@pytest.mark.parametrize("frozen", [False, True], ids=["blocked", "frozen"])
async def test_a_connection_that_a_standstill_cost_is_not_blamed_on_rabbitmq_alone(
    start: Start,
    app: dict[str, str],
    lanes: Lanes,
    pair: servers.Servers,
    frozen: bool,
) -> None:
    """It answered no heartbeat for so long; what mends that is no matter of the network."""
    worker = start("consume", **app, AIOWORKER_AMQP_URL=f"{pair.amqp_url}?heartbeat=1")
    if frozen:
        eventually(lambda: "nothing queued" in worker.log, "it waits")
        freeze(worker)
    else:
        await send(lanes, "block")

    eventually(lambda: said(worker, UNREACHABLE), "the connection is lost")

    told = said(worker, UNREACHABLE)[0]["reason"]
    words = "the process" if frozen else "the event loop"
    assert re.search(
        rf"; {words} stood still for [\d.]+ s{'' if frozen else ' while block ran'}", told
    )


async def test_a_run_that_cost_its_connection_is_settled_without_a_second_one(
    start: Start, app: dict[str, str], lanes: Lanes, pair: servers.Servers
) -> None:
    """RabbitMQ delivers its message again; it began anew each time that heartbeats were missed."""
    worker = start("consume", **app, AIOWORKER_AMQP_URL=f"{pair.amqp_url}?heartbeat=1")
    await send(lanes, "mark")

    eventually(lambda: said(worker, "chunk done"), "it is settled")

    [done] = said(worker, "chunk done")
    assert (done["task"], done["outcome"]) == ("mark", "ack")
    assert len(said(worker, "not settled")) == 1
    assert (worker.folder / "marks").read_text() == "began\n"
