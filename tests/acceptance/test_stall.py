"""A worker that stands still says so, turns red, and goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from aioworker import Producer
from aioworker.budget import tables
from support import servers
from tests.conftest import (
    TASK,
    Lanes,
    Run,
    Worker,
    current_versions,
    eventually,
    execute,
    importable,
    make_database,
    rows,
    simple_addons,
)
from tests.place import chunk

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

Start = Callable[..., Worker]
STATE = "SELECT state FROM aioworker_worker"
KIND = "SELECT state, kind FROM aioworker_worker"


async def test_a_turn_that_nobody_gives_back_is_a_stall(
    start: Start,
    run: Run,
    shop: Connection[Cursor],
    lanes: Lanes,
    pair: servers.Servers,
    broker: servers.Broker,
) -> None:
    """Somebody's session holds the lock: messages wait, the budget is free, nothing starts."""
    simple_addons(shop, 1)
    lock = tables.lock_name(make_database(pair).address.database, TASK)
    execute(shop, f"SELECT GET_LOCK('{lock}', 0)")
    worker = start("consume", "--rate-limit", "100/s")
    eventually(lambda: rows(shop, KIND) == [("waiting", "empty")], "it waits")
    assert run("health").returncode == 0

    await lanes.send(json.dumps([[[1]], {}, None]).encode())

    eventually(lambda: rows(shop, STATE) == [("stalled",)], "it says that it stands still")
    sick = run("health")
    assert (sick.returncode, sick.stdout) == (1, "")
    assert re.fullmatch(r"aioworker: \S+:\d+ stalled: .+\n", sick.stderr)
    waits = json.loads(run("status", "--json").stdout)["waits"]
    assert waits.startswith(("stalled: messages wait", "turn: held by session"))
    assert rows(shop, STATE) == [("stalled",)]

    execute(shop, f"SELECT RELEASE_LOCK('{lock}')")

    eventually(lambda: current_versions(shop) == {1: 10_001}, "it goes on")
    eventually(lambda: rows(shop, STATE) == [("waiting",)], "it waits for more")
    assert run("health").returncode == 0
    assert "Traceback" not in worker.log


async def test_a_worker_at_work_is_no_stall_for_the_others(
    start: Start, shop: Connection[Cursor], lanes: Lanes
) -> None:
    """A run that outlasts ten seconds at a rate of many a second."""
    simple_addons(shop, 2)
    execute(
        shop,
        "CREATE TRIGGER slow BEFORE UPDATE ON addons FOR EACH ROW"
        " SET NEW.modified = IF(SLEEP(12), NEW.modified, NEW.modified)",
        "CREATE TABLE stalls (state VARCHAR(20))",
        "CREATE TRIGGER told AFTER UPDATE ON aioworker_worker FOR EACH ROW"
        " INSERT INTO stalls SELECT NEW.state FROM DUAL WHERE NEW.state = 'stalled'",
    )
    for addon in (1, 2):
        await lanes.send(json.dumps([[[addon]], {}, None]).encode())

    for _ in range(2):
        start("consume", "--rate-limit", "100/s")

    eventually(lambda: current_versions(shop) == {1: 10_001, 2: 10_002}, "both are done")
    assert rows(shop, "SELECT * FROM stalls") == []


STUCK = """
    import os, time
    from aioworker import task

    @task(timeout=1)
    def stuck() -> None:
        while not os.path.exists("go on"):
            time.sleep(0.1)
"""


async def test_threads_that_do_not_return_are_a_stall(
    start: Start, run: Run, pair: servers.Servers, shop: Connection[Cursor], tmp_path: Path
) -> None:
    """Nothing can end them; it is said, until they do."""
    (tmp_path / "hanging.py").write_text(textwrap.dedent(STUCK))
    assert run("init", "--app", "hanging").returncode == 0
    async with Producer(pair.amqp_url, timeout=10) as producer:
        for _ in range(20):
            await producer.publish("stuck")
    worker = start("consume", "--app", "hanging", PYTHONPATH=importable(tmp_path))

    eventually(lambda: rows(shop, KIND) == [("stalled", "run_hangs")], "it says it stands still")

    sick = run("health", "stuck", "--app", "hanging")
    assert (sick.returncode, sick.stdout) == (1, "")
    assert "stalled: 17 runs without an end, though the time is up" in sick.stderr
    assert worker.log.count("a thread cannot be ended: waiting for it to return task=stuck") == 17
    (tmp_path / "0" / "go on").touch()
    eventually(lambda: rows(shop, KIND) == [("waiting", "empty")], "it goes on")
    assert run("health", "stuck", "--app", "hanging").returncode == 0


REFUSING = """
    from aioworker import task

    @task(rate_limit="100/s", max_retries=0)
    def visit(shop: int) -> None:
        if shop < 3:
            raise KeyError(shop)
"""


async def test_a_task_that_fails_as_a_whole_is_red_while_its_lanes_are_empty(
    start: Start, run: Run, pair: servers.Servers, shop: Connection[Cursor], tmp_path: Path
) -> None:
    """Its last message may be gone: that nothing is queued does not make it well."""
    (tmp_path / "refusing.py").write_text(textwrap.dedent(REFUSING))
    assert run("init", "--app", "refusing").returncode == 0
    async with Producer(pair.amqp_url, timeout=10) as producer:
        for number in range(3):
            await producer.publish("visit", number)
        start("consume", "--app", "refusing", PYTHONPATH=importable(tmp_path))

        eventually(lambda: rows(shop, KIND) == [("stalled", "breaker")], "the third one opens it")

        status = json.loads(run("status", "visit", "--app", "refusing", "--json").stdout)
        assert status["queued"] == {"urgent": 0, "bulk": 0, "retry": 0, "dead": 3}
        sick = run("health", "visit", "--app", "refusing")
        assert sick.returncode == 1
        assert "breaker open: 3 messages in a row failed for good, the last: KeyError" in (
            sick.stderr
        )
        await producer.publish("visit", 3)
        eventually(lambda: rows(shop, KIND) == [("waiting", "empty")], "a success closes it")
        assert run("health", "visit", "--app", "refusing").returncode == 0


async def test_an_open_breaker_is_red_while_its_next_test_waits_for_the_budget(
    start: Start, run: Run, pair: servers.Servers, shop: Connection[Cursor], tmp_path: Path
) -> None:
    """At two a minute that is most of the time."""
    (tmp_path / "refusing.py").write_text(textwrap.dedent(REFUSING))
    assert run("init", "--app", "refusing").returncode == 0
    execute(
        shop,
        "CREATE TABLE waits (state VARCHAR(20), reason VARCHAR(500))",
        "CREATE TRIGGER noted AFTER UPDATE ON aioworker_worker FOR EACH ROW"
        " INSERT INTO waits VALUES (NEW.state, NEW.reason)",
    )
    async with Producer(pair.amqp_url, timeout=10) as producer:
        for _ in range(5):
            await producer.publish("visit", 0)

    start(
        *("consume", "--app", "refusing", "--rate-limit", "20/m"),
        PYTHONPATH=importable(tmp_path),
    )

    waits = "SELECT DISTINCT state FROM waits WHERE reason LIKE '%budget: next start%'"
    opened = f"{waits} AND reason LIKE 'breaker open: 3 messages%'"
    eventually(lambda: rows(shop, opened) == [("stalled",)], "the next test waits")
    assert rows(shop, f"{waits} AND reason LIKE 'budget%'") == [("waiting",)]


def test_health_is_this_machines_workers(run: Run, start: Start, shop: Connection[Cursor]) -> None:
    """None at all, none for 90 s, one elsewhere; then one here."""
    none = run("health")
    assert (none.returncode, none.stdout) == (1, "")
    assert re.fullmatch(rf"aioworker: no worker of {TASK} is alive on \S+\n", none.stderr)
    columns = "(id, host, pid, task, version, session, state, reason, since, seen)"
    execute(
        shop,
        f"INSERT INTO aioworker_worker {columns} VALUES"
        f" ('a', 'elsewhere', 1, '{TASK}', '1', 1, 'waiting', '', SYSDATE(6), SYSDATE(6)),"
        f" ('b', '{os.uname().nodename}', 1, '{TASK}', '1', 1, 'waiting', '', SYSDATE(6),"
        " SYSDATE(6) - INTERVAL 100 SECOND)",
    )
    old = run("health")
    assert (old.returncode, old.stdout) == (1, "")
    assert re.search(r"is alive on \S+; the last was seen 1 min 4\d s ago\n$", old.stderr)

    worker = start("consume")

    here = f"SELECT 1 FROM aioworker_worker WHERE pid = {worker.process.pid}"
    eventually(lambda: rows(shop, here), "it waits")
    well = run("health")
    assert (well.returncode, well.stderr) == (0, "")
    assert re.match(rf"\S+:{worker.process.pid} waiting: ", well.stdout)
    worker.process.send_signal(signal.SIGTERM)
    assert worker.process.wait(30) == 0


@pytest.mark.parametrize(
    ("variables", "status", "line"),
    [
        ({"AIOWORKER_BUDGET": "worker"}, 2, "AIOWORKER_BUDGET=worker: workers keep no row"),
        ({"AIOWORKER_MYSQL_URL": "mysql://root@127.0.0.1:1/a"}, 1, "cannot use MySQL at mysql://"),
    ],
    ids=["scope", "database"],
)
def test_a_health_that_cannot_be_told_is_one_line(
    run: Run, variables: dict[str, str], status: int, line: str
) -> None:
    done = run("health", **variables)

    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (status, "", 1)
    assert done.stderr.startswith(f"aioworker: {line}")


async def test_a_row_that_another_server_writes_too_is_a_stall(
    start: Start, run: Run, shop: Connection[Cursor], lanes: Lanes
) -> None:
    """Two primaries: neither the turn nor the clock holds on both, so nothing may start."""
    simple_addons(shop, 1)
    start("consume", "--rate-limit", "1/s")
    eventually(lambda: rows(shop, STATE) == [("waiting",)], "it waits")

    for _ in range(2):  # what replicates from there
        execute(shop, "UPDATE aioworker_budget SET server = 'db2:3306:2'")
        eventually(
            lambda: (
                rows(shop, f"SELECT server = {tables.SERVER} FROM aioworker_budget") == [(1,)]
                or rows(shop, STATE) == [("stalled",)]
            ),
            "it looks at the row",
        )

    eventually(lambda: rows(shop, KIND) == [("stalled", "two_servers")], "it says so")
    await lanes.send(chunk(1))
    health, status = run("health"), run("status")
    # Which words depend on the moment of the second write; `tests/unit/test_other_server.py` knows.
    [(words,)] = rows(shop, "SELECT reason FROM aioworker_worker")
    assert "servers" in words
    assert (health.returncode, words in health.stderr) == (1, True)
    assert f"waits      {words}" in status.stdout
    assert current_versions(shop) == {1: None}
