"""`aioworker status` in every situation that an operator looks at it for."""

from __future__ import annotations

import json
import re
import signal
import socket
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import TypeAdapter

from aioworker.budget import tables
from aioworker.cli.status import lines
from aioworker.commands.status import Status, look
from aioworker.mysql.database import Database
from aioworker.rabbitmq.message import PUBLISHED, milliseconds
from aioworker.settings import Settings
from support import servers
from tests.conftest import (
    ONE_A_START,
    QUEUES,
    TASK,
    Lanes,
    Run,
    Worker,
    database_name,
    eventually,
    execute,
    rows,
    simple_addons,
    summary,
)

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

Start = Callable[..., Worker]
SCHEMA = Path(__file__).parents[2] / "docs/status.schema.json"
NOWHERE = "amqp://guest@127.0.0.1:1/"
NO_DATABASE = "mysql://root@127.0.0.1:1/aioworker"


@pytest.fixture
def status(run: Run) -> Callable[..., dict[str, Any]]:
    """Read the status as a program does, and hold it against the schema."""

    def ask(**variables: str) -> dict[str, Any]:
        done = run("status", "--json", **variables)
        assert done.stderr == ""
        found: dict[str, Any] = json.loads(done.stdout)
        TypeAdapter(Status).validate_json(done.stdout)
        wanted = json.loads(SCHEMA.read_text())
        assert list(found) == list(wanted["properties"])
        complete = found["broker_error"] is found["database_error"] is None
        assert done.returncode == (0 if complete else 1)
        return found

    return ask


def test_an_empty_queue(run: Run, lanes: Lanes, shop: Connection[Cursor]) -> None:
    done = run("status")

    assert (done.returncode, done.stdout) == (
        0,
        "task       update_current_version\n"
        "waits      nothing queued\n"
        "queued     urgent 0, bulk 0, retry 0, dead 0\n"
        "rate       2/m of all workers, the task's own\n"
        "last start never\n"
        "next start at once\n"
        "turn       free\n"
        "broker     reachable\n"
        "database   reachable\n",
    )


def test_a_backlog_of_a_whole_sweep(
    run: Run, status: Any, start: Start, lanes: Lanes, shop: Connection[Cursor]
) -> None:
    """530 chunks at 2/m, each a start: half past four hours, nearly."""
    simple_addons(shop, 531)
    assert run("publish-all", "--chunk-size", "1").returncode == 0

    found = status()
    assert found["queued"] == {"urgent": 0, "bulk": 531, "retry": 0, "dead": 0}
    assert found["waits"] == "no worker is running: start one with `aioworker consume`"
    assert found["waits_kind"] == "no_worker"

    start("consume", AIOWORKER_GATHER_SECONDS="0")
    eventually(lambda: rows(shop, "SELECT 1 FROM addons WHERE current_version > 0"), "one start")
    eventually(lambda: status()["waits"].startswith("budget: next start in "), "it waits")
    eventually(lambda: status()["workers"][0]["state"] == "waiting", "its row says so")
    found = status()
    assert (found["queued"]["bulk"], found["backlog_seconds"]) == (530, 15_900)
    assert 0 < found["budget"]["next_start_seconds"] <= 30
    assert found["budget"]["starts"] == 1
    [worker] = found["workers"]
    assert (worker["host"], worker["state"], worker["rate"]) == (
        socket.gethostname(),
        "waiting",
        "2/m",
    )
    assert worker["reason"].startswith("budget: next start at ")
    assert worker["kind"] == found["waits_kind"] == "budget"
    text = run("status").stdout
    assert "done in    4 h 25 min at most, at this rate\n" in text
    assert f"worker     {worker['host']}:{worker['pid']} 0.1.0, rate 2/m, waiting since" in text


def test_a_paused_task(run: Run, status: Any, lanes: Lanes, shop: Connection[Cursor]) -> None:
    run("pause", "--reason", "replica lags")

    found = status()

    assert found["waits"].startswith(f"paused by {found['budget']['paused_by']} since ")
    assert found["waits"].endswith(": replica lags")
    assert found["waits_kind"] == "paused"
    assert found["budget"]["paused"] is True
    assert found["backlog_seconds"] is None


def test_a_broker_that_is_down(
    status: Any, start: Start, lanes: Lanes, shop: Connection[Cursor]
) -> None:
    """Since when, the workers know; what the database tells is shown all the same."""
    found = status(AIOWORKER_AMQP_URL=NOWHERE)
    assert found["waits"].startswith("broker unreachable: cannot connect to RabbitMQ at amqp://")
    assert found["waits_kind"] == "broker_unreachable"
    assert (found["queued"], found["budget"]["rate"]) == (None, "2/m")

    start("consume", AIOWORKER_AMQP_URL=NOWHERE)

    def since() -> bool:
        waits = status(AIOWORKER_AMQP_URL=NOWHERE)["waits"]
        return str(waits).startswith("broker unreachable since ")

    eventually(since, "the worker's own word")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("empty", "nothing queued"), ("budget", "budget: next start at 02:10:00 UTC")],
)
def test_no_worker_tells_that_nothing_is_queued_while_the_broker_is_down(
    run: Run, status: Any, lanes: Lanes, shop: Connection[Cursor], kind: str, reason: str
) -> None:
    """It is what the worker saw last: a sweep may have been published since."""
    execute(
        shop,
        "INSERT INTO aioworker_worker SELECT 'id', 'here', 9, task, '1', NULL, 0, 'waiting',"
        f" '{reason}', SYSDATE(6), SYSDATE(6), '{kind}', NULL, NULL FROM aioworker_budget",
    )
    unsure = "RabbitMQ cannot be asked whether messages wait"
    shown, shown_kind = (unsure, "unknown") if kind == "empty" else (reason, kind)

    [worker] = status()["workers"]
    assert (worker["kind"], worker["reason"]) == (kind, reason)
    [worker] = status(AIOWORKER_AMQP_URL=NOWHERE)["workers"]
    assert (worker["kind"], worker["reason"]) == (shown_kind, shown)
    text = run("status", AIOWORKER_AMQP_URL=NOWHERE).stdout
    assert f" UTC: {shown}\n" in text
    assert "nothing queued" not in text


def test_a_database_that_is_down(status: Any, lanes: Lanes) -> None:
    found = status(AIOWORKER_MYSQL_URL=NO_DATABASE)

    assert found["waits"].startswith("database unreachable: cannot use MySQL at mysql://root@")
    assert found["waits_kind"] == "database_unreachable"
    assert found["queued"] == {"urgent": 0, "bulk": 0, "retry": 0, "dead": 0}
    assert (found["budget"], found["workers"]) == (None, None)


def test_no_table(
    status: Any, pair: servers.Servers, lanes: Lanes, shop: Connection[Cursor]
) -> None:
    execute(shop, "DROP TABLE aioworker_budget")

    found = status()

    assert found["waits"].startswith(
        f"Table '{database_name(pair)}.aioworker_budget' doesn't exist (1146)"
    )
    assert found["waits"].endswith("run `aioworker init`, or set AIOWORKER_BUDGET=worker")
    assert found["waits_kind"] == "database_refuses"


def test_no_queue(status: Any, broker: servers.Broker, shop: Connection[Cursor]) -> None:
    broker.control("add_vhost", "bare")
    broker.control("set_permissions", "-p", "bare", "guest", ".*", ".*", ".*")
    try:
        found = status(AIOWORKER_AMQP_URL=broker.url("bare"))
    finally:
        broker.control("delete_vhost", "bare")

    assert found["queued"] == {"urgent": None, "bulk": None, "retry": None, "dead": None}
    assert found["waits"] == (
        "queue aioworker.update_current_version.urgent does not exist: run `aioworker init`;"
        " if update_current_version is retired, see docs/operations.md, Retire a task"
    )
    assert found["waits_kind"] == "broker_refuses"


def test_a_budget_of_each_worker_needs_no_database(run: Run, status: Any, lanes: Lanes) -> None:
    found = status(AIOWORKER_BUDGET="worker", AIOWORKER_MYSQL_URL=NO_DATABASE)

    assert (found["waits"], found["workers"]) == ("nothing queued", None)
    assert (found["budget"]["scope"], found["budget"]["rate"]) == ("worker", "2/m")


async def test_a_run_is_told_though_its_worker_has_not_said_so(
    status: Any, lanes: Lanes, shop: Connection[Cursor], pair: servers.Servers
) -> None:
    """Its row is written once a second; the charge tells of each run, and its first write."""
    await lanes.send(b"[[[1]], {}, null]")
    lock = tables.lock_name(database_name(pair), TASK)
    execute(
        shop,
        f"SELECT GET_LOCK('{lock}', 1)",
        "INSERT INTO aioworker_worker (id, host, pid, task, version, rate, session, state, reason,"
        f" since, seen) VALUES ('id', 'web1', 77, '{TASK}', '1', '1/h', CONNECTION_ID(), 'waiting',"
        " 'budget: next start at 02:10:00 UTC', SYSDATE(6), SYSDATE(6))",
        "UPDATE aioworker_budget SET holder = 'web1:77', running = '[\"one\"]', gap_us = 3600e6,"
        " last_charge = SYSDATE(6) - INTERVAL 1 SECOND, last_start = last_charge, starts = 2,"
        " last_write = SYSDATE(6) - INTERVAL 40 MINUTE",
    )

    found = status()
    due = f"running: {TASK}; its first write is due in "
    assert found["waits"].removeprefix(due) in ("20 min", "19 min 59 s", "19 min 58 s")
    # What is left follows from the charge, not from the first write.
    assert 3590 < found["budget"]["next_start_seconds"] <= 3600

    execute(shop, "UPDATE aioworker_budget SET last_write = SYSDATE(6), last_start = last_write")
    assert status()["waits"] == f"running: {TASK}"


async def test_a_worker_that_waits_for_somebody_s_lock_says_so(
    start: Start, status: Any, lanes: Lanes, shop: Connection[Cursor], pair: servers.Servers
) -> None:
    """An ALTER, or a backup's LOCK TABLES: the database is there, and no message is taken."""
    simple_addons(shop, 1)
    with servers.connect(pair.mysql_url) as theirs:
        execute(theirs, "LOCK TABLES addons WRITE")
        worker = start("consume", "--rate-limit", "100/s")
        await lanes.send(b"[[[1]], {}, null]")
        words = "(1205); somebody else holds a lock that this waits for"
        eventually(lambda: words in worker.log, "the worker says so")

        found = status()
        assert found["waits"].endswith(words)
        assert found["waits_kind"] == "contention"

    eventually(lambda: rows(shop, "SELECT current_version FROM addons") == [(10_001,)], "written")
    assert "unreachable" not in worker.log
    assert "attempt=1" in worker.log


async def test_the_oldest_message_is_told_by_the_last_one_that_was_taken(
    start: Start, run: Run, status: Any, lanes: Lanes, shop: Connection[Cursor]
) -> None:
    """What waits is not touched for that."""
    simple_addons(shop, 3)
    published = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=3)
    for n in range(3):
        at = published + timedelta(hours=n)
        headers = {"task": TASK, "id": str(n), PUBLISHED: milliseconds(at)}
        await lanes.send(f"[[[{n + 1}]], {{}}, null]".encode(), headers=headers)
    nobody = {"urgent_seconds": None, "bulk_seconds": None, "came_back_seconds": None}
    assert status()["oldest"] == nobody

    start("consume", "--rate-limit", "1/h", **ONE_A_START)
    eventually(lambda: rows(shop, "SELECT 1 FROM addons WHERE current_version > 0"), "one start")
    found = eventually(lambda: (told := status())["oldest"]["bulk_seconds"] and told, "its row")

    oldest = datetime.fromisoformat(found["at"]) - timedelta(
        seconds=found["oldest"]["bulk_seconds"]
    )
    assert oldest == published
    assert (found["queued"]["bulk"], found["held"]) == (2, 0)
    assert found["oldest"] == nobody | {"bulk_seconds": found["oldest"]["bulk_seconds"]}
    assert re.search(r"\noldest     at most: bulk 3 h( 1 min)?\n", run("status").stdout)
    assert not (await lanes.take(QUEUES.bulk)).redelivered


async def test_what_a_worker_holds_is_counted_besides_what_is_queued(
    start: Start, run: Run, status: Any, lanes: Lanes, shop: Connection[Cursor]
) -> None:
    """RabbitMQ calls it no more ready: it looked as if nothing were queued."""
    simple_addons(shop, 3)
    run("publish", "1")
    start("consume", "--rate-limit", "2/m", AIOWORKER_GATHER_SECONDS="20")
    eventually(lambda: rows(shop, "SELECT 1 FROM addons WHERE current_version > 0"), "one start")
    run("publish", "2")
    run("publish", "3")

    found = eventually(lambda: (told := status())["held"] == 2 and told, "it gathers")

    assert found["queued"]["urgent"] == 0
    assert found["backlog_seconds"] == 30, "they are one start"
    assert found["waits_kind"] == "gathering"
    assert found["workers"][0]["waiting"]["held"] == 2
    assert "dead 0; 2 held by workers\n" in run("status").stdout


@pytest.mark.parametrize(("since_write", "due"), [(20, False), (31, True)])
def test_a_worker_that_waits_for_its_first_write_is_believed(
    run: Run,
    lanes: Lanes,
    shop: Connection[Cursor],
    since_write: int,
    due: bool,
) -> None:
    """A start was said to be due, and the worker, which was right to wait, to be held up."""
    simple_addons(shop, 1)
    run("publish", "1")
    waits = "budget: next start at 02:10:00 UTC"
    execute(
        shop,
        "INSERT INTO aioworker_worker SELECT 'id', 'web1', 77, task, '1', '2/m', 0, 'waiting',"
        f" '{waits}', SYSDATE(6), SYSDATE(6), 'budget', NULL, NULL FROM aioworker_budget",
        "UPDATE aioworker_budget SET starts = 2, holder = 'web1:76',"
        " last_charge = SYSDATE(6) - INTERVAL 40 SECOND,"
        f" last_write = SYSDATE(6) - INTERVAL {since_write} SECOND, last_start = last_write",
    )

    shown = dict(line.split(maxsplit=1) for line in run("status").stdout.splitlines())

    assert shown["waits"].startswith("a start is due and not begun; web1:77" if due else waits)
    next_start = run("status").stdout.partition("\nnext start ")[2].splitlines()[0]
    assert next_start == ("at once" if due else "as the worker tells")


def test_a_turn_names_its_holder(
    run: Run, status: Any, lanes: Lanes, shop: Connection[Cursor], database: Database
) -> None:
    """Frozen hosts keep it until their session times out: an operator wants to know whose."""
    simple_addons(shop, 1)
    run("publish", "1")
    lock = tables.lock_name(database.address.database, TASK)
    execute(
        shop,
        f"DO GET_LOCK('{lock}', 0)",
        "INSERT INTO aioworker_worker SELECT 'id', 'frozen', 9, task, '1', NULL, CONNECTION_ID(),"
        " 'waiting', 'budget', SYSDATE(6), SYSDATE(6), 'budget', NULL, NULL FROM aioworker_budget",
    )

    found = status()

    assert found["budget"]["turn"] == "frozen:9"
    assert (found["waits"], found["waits_kind"]) == ("turn: held by frozen:9", "turn")


def test_a_worker_that_has_not_seen_the_queue_yet_tells_nothing_of_it(
    run: Run, status: Any, lanes: Lanes, shop: Connection[Cursor]
) -> None:
    """Its row may be old: while it waits for a lock, or cannot write it, messages are published."""
    run("publish", "1")
    execute(
        shop,
        "INSERT INTO aioworker_worker SELECT 'id', 'here', 9, task, '1', NULL, 0, 'waiting',"
        " 'nothing queued', SYSDATE(6), SYSDATE(6) - INTERVAL 20 SECOND, 'empty', NULL, NULL"
        " FROM aioworker_budget",
    )

    assert re.fullmatch(
        r"a start is due and not begun; here:9 was last seen \d+ s ago", status()["waits"]
    )


@pytest.mark.parametrize("minutes", [20, -20, 0])
async def test_a_clock_that_is_not_the_databases_is_shown(
    pair: servers.Servers,
    lanes: Lanes,
    shop: object,
    monkeypatch: pytest.MonkeyPatch,
    minutes: int,
) -> None:
    """Whoever reads the times of the database by a wrong clock of his own should know."""
    for name, value in pair.environment.items():
        monkeypatch.setenv(name, value)
    ahead = timedelta(minutes=minutes)
    monkeypatch.setattr("aioworker.commands.status.own_time", lambda: datetime.now(UTC) + ahead)

    [found] = await look(Settings.load(), [TASK])

    assert abs(found.at - datetime.now(UTC)) < timedelta(minutes=5)
    warnings = [words for name, words in lines(found) if name == "warning"]
    assert len(warnings) == (minutes != 0)
    way = "ahead of" if minutes > 0 else "behind"
    for words in warnings:
        assert re.fullmatch(
            rf"this machine's clock is (19|20) min.* {way} the database's, which counts", words
        )


def test_starts_without_a_limit_are_said_to_be_uncounted(
    run: Run, lanes: Lanes, shop: Connection[Cursor]
) -> None:
    """They were said to have been never, after any number of them."""
    simple_addons(shop, 1)
    execute(shop, "UPDATE aioworker_budget SET gap_us = 0")
    run("publish", "1")
    assert run("consume", "--burst").stdout == summary(1)

    assert "\nlast start not counted without a rate limit\n" in run("status").stdout


def test_watching_shows_it_again_until_a_signal(start: Start, lanes: Lanes, shop: object) -> None:
    watcher = start("status", "--json", "--watch")
    eventually(lambda: watcher.log.count("\n") >= 2, "it shows it twice")

    watcher.process.send_signal(signal.SIGINT)

    assert watcher.process.wait(30) == 0
    assert all(json.loads(line)["waits"] for line in watcher.log.splitlines())
