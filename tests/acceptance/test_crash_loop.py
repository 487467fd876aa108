"""A message that kills its worker becomes a dead letter; what waits beside it is done."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from aioworker import Producer
from aioworker.consumer import SUSPECT_RETURNS
from aioworker.crashes import MOST_DEATHS
from support.servers import ROOT
from tests.conftest import (
    COMMAND_SECONDS,
    QUEUES,
    Lanes,
    Run,
    Worker,
    current_versions,
    eventually,
    importable,
    rows,
    simple_addons,
)
from tests.deadly import DEADLY_ADDON, STATUS

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

    from support.servers import Servers


Start = Callable[..., Worker]


def live(pair: Servers) -> int:
    """Run a worker until it dies, or the lanes are empty; return its exit status."""
    return subprocess.run(
        [sys.executable, "-m", "tests.deadly", "consume", "--burst", "--rate-limit", "20/s"],
        env=pair.environment,
        cwd=ROOT,
        capture_output=True,
        timeout=COMMAND_SECONDS,
        check=False,
    ).returncode


async def test_a_message_that_kills_its_worker_ends_as_a_dead_letter(
    pair: Servers, run: Run, shop: Connection[Cursor], lanes: Lanes
) -> None:
    """After five deaths; none of the others, held or waiting through them, is set aside."""
    simple_addons(shop, 20)
    for addon in range(1, 21):
        headers: dict[str, Any] = {"task": "update_current_version", "id": f"chunk {addon}"}
        await lanes.send(json.dumps([[[addon]], {}, None]).encode(), headers=headers)

    lives = [live(pair) for _ in range(MOST_DEATHS + 1)]

    assert lives == [STATUS] * MOST_DEATHS + [1]
    versions = current_versions(shop)
    assert versions.pop(DEADLY_ADDON) is None
    assert versions == {n: n + 10_000 for n in range(1, 21) if n != DEADLY_ADDON}
    assert [await lanes.count(name) for name in (QUEUES.bulk, QUEUES.retry)] == [0, 0]
    [letter] = run("dead", "list", "--json").stdout.splitlines()
    found = json.loads(letter)
    assert (found["id"], found["reason"], found["error"]) == (
        f"chunk {DEADLY_ADDON}",
        "its worker died 5 times while it ran",
        "CrashLoopError",
    )
    assert rows(shop, "SELECT running, deaths, starts FROM aioworker_budget") == [
        (None, None, 19 + MOST_DEATHS)
    ]


TWO = f"""
    import asyncio, os
    from aioworker import task

    running = asyncio.Event()

    def note(text):
        with open("notes", "a") as notes:
            print(text, file=notes)

    @task(rate_limit="20/s")
    async def victim() -> None:
        note("victim")
        running.set()
        await asyncio.sleep(2)
        running.clear()

    @task(rate_limit="20/s")
    async def killer() -> None:
        for _ in range(10):
            await asyncio.sleep(0.1)
            if running.is_set():
                break
        note(f"killer beside victim: {{running.is_set()}}")
        os._exit({STATUS})
"""


async def test_a_message_that_ran_beside_the_one_that_killed_its_worker_runs_alone(
    pair: Servers, run: Run, tmp_path: Path, shop: Connection[Cursor]
) -> None:
    """The first death is of both; then it shows that it was not the one, and is done."""
    (tmp_path / "two.py").write_text(textwrap.dedent(TWO))
    assert run("init", "--app", "two").returncode == 0
    async with Producer(pair.amqp_url, timeout=10) as producer:
        for name in ("victim", "killer"):
            await producer.publish(name)

    lives = [run("consume", "--app", "two", "--burst") for _ in range(MOST_DEATHS + 1)]

    assert [life.returncode for life in lives] == [STATUS] * MOST_DEATHS + [1]
    notes = (tmp_path / "notes").read_text().splitlines()
    assert sorted(notes[:2]) == ["killer beside victim: True", "victim"]
    assert sorted(notes[2:]) == [*["killer beside victim: False"] * (MOST_DEATHS - 1), "victim"]
    deaths = "SELECT running, deaths FROM aioworker_budget WHERE task IN ('victim', 'killer')"
    assert rows(shop, deaths) == [(None, None)] * 2
    letters = [run("dead", "list", name, "--app", "two", "--json") for name in ("victim", "killer")]
    assert [len(letter.stdout.splitlines()) for letter in letters] == [0, 1]


BESIDE = """
    import time
    from aioworker import task

    def note(text):
        with open("notes", "a") as notes:
            print(text, file=notes)

    @task
    def slow(number: int) -> None:
        note(f"slow {number} begins")
        time.sleep(3)
        note(f"slow {number} ends")

    @task
    async def quick() -> None:
        note("quick")
"""


@pytest.mark.parametrize("stopped", [False, True])
async def test_a_message_that_came_back_again_and_again_waits_to_run_alone(
    start: Start,
    pair: Servers,
    run: Run,
    tmp_path: Path,
    shop: Connection[Cursor],
    lanes: Lanes,
    stopped: bool,
) -> None:
    """In its lane, saying so; what is told to stop meanwhile begins it no more."""
    (tmp_path / "beside.py").write_text(textwrap.dedent(BESIDE))
    assert run("init", "--app", "beside").returncode == 0
    quick = await lanes.channel.get_queue("aioworker.quick", ensure=False)
    async with Producer(pair.amqp_url, timeout=10) as producer:
        await producer.publish("quick")
        for _ in range(SUSPECT_RETURNS):
            await (await quick.get(timeout=10)).reject(requeue=True)
        assert run("pause", "quick", "--app", "beside").returncode == 0
        worker = start("consume", "--app", "beside", PYTHONPATH=importable(tmp_path))
        notes = tmp_path / "0" / "notes"
        await producer.publish("slow", 1)
        eventually(notes.exists, "the slow one runs")
        assert run("resume", "quick", "--app", "beside").returncode == 0
        told = "SELECT 1 FROM aioworker_worker WHERE reason LIKE 'to run alone, without slow: %'"
        eventually(lambda: rows(shop, told), "the other one says why it waits")
        assert await lanes.count("aioworker.quick") == 1
        if stopped:
            worker.process.send_signal(signal.SIGTERM)
        else:
            await producer.publish("slow", 2)
            eventually(lambda: "slow 2 ends" in notes.read_text(), "all is done")
            worker.process.send_signal(signal.SIGTERM)

    assert worker.process.wait(30) == 0
    done = ["slow 1 begins", "slow 1 ends", "quick", "slow 2 begins", "slow 2 ends"]
    assert notes.read_text().splitlines() == (done[:2] if stopped else done)
    assert await lanes.count("aioworker.quick") == stopped
