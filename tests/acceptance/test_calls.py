"""From the command `consume` to a task's function it is no long way."""

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
MOST_CALLS = 9
# Whatever creates an asyncio task called what that does: its stack is noted.
APP = """
    import asyncio
    import traceback
    from pathlib import Path

    import aioworker

    ROOT = str(Path(aioworker.__file__).parent)
    created = {}  # of each asyncio task: the calls that made it, and the task that these ran in
    create_task = asyncio.create_task

    def ours(codes):
        return [code.co_qualname for code in codes if code.co_filename.startswith(ROOT)]

    def stack():
        return ours(frame.f_code for frame, _line in traceback.walk_stack(None))[::-1]

    def noting(coroutine, **options):
        made = create_task(coroutine, **options)
        created[made] = stack(), asyncio.current_task()
        return made

    def under_way(task):
        codes, coroutine = [], task.get_coro()
        while hasattr(coroutine, "cr_code"):
            codes.append(coroutine.cr_code)
            coroutine = coroutine.cr_await
        return ours(codes)

    def on_the_way_to(task):
        # What has returned since, or waits for something else, is no call on the way.
        if task not in created:
            return []
        calls, creator = created[task]
        return on_the_way_to(creator) + [one for one in under_way(creator) if one in calls]

    asyncio.create_task = noting

    async def visit() -> None:
        task = asyncio.current_task()
        last = under_way(task)
        first = [one for one in stack() if one not in last]
        calls = first[first.index("consume"):] + on_the_way_to(task) + last
        print("calls:", *calls, flush=True)

    limited = aioworker.task(name="limited", rate_limit="100/s")(visit)
    unlimited = aioworker.task(name="unlimited")(visit)
"""


@pytest.mark.parametrize("task", ["limited", "unlimited"])
async def test_a_function_is_called_by_few_of_ours(
    task: str, start: Start, shop: Connection[Cursor], lanes: Lanes, tmp_path: Path
) -> None:
    """A reader follows them; seventeen were too many."""
    (tmp_path / "chain.py").write_text(textwrap.dedent(APP))
    app = {
        "AIOWORKER_APP": "chain",
        "AIOWORKER_QUEUE_TYPE": "classic",
        "PYTHONPATH": importable(tmp_path),
    }
    assert start("init", task, **app).process.wait(30) == 0
    body = json.dumps([[], {}, None]).encode()
    await lanes.send(body, f"aioworker.{task}", headers={"task": task, "id": "one"})

    worker = start("consume", task, "--burst", **app)

    assert worker.process.wait(30) == 0
    [line] = [one for one in worker.log.splitlines() if one.startswith("calls: ")]
    names = line.split()[1:]
    assert (names[0], names[-1]) == ("consume", "Task._contained"), names
    assert len(names) <= MOST_CALLS, names  # the last of which calls the function
