"""A copy of a database forgets what the original's workers and operators left in it."""

from __future__ import annotations

import os
import re
import signal
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from aioworker.budget import fresh, schema, tables
from aioworker.errors import DatabaseError
from tests.conftest import (
    EARLIER,
    QUEUES,
    TASK,
    Lanes,
    Run,
    Worker,
    database_name,
    eventually,
    execute,
    make_tables,
    rows,
    simple_addons,
    summary,
)

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

    from aioworker.mysql.database import Database
    from support import servers

Start = Callable[..., Worker]
BUDGET = "aioworker_budget"
KEYS = (TASK, "others.task", "budget:writes")  # the second one is another app's
FORGOT = "forgot 3 pauses, 3 rates, 5 run notes, 2 starts, 1 change, 1 worker"
NOTHING = "forgot 0 pauses, 0 rates, 0 run notes, 0 starts, 0 changes, 0 workers"
WORKER = (
    "INSERT INTO aioworker_worker (host, pid, task, version, session, state, reason, since, seen)"
    " VALUES ('web1', 811, '{0}', '0.1.0', {1}, 'waiting', 'budget', SYSDATE(6), SYSDATE(6))"
)
LEFT = (  # in the other tables
    "INSERT INTO aioworker_run (task, message, together, most, deaths, worker, since)"
    f" VALUES ('{TASK}', 'a', 1, NULL, 0, 'web1:811', SYSDATE(6)),"
    " ('others.task', 'b', 1, 1, 4, NULL, SYSDATE(6))",
    "INSERT INTO aioworker_start (task, number, charged, worker, messages)"
    f" VALUES ('{TASK}', 6, SYSDATE(6), 'web1:811', 1), ('{TASK}', 7, SYSDATE(6), 'web1:811', 1)",
    "INSERT INTO aioworker_change (task, changed, who, what)"
    f" VALUES ('{TASK}', SYSDATE(6), 'dba', 'paused')",
    WORKER.format(TASK, 0),
)


def fill(shop: Connection[Cursor]) -> None:
    """Have every column of three rows say something that no new row says."""
    values = [f"{name} = {_value(kind)}" for name, kind in schema.columns(BUDGET).items()]
    for key in KEYS[1:]:
        execute(shop, tables.FIRST_ROW % {"task": f"'{key}'"})
    execute(shop, f"UPDATE {BUDGET} SET {', '.join(values[1:])}", *LEFT)


def _value(kind: str) -> str:
    if kind.startswith("DATETIME"):
        return "'2027-11-24 02:10:00'"
    return "7" if kind.startswith(("BIGINT", "BOOLEAN")) else "'[\"x\"]'"


def budget(shop: Connection[Cursor]) -> dict[str, tuple[object, ...]]:
    """Return the rows of the budget by their keys."""
    names = ", ".join(schema.columns(BUDGET))
    return {key: tuple(rest) for key, *rest in rows(shop, f"SELECT {names} FROM {BUDGET}")}


def new_row(shop: Connection[Cursor]) -> tuple[object, ...]:
    """Return what a row says that `init` has just made."""
    execute(shop, tables.FIRST_ROW % {"task": "'new'"})
    found = budget(shop)["new"]
    execute(shop, f"DELETE FROM {BUDGET} WHERE task = 'new'")
    return found


def others(shop: Connection[Cursor]) -> list[int]:
    """Return how many rows each of the other tables has."""
    return [rows(shop, f"SELECT COUNT(*) FROM {name}")[0][0] for name in schema.NAMES[1:]]


def everything(shop: Connection[Cursor]) -> list[object]:
    """Return all that is in the tables, but for when a worker was seen."""
    found: list[object] = [budget(shop)]
    for name in schema.NAMES[1:]:
        columns = [one for one in schema.columns(name) if one not in ("seen", "since", "reason")]
        found.append(sorted(rows(shop, f"SELECT {', '.join(columns)} FROM {name}"), key=repr))
    return found


async def test_a_copy_starts_as_if_it_never_had(
    run: Run, shop: Connection[Cursor], lanes: Lanes
) -> None:
    """Production's pause held staging, and its last start kept the first one there waiting.

    Its workers were seen a moment ago, but they write another server's name.
    """
    simple_addons(shop, 1)
    run("publish", "1")
    fill(shop)
    new = new_row(shop)
    for row in budget(shop).values():
        assert all(there != wanted for there, wanted in zip(row, new, strict=True))

    done = run("init", "--fresh")
    again = run("init", "--fresh")

    assert (done.returncode, FORGOT in done.stdout.splitlines()) == (0, True), done
    assert budget(shop) == dict.fromkeys(KEYS, new)
    assert others(shop) == [0, 0, 0, 0]
    assert NOTHING in again.stdout.splitlines()
    assert await lanes.holds(QUEUES.urgent, 1)  # no queue was touched
    assert run("consume", "--burst", "--rate-limit", "1/h").stdout == summary(1)


async def test_where_a_worker_is_alive_nothing_is_forgotten(
    run: Run, start: Start, shop: Connection[Cursor], lanes: Lanes
) -> None:
    """Somebody meant staging, and was in production's shell."""
    execute(shop, f"UPDATE {BUDGET} SET paused = TRUE, gap_us = 1", *LEFT[:-1])
    worker = start("consume")
    eventually(lambda: "paused" in worker.log, "it is there")
    before = everything(shop)

    refused = run("init", "--fresh")
    after = everything(shop)
    worker.process.send_signal(signal.SIGTERM)
    worker.process.wait(30)
    done = run("init", "--fresh")

    name = f"{socket.gethostname()}:{worker.process.pid}"
    assert (refused.returncode, refused.stdout, after) == (1, "", before)
    assert re.fullmatch(
        rf"aioworker: expected no worker alive at \S+, got: {name} of {TASK}, seen \d+ s ago;"
        r" nothing was changed: end it, then run `aioworker init --fresh` again; one that was"
        r" killed counts until [-0-9]{10} [:0-9]{8} UTC\n",
        refused.stderr,
    )
    assert (done.returncode, "forgot 1 pause, 1 rate, 2 run notes" in done.stdout) == (0, True)


@pytest.mark.parametrize("server", [tables.SERVER, "'db9:3306:9'"], ids=["this", "another"])
@pytest.mark.parametrize("connected", [True, False])
@pytest.mark.parametrize("age", [80, 100])
def test_a_worker_counts_if_it_was_seen_lately_and_here(
    run: Run, shop: Connection[Cursor], server: str, connected: bool, age: int
) -> None:
    """Whose session is connected to this database is here, whoever wrote its task's row last."""
    session = "CONNECTION_ID()" if connected else "0"
    execute(
        shop,
        f"UPDATE {BUDGET} SET server = {server}, paused = TRUE",
        WORKER.format(TASK, session),
        f"UPDATE aioworker_worker SET seen = SYSDATE(6) - INTERVAL {age} SECOND",
    )
    counts = age < tables.ALIVE_SECONDS and (connected or server == tables.SERVER)

    done = run("init", "--fresh")

    assert (done.returncode, "got: web1:811 of" in done.stderr) == (counts, counts)
    assert rows(shop, f"SELECT paused FROM {BUDGET}") == [(int(counts),)]


async def test_the_number_of_the_commands_own_session_makes_nobody_alive(
    run: Run, shop: Connection[Cursor], lanes: Lanes
) -> None:
    """Two servers that were started a moment ago have given the same numbers."""
    execute(shop, f"UPDATE {BUDGET} SET server = 'db9:3306:9'")
    [[ours]] = rows(shop, "SELECT CONNECTION_ID()")
    for more in range(1, 50):
        execute(shop, WORKER.replace("811", str(more)).format(TASK, ours + more))

    done = run("init", "--fresh")

    assert (done.returncode, "49 workers" in done.stdout) == (0, True), done


def test_a_worker_whose_task_has_no_row_counts(run: Run, shop: Connection[Cursor]) -> None:
    """It waits for `init`, here or where the copy comes from: nobody can tell."""
    execute(shop, f"UPDATE {BUDGET} SET paused = TRUE", WORKER.format("others.task", 0))

    done = run("init", "--fresh")

    assert (done.returncode, "got: web1:811 of others.task, seen" in done.stderr) == (1, True)


@pytest.mark.parametrize("key", KEYS)
def test_a_turn_that_is_held_keeps_everything(
    run: Run, shop: Connection[Cursor], pair: servers.Servers, key: str
) -> None:
    """A session that outlives its worker writes still, also for a task that is not the code's."""
    fill(shop)
    before = everything(shop)
    lock = tables.lock_name(database_name(pair), key)
    [[_taken, session]] = rows(shop, "SELECT GET_LOCK(%s, 0), CONNECTION_ID()", lock)

    done = run("init", "--fresh")
    rows(shop, "SELECT RELEASE_LOCK(%s)", lock)

    assert (done.returncode, done.stdout, everything(shop)) == (1, "", before)
    assert f"got: session {session} in the turn of {key}; nothing was changed" in done.stderr
    assert "killed" not in done.stderr


async def test_a_worker_that_came_since_the_first_look_keeps_everything(
    shop: Connection[Cursor], database: Database
) -> None:
    """Between that and the end of `init` there is time for tables and queues to be made."""
    fill(shop)
    await fresh.refuse_workers(database)
    execute(shop, f"UPDATE {BUDGET} SET server = {tables.SERVER}")
    before = everything(shop)

    with pytest.raises(DatabaseError, match="got: web1:811 of"):
        await fresh.forget(database, [TASK, "new"])

    assert everything(shop) == before


def test_all_is_forgotten_or_nothing(run: Run, shop: Connection[Cursor]) -> None:
    """It is one transaction: a row that somebody holds keeps those that could be deleted, too."""
    fill(shop)
    before = everything(shop)
    with shop.cursor() as cursor:
        cursor.execute("SELECT id FROM aioworker_worker FOR UPDATE")  # deleted last

        done = run("init", "--fresh")

    shop.rollback()
    assert (done.returncode, "Lock wait timeout exceeded" in done.stderr) == (1, True)
    assert everything(shop) == before


@pytest.mark.parametrize("version", [EARLIER[0], EARLIER[-1]], ids=lambda path: path.name)
async def test_a_copy_of_an_earlier_version_is_upgraded_and_forgets(
    run: Run, shop: Connection[Cursor], lanes: Lanes, version: os.PathLike[str]
) -> None:
    """One in which a worker is alive stays as it is, without the new columns."""
    make_tables(shop, version)  # type: ignore[arg-type]
    execute(
        shop,
        f"INSERT INTO {BUDGET} (task, last_start, server, paused, gap_us)"
        f" VALUES ('{TASK}', SYSDATE(6), {tables.SERVER}, TRUE, 7)",
        WORKER.format(TASK, 0),
    )
    columns = rows(shop, f"SHOW COLUMNS FROM {BUDGET}")

    refused = run("init", "--fresh")
    as_before = rows(shop, f"SHOW COLUMNS FROM {BUDGET}")
    execute(shop, "DELETE FROM aioworker_worker")
    done = run("init", "--fresh")

    assert (refused.returncode, refused.stdout, as_before) == (1, "", columns)
    assert (done.returncode, "forgot 1 pause, 1 rate, 0 run notes" in done.stdout) == (0, True)
    assert budget(shop) == {TASK: new_row(shop)}


async def test_without_tables_there_is_nothing_to_forget(
    run: Run, shop: Connection[Cursor], lanes: Lanes
) -> None:
    """So that one script serves a staging that is empty, and one that is a copy."""
    execute(shop, f"DROP TABLE {', '.join(schema.NAMES)}")

    done = run("init", "--fresh")

    assert (done.returncode, NOTHING in done.stdout.splitlines()) == (0, True), done
    assert budget(shop) == {TASK: new_row(shop)}


def test_the_printed_statements_forget_the_same(run: Run, shop: Connection[Cursor]) -> None:
    """Printing changes nothing; a DBA may run them."""
    fill(shop)
    before = everything(shop)

    shown = run("init", "--print", "--fresh").stdout
    kept = everything(shop)
    section = shown.partition("# MySQL: how init --fresh forgets")[2].partition("\n\n")[0]
    execute(shop, *section.partition("\n")[2].rstrip(";").split(";\n"))

    assert kept == before
    assert budget(shop) == dict.fromkeys(KEYS, new_row(shop))
    assert others(shop) == [0, 0, 0, 0]
    assert "fresh" not in run("init", "--print").stdout


@pytest.mark.parametrize(
    ("arguments", "variables", "words"),
    [
        (
            (),
            {"AIOWORKER_BUDGET": "worker"},
            "AIOWORKER_BUDGET=worker: each worker keeps its own budget, and there is nothing to"
            " forget; run `aioworker init`",
        ),
        (
            (TASK,),
            {},
            "expected --fresh without a task, since it forgets what is known of all tasks of the"
            f" database, got: {TASK}",
        ),
    ],
    ids=["a budget of its own", "a task"],
)
@pytest.mark.parametrize("show", [(), ("--print",)])
def test_what_cannot_be_forgotten_is_refused(
    run: Run,
    shop: Connection[Cursor],
    arguments: tuple[str, ...],
    variables: dict[str, str],
    words: str,
    show: tuple[str, ...],
) -> None:
    """In one line, before anything is done."""
    execute(shop, f"UPDATE {BUDGET} SET paused = TRUE")

    done = run("init", "--fresh", *arguments, *show, **variables)

    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"aioworker: {words}\n")
    assert rows(shop, f"SELECT paused FROM {BUDGET}") == [(1,)]
