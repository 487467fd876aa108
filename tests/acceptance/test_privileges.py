"""The privileges that `init --print` shows: enough for every command, and each one is missed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from aioworker.budget import grants
from tests.conftest import (
    QUEUES,
    TASK,
    Lanes,
    Run,
    Worker,
    eventually,
    execute,
    importable,
    rows,
    simple_addons,
    summary,
)

if TYPE_CHECKING:
    from pathlib import Path

    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

    from support import servers

Start = Callable[..., Worker]
USER = "'least'@'%'"
APP = """
from aioworker import Budget, Context, task

writes = Budget("writes", rate_limit="100/s")

@task(budget=writes, keys=lambda after: [[1, 2]] if not after else [])
async def shared(ctx: Context, ids: list[int]) -> None:
    async with ctx.transaction() as cursor:
        await cursor.executemany("INSERT INTO written VALUES (%s)", [(one,) for one in ids])
"""
OF_WORKERS = "aioworker_worker"
ONES = [
    (privilege, table)
    for privileges, table in grants.PRIVILEGES
    for privilege in privileges.split(", ")
    if (privilege, table) != ("INSERT", "aioworker_budget")  # for init and the first version
]


@pytest.fixture
def least(shop: Connection[Cursor], maria: servers.Maria) -> Iterator[dict[str, str]]:
    """A user of the database who may do nothing yet, and the variable that names it."""
    execute(shop, f"CREATE OR REPLACE USER {USER}")
    yield {"AIOWORKER_MYSQL_URL": maria.url("aioworker", "least")}
    execute(shop, f"DROP USER {USER}")


def grant_printed(run: Run, shop: Connection[Cursor], variables: dict[str, str]) -> None:
    """Grant what is printed, as it is printed."""
    text = run("init", "--print", **variables).stdout
    execute(shop, *(line for line in text.splitlines() if line.startswith("GRANT ")))


async def test_the_printed_privileges_are_enough_for_every_command(
    run: Run, shop: Connection[Cursor], least: dict[str, str], tmp_path: Path
) -> None:
    """Of a task that shares a budget, too, and for all that is set and shown at run time."""
    (tmp_path / "least.py").write_text(APP)
    variables = least | {"PYTHONPATH": importable(tmp_path), "AIOWORKER_APP": "least"}
    execute(shop, "DROP TABLE IF EXISTS written", "CREATE TABLE written (id INT NOT NULL)")
    grant_printed(run, shop, variables)
    execute(shop, f"GRANT INSERT ON written TO {USER}")

    done = {
        " ".join(command): run(*command, **variables)
        for command in [
            ("init",),
            ("init", "--fresh"),
            ("rate-limit", "shared", "50/s", "--for", "1h"),
            ("rate-limit", "--budget", "writes", "50/s", "--for", "1s"),
            ("pause", "--budget", "writes", "--for", "1h", "--reason", "backup"),
            ("pause", "--all"),
            ("resume", "--all"),
            ("rate-limit", "--budget", "writes", "--reset"),
            ("publish-all", "shared"),
            ("consume", "--burst"),
            ("status",),
            ("status", "--budget", "writes"),
            ("audit",),
            ("history",),
        ]
    }
    execute(shop, "DROP TABLE written")

    assert {name: one.stderr for name, one in done.items() if one.returncode} == {}
    assert done["consume --burst"].stdout == summary(1)
    assert "1 start" in done["audit"].stdout
    assert "resumed" in done["history"].stdout


async def test_a_worker_and_its_monitor_need_no_more(
    run: Run, start: Start, shop: Connection[Cursor], lanes: Lanes, least: dict[str, str]
) -> None:
    """No line of theirs says that something was denied, from the first start to the last."""
    simple_addons(shop, 1)
    grant_printed(run, shop, least)
    run("publish", "1", **least)
    worker = start("consume", "--rate-limit", "100/s", **least)
    eventually(lambda: "outcome=ack" in worker.log, "it runs")

    health, status = run("health", **least), run("status", "--json", **least)
    worker.process.terminate()

    assert worker.process.wait(30) == 0
    assert (health.returncode, health.stderr) == (0, "")
    assert json.loads(status.stdout)["waits_kind"] == "empty"
    assert "denied" not in worker.log
    assert rows(shop, "SELECT COUNT(*) FROM aioworker_worker") == [(0,)]


@pytest.mark.parametrize(("privilege", "table"), ONES, ids=[" ".join(one) for one in ONES])
async def test_a_privilege_that_is_lacking_is_said_before_a_start(
    run: Run,
    start: Start,
    shop: Connection[Cursor],
    lanes: Lanes,
    least: dict[str, str],
    privilege: str,
    table: str,
) -> None:
    """In one line, and with no message in hand, which would be given back again and again."""
    simple_addons(shop, 1)
    grant_printed(run, shop, least)
    execute(shop, f"REVOKE {privilege} ON {table} FROM {USER}")
    run("publish", "1", **least)

    worker = start("consume", "--rate-limit", "100/s", **least)

    words = f"{privilege} command denied to user"
    eventually(lambda: words in worker.log or "outcome" in worker.log, "it says so")
    [line] = [line for line in worker.log.splitlines() if words in line]
    assert table in line
    if table == OF_WORKERS:  # what it only tells of itself keeps no message waiting
        assert "worker's row not written" in line
        eventually(lambda: "outcome=ack" in worker.log, "it goes on")
        assert worker.log.index(line) < worker.log.index("outcome=ack")
    else:
        assert rows(shop, f"SELECT starts FROM aioworker_budget WHERE task = '{TASK}'") == [(0,)]
        assert await lanes.holds(QUEUES.urgent, 1)
        assert "outcome" not in worker.log


async def test_an_init_that_may_make_no_row_says_so(
    run: Run, shop: Connection[Cursor], lanes: Lanes, least: dict[str, str]
) -> None:
    """Nobody else inserts into the budget's table."""
    grant_printed(run, shop, least)
    execute(shop, f"REVOKE INSERT ON aioworker_budget FROM {USER}")

    done = run("init", **least)

    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "INSERT command denied to user" in done.stderr
