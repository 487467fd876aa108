"""A row for each start, and what `audit` and `history` tell by them, on a real server."""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest

from aioworker.budget import history, run_time
from aioworker.budget.run_time import Change
from aioworker.budget.shared import SharedBudget
from aioworker.limits import End, RateLimit
from support import servers
from tests.conftest import TASK, Run, execute, rows, simple_addons

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

    from aioworker.mysql.database import Database
    from support.servers import Servers

COLUMNS = "number, gap_us, worker, messages, ids, changed, outcome"
WRITE = "UPDATE addons SET current_version = NULL WHERE id = 1"


@pytest.fixture
async def budget(database: Database, shop: Connection[Cursor]) -> SharedBudget:
    """A worker's budget at a start a second, on the row that init makes."""
    simple_addons(shop, 1)
    made = SharedBudget(database, TASK, RateLimit.parse("1/s"), "web1:7")
    await made.check()
    return made


def noted(shop: Connection[Cursor], columns: str = COLUMNS) -> list[tuple[Any, ...]]:
    return list(rows(shop, f"SELECT {columns} FROM aioworker_start ORDER BY charged"))


async def test_a_start_has_a_row(budget: SharedBudget, shop: Connection[Cursor]) -> None:
    async with budget.turn():
        assert await budget.charge(["one", "two"], ids=12) is None
        [[charged, last_charge]] = rows(
            shop, "SELECT charged, last_charge FROM aioworker_start JOIN aioworker_budget"
        )
        assert charged == last_charge
        assert noted(shop, "first_write, ended") == [(None, None)]
        await budget.ended(["one", "two"], End("ack", 9))

    assert noted(shop) == [(1, 1_000_000, "web1:7", 2, 12, 9, "ack")]
    assert noted(shop, "ended > charged, first_write") == [(1, None)]


async def test_a_refused_charge_has_none(budget: SharedBudget, shop: Connection[Cursor]) -> None:
    async with budget.turn():
        execute(shop, "UPDATE aioworker_budget SET paused = TRUE")
        assert await budget.charge(["one"]) is not None

    assert noted(shop) == []
    assert rows(shop, "SELECT * FROM aioworker_run") == []


@pytest.mark.parametrize("commits", [True, False])
async def test_the_first_write_is_noted_by_its_own_transaction(
    budget: SharedBudget, database: Database, shop: Connection[Cursor], commits: bool
) -> None:
    insert(shop, "(7, SYSDATE(6) - INTERVAL 1 HOUR, 1)")
    async with budget.turn():
        await budget.charge(["one"])
        with nullcontext() if commits else pytest.raises(ZeroDivisionError):
            async with database.transaction() as cursor:
                await cursor.execute(WRITE)
                _ = 1 / commits
        await budget.ended(["one"], End("ack"))

    [[written, last_write]] = rows(
        shop,
        "SELECT first_write, last_write FROM aioworker_start JOIN aioworker_budget"
        " WHERE number = 1",
    )
    assert (written == last_write) is commits
    assert (written is None) is not commits
    assert noted(shop, "first_write = charged, ended = charged")[0] == (1, 1), "of another start"


async def test_a_worker_that_dies_leaves_no_end(
    budget: SharedBudget, database: Database, shop: Connection[Cursor]
) -> None:
    async with budget.turn():
        await budget.charge(["one"])
        database.close()

    assert noted(shop, "number, ended") == [(1, None)]


async def test_an_end_that_was_not_noted_is_no_other_starts(
    database: Database, shop: Connection[Cursor]
) -> None:
    """Of a worker that loses its connection, while another one's start has no end yet."""
    budget = SharedBudget(database, TASK, RateLimit.parse("1000/s"), "web1:7")
    await budget.check()
    async with budget.turn():
        await budget.charge(["one"])
        await budget.ended(["one"], End("ack", 9))
        database.close()
    insert(shop, "(2, SYSDATE(6), 1)")
    execute(
        shop,
        "UPDATE aioworker_start SET ended = NULL",
        "UPDATE aioworker_budget SET starts = 2, last_start = '2000-01-01'",
    )

    await asyncio.sleep(0.01)

    async with budget.turn() as wait:
        assert wait is None

    assert noted(shop, "number, ended, outcome") == [(1, None, None), (2, None, None)]


async def test_what_ran_without_a_limit_is_no_end_of_a_start(
    database: Database, shop: Connection[Cursor]
) -> None:
    """Of a start whose worker died, before its task had no limit for a while."""
    budget = SharedBudget(database, TASK, RateLimit.parse("1000/s"), "web1:7")
    insert(shop, "(1, SYSDATE(6), 1)")
    execute(
        shop,
        "UPDATE aioworker_start SET ended = NULL",
        "UPDATE aioworker_budget SET starts = 1, gap_us = 0",
    )
    await budget.check()
    async with budget.turn():
        await budget.charge(["one"])
        await budget.ended(["one"], End("ack", 9))

    execute(shop, "UPDATE aioworker_budget SET gap_us = NULL")
    await budget.check()
    async with budget.turn() as wait:
        assert wait is None

    assert noted(shop, "number, ended, outcome") == [(1, None, None)]


async def test_the_rate_that_an_operator_set_is_noted(
    budget: SharedBudget, shop: Connection[Cursor]
) -> None:
    execute(shop, "UPDATE aioworker_budget SET gap_us = 250000")
    await budget.check()
    async with budget.turn():
        await budget.charge(["one"])

    assert noted(shop, "gap_us") == [(250_000,)]


async def test_a_budget_that_was_made_again_counts_from_one(
    budget: SharedBudget, shop: Connection[Cursor]
) -> None:
    """The row of a number that was there before is replaced."""
    note(shop, (1, "2026-11-01", 1))
    async with budget.turn():
        assert await budget.charge(["one"]) is None

    assert noted(shop, "number, worker") == [(1, "web1:7")]


@pytest.mark.parametrize(
    ("most", "left"),
    [(history.MOST_ROWS, [199_002, 199_003, 200_001]), (2, [199_003, 200_001])],
    ids=["older than a week", "more than are kept"],
)
async def test_old_rows_go(
    budget: SharedBudget,
    shop: Connection[Cursor],
    monkeypatch: pytest.MonkeyPatch,
    most: int,
    left: list[int],
) -> None:
    """Those of all tasks together, the oldest first."""
    fewer = tuple(one.replace(str(history.MOST_ROWS), str(most)) for one in history.CLEAN)
    monkeypatch.setattr(history, "CLEAN", fewer)
    execute(shop, "UPDATE aioworker_budget SET starts = 200000")
    for number, days in ((199_001, 8), (199_002, 6), (199_003, 5)):
        insert(shop, f"({number}, SYSDATE(6) - INTERVAL {days} DAY, 1)")
    execute(shop, "UPDATE aioworker_start SET task = 'another' WHERE number = 199002")
    async with budget.turn():
        await budget.charge(["one"])
        await budget.ended(["one"], End("ack"))

    assert sorted(number for [number] in noted(shop, "number")) == left


def insert(shop: Connection[Cursor], values: str) -> None:
    """Insert rows: number, charge, interval in seconds."""
    for value in values.split("), ("):
        number, charged, seconds = value.strip("()").split(", ")
        execute(
            shop,
            "INSERT INTO aioworker_start"
            " (task, number, charged, gap_us, worker, messages, ended, first_write)"
            f" VALUES ('{TASK}', {number}, {charged}, {seconds} * 1000000, 'web1:7', 1,"
            " charged, charged)",
        )


def note(shop: Connection[Cursor], *starts: tuple[int, str, float]) -> None:
    """Insert rows: number, charge, interval in seconds."""
    for number, charged, seconds in starts:
        insert(shop, f"({number}, '{charged}', {seconds})")


@pytest.mark.parametrize(
    ("starts", "found"),
    [
        ([(0, 30), (30, 30), (60, 30)], {"least_charge": 1.0, "most_in_minute": 2, "kept": True}),
        ([(0, 30), (29.7, 30)], {"least_charge": 0.99, "least_write": 0.99, "kept": False}),
        # By the rate that was in force at the later one.
        ([(0, 30), (1, 1), (2, 1)], {"least_charge": 1.0, "most_in_minute": 3, "kept": True}),
        ([(0, 1), (1, 30)], {"least_charge": 1 / 30, "kept": False}),
        # A rate of which no whole number of intervals makes a minute: 7/m.
        ([(0, 8.571429), (8.571429, 8.571429)], {"least_charge": 1.0, "kept": True}),
        ([(9 * n, 30) for n in range(3)], {"most_in_minute": 3, "excess_in_minute": 1}),
        ([(61 * n, 3600) for n in range(3)], {"most_in_hour": 3, "excess_in_hour": 2}),
        ([(0, 30)], {"least_charge": None, "starts": 1, "unfinished": 0, "kept": True}),
        ([], {"starts": 0, "since": None, "kept": True}),
    ],
)
def test_an_audit_states_the_least_distance(
    run: Run, shop: Connection[Cursor], starts: list[tuple[float, float]], found: dict[str, Any]
) -> None:
    [[began]] = rows(shop, "SELECT SYSDATE(6) - INTERVAL 1 HOUR")
    for number, (at, seconds) in enumerate(starts, 1):
        charged = f"'{began}' + INTERVAL {round(at * 1e6)} MICROSECOND"
        insert(shop, f"({number}, {charged}, {seconds})")

    audit = run("audit", "--json")

    told = json.loads(audit.stdout)
    assert {name: told[name] for name in found} == pytest.approx(found)
    assert audit.returncode == (0 if told["kept"] else 1)


def test_an_audit_counts_no_start_without_a_limit_against_one(
    run: Run, shop: Connection[Cursor]
) -> None:
    """As of a task that a shared budget alone limited, until somebody set a rate."""
    [[began]] = rows(shop, "SELECT SYSDATE(6) - INTERVAL 1 HOUR")
    for number in range(1, 6):
        insert(shop, f"({number}, '{began}' + INTERVAL {number} SECOND, 0)")
    execute(shop, "UPDATE aioworker_start SET gap_us = NULL WHERE number = 1")
    insert(shop, f"(6, '{began}' + INTERVAL 35 SECOND, 30)")

    audit = run("audit", "--json")

    told = json.loads(audit.stdout)
    assert (audit.returncode, told["kept"]) == (0, True), told
    assert (told["most_in_minute"], told["excess_in_minute"]) == (6, -1)


@pytest.mark.parametrize("since", ["0s", "8d", "soon"])
def test_an_age_that_no_row_has_is_refused_in_one_line(run: Run, since: str) -> None:
    audit = run("audit", "--since", since)

    assert (audit.returncode, audit.stdout) == (2, "")
    assert audit.stderr.startswith("aioworker: expected --since ")
    assert audit.stderr.endswith(f"got: '{since}'\n")


def test_an_audit_tells_what_is_not_in_it(run: Run, shop: Connection[Cursor]) -> None:
    """Starts of earlier workers, which write no row; runs without an end; what is older."""
    insert(shop, "(1, SYSDATE(6) - INTERVAL 3 HOUR, 1), (2, SYSDATE(6) - INTERVAL 1 HOUR, 1)")
    insert(shop, "(7, SYSDATE(6) - INTERVAL 30 MINUTE, 1)")
    execute(shop, "UPDATE aioworker_start SET ended = NULL WHERE number = 7")

    shown = run("audit", "--since", "2h").stdout.splitlines()

    assert shown[:2] == [f"task          {TASK}", "rate          kept"]
    assert shown[2].startswith("starts        2, from ")
    assert "without end   1: the worker died, or runs still" in shown
    assert (
        "not noted     4 starts by workers of an earlier version, or of rows that are gone" in shown
    )
    assert shown[3].startswith("charges       at least 1800.0")


def test_an_audit_of_starts_without_a_limit_says_nothing_else(
    run: Run, shop: Connection[Cursor]
) -> None:
    """As an operator set it: an interval of 0, which nothing can be divided by."""
    insert(shop, "(1, SYSDATE(6) - INTERVAL 2 MINUTE, 0), (2, SYSDATE(6) - INTERVAL 1 MINUTE, 0)")

    audit = run("audit", "--json")

    told = json.loads(audit.stdout)
    assert (audit.returncode, audit.stderr) == (0, "")
    assert (told["starts"], told["least_charge"], told["excess_in_hour"]) == (2, None, 0)


async def test_the_history_has_starts_and_changes_in_order(
    run: Run, database: Database, budget: SharedBudget, shop: Connection[Cursor]
) -> None:
    await run_time.set_rate(database, TASK, 500_000, Change("dba", "rate limit 2/s", "night", 60))
    await budget.check()
    async with budget.turn():
        await budget.charge(["one"], ids=1)
        await budget.ended(["one"], End("ack", 1))
    assert await run_time.pause(database, TASK, Change("dba", "paused"))
    assert not await run_time.pause(database, TASK, Change("dba", "paused for 1 s", seconds=1))
    await run_time.resume(database, TASK, Change("dba", "resumed"))

    shown = [line[25:] for line in run("history").stdout.splitlines()]
    told = [
        json.loads(line) for line in run("history", "--json", "--last", "2").stdout.splitlines()
    ]

    shown = [re.sub(r"after \d+\.\d s", "after 0.0 s", line) for line in shown]
    assert shown == [
        "rate limit 2/s, by dba: night",
        "start 1 by web1:7: 1 message, 1 id, 1 changed; ack after 0.0 s",
        "paused, by dba",
        "resumed, by dba",
    ]
    assert [(one["kind"], one["what"]) for one in told] == [
        ("change", "paused"),
        ("change", "resumed"),
    ]


async def test_an_end_is_a_change(
    run: Run, database: Database, budget: SharedBudget, shop: Connection[Cursor]
) -> None:
    """Of several that see it one notes it."""
    for command in (("pause", "--for", "1h"), ("rate-limit", "2/s", "--for", "1h")):
        run(*command)
    execute(
        shop,
        "UPDATE aioworker_budget SET paused_until = '2026-01-02', set_until = '2026-01-02'",
    )

    await budget.check()
    await budget.check()
    await run_time.clear_ended(database, TASK)

    found = rows(shop, "SELECT who, what FROM aioworker_change ORDER BY id")[2:]
    assert found == [
        ("end", "the rate limit set until then ended"),
        ("end", "the pause ended"),
    ]


async def test_a_change_that_a_deadlock_ends_is_made_again(
    pair: Servers, database: Database, shop: Connection[Cursor]
) -> None:
    """Here somebody's long transaction holds an old change, which goes with this one."""
    await run_time.pause(database, TASK, Change("dba", "paused"))
    await run_time.resume(database, TASK, Change("dba", "resumed"))
    execute(shop, "UPDATE aioworker_change SET changed = '2026-01-02'", "CREATE TABLE bulk (n INT)")
    other = servers.connect(pair.mysql_url)
    with other.cursor() as cursor:
        # The server ends the transaction that has changed less.
        cursor.executemany("INSERT INTO bulk VALUES (%s)", list(range(100)))
        cursor.execute("SELECT * FROM aioworker_change FOR UPDATE")
        pausing = asyncio.create_task(run_time.pause(database, TASK, Change("dba", "paused")))
        waits = "SELECT COUNT(*) FROM information_schema.innodb_trx WHERE trx_state = 'LOCK WAIT'"
        while rows(shop, waits) == [(0,)]:  # noqa: ASYNC110 - the server is waited for
            await asyncio.sleep(0.2)  # asked more often, it answers from a cache
        await asyncio.to_thread(cursor.execute, "UPDATE aioworker_budget SET holder = 'dba'")
        await asyncio.sleep(0)
        other.commit()
    other.close()

    assert await pausing
    found = rows(shop, "SELECT what FROM aioworker_change WHERE changed > '2026-01-02'")
    assert found == [("paused",)]
    assert rows(shop, "SELECT paused, holder FROM aioworker_budget") == [(1, "dba")]


def test_nothing_is_noted_in_scope_worker(run: Run) -> None:
    for command in ("audit", "history"):
        refused = run(command, AIOWORKER_BUDGET="worker")
        assert (refused.returncode, refused.stderr) == (
            2,
            "aioworker: AIOWORKER_BUDGET=worker: starts are noted nowhere\n",
        )
