"""`pause --all` and `resume --all` beside charges: they lock the same rows, and disturb nobody."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from aioworker.commands import controls
from aioworker.settings import Settings
from support import servers
from tests.conftest import TASK, eventually, rows
from tests.several import BUDGET, Several, assert_never_two_at_once, full, of, stop

TASKS = dict.fromkeys("ab", "budget=writes") | {"o": 'rate_limit="200/s"'}
SERVED = ("ab", "bo", "oa")  # by each worker
MESSAGES = 500  # more than run while the test lasts
TIMES = 500
LEAST_STARTS = 50  # beside them
EVERYTHING = controls.Instruction(why="drill", every=True)
KEYS = [*map(full, TASKS), BUDGET, TASK]
TROUBLE = re.compile(r"^.*(?:ERROR|CRITICAL|Traceback|[Dd]eadlock|contention).*$", re.MULTILINE)


@pytest.fixture
def several(private: servers.Servers, tmp_path: Path) -> Iterator[Several]:
    made = Several(private, tmp_path, TASKS, "200/s")
    yield made
    made.place.end()


async def pause_and_resume() -> None:
    """Do both again and again, each over a connection of its own, as the command does."""
    settings = Settings.load()
    for _ in range(TIMES):
        await controls.pause(settings, [], EVERYTHING)
        await controls.resume(settings, [], EVERYTHING)


@pytest.mark.timeout(240)
def test_a_thousand_pauses_and_resumes_of_everything_disturb_nobody(
    several: Several, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None fails, each is noted once, and no worker has an error or stops for good."""
    for task in TASKS:
        several.publish(task, MESSAGES)
    workers = [several.worker(*tasks) for tasks in SERVED]
    eventually(lambda: all(of(several.starts(), task) for task in TASKS), "all tasks run")
    for name in ("AMQP", "MYSQL"):
        url = getattr(several.place.servers, f"{name.lower()}_url")
        monkeypatch.setenv(f"AIOWORKER_{name}_URL", url)

    before = len(several.starts())
    asyncio.run(pause_and_resume())
    meanwhile = len(several.starts()) - before

    since = several.now()
    eventually(lambda: all(of(several.starts(since), task) for task in TASKS), "all go on")
    stop(workers)
    assert meanwhile >= LEAST_STARTS
    assert_never_two_at_once(of(several.starts(), "ab"))
    assert_never_two_at_once(of(several.starts(), "o"))
    assert [line for one in workers for line in TROUBLE.findall(one.log)] == []
    noted = "SELECT task, what, COUNT(*) FROM aioworker_change GROUP BY task, what"
    assert sorted(rows(several.place.shop, noted)) == sorted(
        (key, what, TIMES) for key in KEYS for what in ("paused", "resumed")
    )
