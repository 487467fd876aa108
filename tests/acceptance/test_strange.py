"""Whatever tasks raise, count and pass to the database: no worker ends, no message stays."""

from __future__ import annotations

import json
import os
import re
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.conftest import Lanes, Worker, eventually, importable

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

Start = Callable[..., Worker]
MESSAGES = int(os.environ.get("STRANGE_MESSAGES", "100"))  # of each task
SHOP = """
    from random import Random

    from aioworker import Context, task
    from tests import strange

    def do(ctx, number):
        # Every other one is well: what fails alone is no sign that the task is broken.
        if number % 2:
            random = Random(number)
            dict.update(ctx.counts, strange.counts_of(random))
            ctx.log.info("%s of %s", strange.thing(random), number)
            strange.raised(strange.error_of(random))

    @task(max_retries=0)
    async def coroutine(ctx: Context, number: int) -> None:
        do(ctx, number)

    @task(max_retries=0)
    def thread(ctx: Context, number: int) -> None:
        do(ctx, number)

    @task(max_retries=0)
    def parameter(ctx: Context, number: int) -> None:
        if number % 2:
            with ctx.transaction() as cursor:
                cursor.execute("SELECT %s", [strange.thing(Random(number))])
"""
TASKS = ("coroutine", "thread", "parameter")


@pytest.mark.timeout(120 + MESSAGES)
async def test_strange_objects_end_no_worker_and_leave_no_message(
    start: Start, shop: Connection[Cursor], lanes: Lanes, tmp_path: Path
) -> None:
    (tmp_path / "shop.py").write_text(textwrap.dedent(SHOP))
    root = str(Path(__file__).parents[2])
    app = {
        "AIOWORKER_APP": "shop",
        "AIOWORKER_QUEUE_TYPE": "classic",
        "PYTHONPATH": os.pathsep.join((importable(tmp_path), root)),
    }
    assert start("init", **app).process.wait(30) == 0
    for name in TASKS:
        for number in range(MESSAGES):
            headers = {"task": name, "id": f"{name}-{number}"}
            body = json.dumps([[number], {}, None]).encode()
            await lanes.send(body, f"aioworker.{name}", headers=headers)

    worker = start("consume", **app)

    def settled() -> int:
        assert worker.process.poll() is None, worker.log[-3000:]
        return len(set(re.findall(r" message_id=(\S+) .* outcome=\w+", worker.log)))

    while (before := settled()) < len(TASKS) * MESSAGES:
        eventually(partial(gets_beyond, settled, before), f"more than {before} are settled")


def gets_beyond(count: Callable[[], int], before: int) -> bool:
    return count() > before
