"""A message that kills its worker becomes a dead letter; what waits beside it is done."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from aioworker.budget.deaths import MOST_DEATHS
from support.servers import ROOT
from tests.conftest import (
    COMMAND_SECONDS,
    ONE_A_START,
    QUEUES,
    Lanes,
    Run,
    Worker,
    current_versions,
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
        env=pair.environment | ONE_A_START,
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
