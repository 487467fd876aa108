"""An upgrade of aioworker over tables of an earlier version: nothing forgotten, nobody stops."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from tests.conftest import (
    EARLIER,
    QUEUES,
    TASK,
    Lanes,
    Run,
    Worker,
    current_versions,
    eventually,
    execute,
    importable,
    make_tables,
    rows,
    simple_addons,
)

if TYPE_CHECKING:
    from pathlib import Path

    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

    from support import servers

Start = Callable[..., Worker]
CURE = "of an earlier version: run `aioworker init`, which keeps what is in it"
ROW = (
    "INSERT INTO aioworker_budget (task, last_start, server, paused, set_why)"
    f" VALUES ('{TASK}', NOW(6) - INTERVAL 1 DAY, 'db1', TRUE, 'replica lags')"
)
# A module of a version that needs one column more.
NEWER = """
from aioworker import task
from aioworker.budget import schema

schema.STATEMENTS["aioworker_budget"] = schema.BUDGET.replace(
    "deaths TEXT NULL", "deaths TEXT NULL,\\n    newest INT NULL"
)

@task
async def upgraded() -> None:
    pass
"""


@pytest.fixture
def older(shop: Connection[Cursor]) -> Connection[Cursor]:
    """The tables of the first version, and a pause."""
    make_tables(shop, EARLIER[0])
    execute(shop, ROW)
    return shop


@pytest.mark.parametrize("command", [("status",), ("health",), ("pause",), ("rate-limit", "1/m")])
def test_a_command_that_finds_an_older_table_names_the_command_to_run(
    run: Run, older: Connection[Cursor], lanes: Lanes, command: tuple[str, ...]
) -> None:
    done = run(*command)

    assert done.returncode == 1
    assert CURE in done.stdout + done.stderr
    assert rows(older, "SELECT set_why FROM aioworker_budget") == [("replica lags",)]


def test_workers_that_are_alive_are_healthy_though_their_table_waits_for_init(
    run: Run, older: Connection[Cursor]
) -> None:
    """Between new code and `init` those of the earlier version work on: nobody is to be woken."""
    execute(
        older,
        "INSERT INTO aioworker_worker (host, pid, task, version, session, state, reason, since,"
        f" seen) SELECT LEFT('{socket.gethostname()}', 100), 9, task, '0.0.1', 7, 'waiting',"
        " 'paused', SYSDATE(6), SYSDATE(6) FROM aioworker_budget",
    )

    done = run("health")

    assert (done.returncode, done.stderr) == (0, "")


async def test_a_worker_that_finds_an_older_table_takes_nothing_and_goes_on_after_init(
    start: Start, run: Run, older: Connection[Cursor], lanes: Lanes
) -> None:
    simple_addons(older, 1)
    run("publish", "1")
    worker = start("consume", "--rate-limit", "100/s")
    eventually(lambda: CURE in worker.log, "it names the command")
    assert await lanes.holds(QUEUES.urgent, 1)

    assert run("init").returncode == 0
    eventually(lambda: "paused" in worker.log, "it sees the pause of before")
    assert run("resume").returncode == 0

    eventually(lambda: current_versions(older) == {1: 10_001}, "it goes on")


def test_what_init_would_change_is_printed_and_not_done(
    run: Run, older: Connection[Cursor]
) -> None:
    shown = run("init", "--print")

    section = shown.stdout.partition("# MySQL: the tables that init changes, while workers run")[2]
    statements = section.partition("\n\n")[0].partition("\n")[2].split(";")
    assert [one.split()[:3] for one in statements if one.strip()] == [
        ["ALTER", "TABLE", "aioworker_budget"],
        ["ALTER", "TABLE", "aioworker_worker"],
        *[["CREATE", "TABLE", "IF"]] * 3,
    ]
    assert rows(older, "SHOW COLUMNS FROM aioworker_budget LIKE 'deaths'") == []


def test_a_table_that_init_would_not_change_is_not_printed_as_changed(
    run: Run, shop: Connection[Cursor]
) -> None:
    assert "ALTER" not in run("init", "--print").stdout


def test_init_prints_the_grants_that_a_worker_lacks(
    run: Run, shop: Connection[Cursor], lanes: Lanes, maria: servers.Maria
) -> None:
    """Its user had what it needed; a reader of the table needs no more than it has."""
    execute(
        shop,
        *(f"CREATE OR REPLACE USER {user}" for user in ("'o''neil'", "reader", "whole")),
        "GRANT SELECT, INSERT, UPDATE ON aioworker_worker TO 'o''neil'",
        "GRANT SELECT, INSERT ON aioworker_budget TO 'o''neil'",
        "GRANT SELECT ON aioworker_budget TO reader",
        "GRANT INSERT ON aioworker_worker TO whole",
        "GRANT ALL ON aioworker.* TO whole",
    )
    wanted = [
        "GRANT UPDATE ON `aioworker`.`aioworker_budget` TO 'o''neil'@'%';",
        "GRANT DELETE ON `aioworker`.`aioworker_worker` TO 'o''neil'@'%';",
        "GRANT SELECT, INSERT, UPDATE, DELETE ON `aioworker`.`aioworker_run` TO 'o''neil'@'%';",
        "GRANT SELECT, INSERT, UPDATE, DELETE ON `aioworker`.`aioworker_start` TO 'o''neil'@'%';",
        "GRANT SELECT, INSERT, DELETE ON `aioworker`.`aioworker_change` TO 'o''neil'@'%';",
    ]

    printed = run("init", "--print").stdout
    done = run("init").stdout
    execute(shop, *wanted)
    after = run("init").stdout

    execute(shop, "DROP USER 'o''neil', reader, whole")
    assert printed.partition("users lack that work already\n")[2].splitlines()[:6] == [*wanted, ""]
    assert [line for line in done.splitlines() if "lacking" in line] == [
        f"lacking: {grant}" for grant in wanted
    ]
    assert "lacking" not in after


@pytest.mark.parametrize("on", ["aioworker.*", "*.*"])
def test_init_prints_the_grants_that_a_worker_with_rights_on_all_tables_lacks(
    run: Run, shop: Connection[Cursor], lanes: Lanes, maria: servers.Maria, on: str
) -> None:
    """A DBA who grants no table by itself heard nothing of it, and the worker stood still."""
    execute(
        shop,
        *(f"CREATE OR REPLACE USER {user}" for user in ("most", "whole", "reader")),
        f"GRANT SELECT, INSERT, UPDATE ON {on} TO most",
        f"GRANT SELECT, INSERT, UPDATE, DELETE ON {on} TO whole",
        f"GRANT SELECT ON {on} TO reader",
    )
    wanted = [
        f"GRANT DELETE ON `aioworker`.`aioworker_{table}` TO 'most'@'%';"
        for table in ("worker", "run", "start", "change")
    ]

    try:
        printed = run("init", "--print").stdout
        done = run("init").stdout
        execute(shop, *wanted)
        after = run("init").stdout
    finally:
        execute(shop, "DROP USER most, whole, reader")

    assert printed.partition("users lack that work already\n")[2].splitlines()[:5] == [*wanted, ""]
    lacking = [line for line in done.splitlines() if "lacking" in line]
    assert lacking == [f"lacking: {grant}" for grant in wanted]
    assert "lacking" not in after


async def test_a_reload_whose_new_code_needs_init_keeps_the_old_code(
    start: Start, run: Run, shop: Connection[Cursor], tmp_path: Path
) -> None:
    """The old code works with the table that is there; the new one would stand still."""
    module = tmp_path / "upgraded.py"
    module.write_text("from aioworker import task\n\n@task\nasync def upgraded() -> None: ...\n")
    variables = {"PYTHONPATH": importable(tmp_path)}
    run("init", "--app", "upgraded", **variables)
    worker = start("consume", "--app", "upgraded", **variables)
    eventually(lambda: "nothing queued" in worker.log, "it waits for messages")
    module.write_text(NEWER)

    worker.process.send_signal(signal.SIGHUP)

    line = eventually(
        lambda: [line for line in worker.log.splitlines() if "old code goes on" in line], "it says"
    )
    assert "aioworker_budget at mysql://" in line[0]
    assert CURE.replace("init`", "init --app upgraded`") in line[0]
    assert worker.process.poll() is None

    execute(shop, "ALTER TABLE aioworker_budget ADD COLUMN newest INT NULL")
    worker.process.send_signal(signal.SIGHUP)
    eventually(lambda: worker.log.count("worker started") == 2, "the new code begins")
