"""A task that ends what the worker runs on is named; the worker says so in one line."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from tests.conftest import Lanes, Worker, importable

if TYPE_CHECKING:
    from pathlib import Path

    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

Start = Callable[..., Worker]
SHOP = """
    import asyncio

    from aioworker import task

    def cancel(others):
        for one in asyncio.all_tasks():
            if not others or one is not asyncio.current_task():
                one.cancel()

    @task()
    async def cancels(rude: bool) -> None:
        if rude:
            cancel(others=True)
        await asyncio.sleep(60)

    @task()
    async def cancels_all(rude: bool) -> None:
        if rude:
            cancel(others=False)
        await asyncio.sleep(60)

    @task()
    async def cancels_and_returns(rude: bool) -> None:
        if rude:
            cancel(others=True)
        else:
            await asyncio.sleep(60)

    @task()
    async def stops(rude: bool) -> None:
        if rude:
            asyncio.get_running_loop().stop()
        await asyncio.sleep(60)

    @task()
    async def stops_and_returns(rude: bool) -> None:
        if rude:
            asyncio.get_running_loop().stop()
        else:
            await asyncio.sleep(60)
"""
CANCELLED = "something in this process cancelled the worker's own asyncio tasks"
STOPPED = "something in this process stopped the worker's event loop"


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("cancels", CANCELLED),
        ("cancels_all", CANCELLED),
        ("cancels_and_returns", CANCELLED),
        ("stops", STOPPED),
        ("stops_and_returns", STOPPED),
    ],
)
async def test_a_worker_that_a_task_cut_off_names_what_ran(
    task: str, words: str, start: Start, shop: Connection[Cursor], lanes: Lanes, tmp_path: Path
) -> None:
    """It ended with sixty lines of asyncio's, none of which named the task, at each start."""
    (tmp_path / "shop.py").write_text(textwrap.dedent(SHOP))
    app = {
        "AIOWORKER_APP": "shop",
        "AIOWORKER_QUEUE_TYPE": "classic",
        "PYTHONPATH": importable(tmp_path),
    }
    assert start("init", task, **app).process.wait(30) == 0
    for number, rude in enumerate((False, True)):
        body = json.dumps([[rude], {}, None]).encode()
        headers = {"task": task, "id": f"shop-{number}"}
        await lanes.send(body, f"aioworker.{task}", headers=headers)

    worker = start("consume", task, **app)

    assert worker.process.wait(30) == 1
    last = worker.log.splitlines()[-1]
    assert last == f"aioworker: {words}; running then: {task} shop-0, {task} shop-1"
    assert "Traceback" not in worker.log
