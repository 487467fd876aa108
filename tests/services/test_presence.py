"""The worker's row: what it says of runs and waits, and how often it is written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from aioworker.reasons import Reason, ReasonKind
from aioworker.status.presence import Presence
from aioworker.status.read import workers
from aioworker.status.waiting import Waiting
from tests.conftest import EARLIER, TASK, execute, make_tables, rows

if TYPE_CHECKING:
    from pathlib import Path

    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

    from aioworker.mysql.database import Database

BUDGET = Reason(ReasonKind.BUDGET, "budget: next start at 02:10:00 UTC")
RUNNING = Reason(ReasonKind.RUNNING, TASK)
EMPTY = Reason(ReasonKind.EMPTY, "nothing queued")
CONTENTION = Reason(ReasonKind.CONTENTION, "database, contention: Deadlock (1213)")


def made(database: Database, run_seconds: float = 30) -> Presence:
    """Make a worker that keeps a row."""
    return Presence(TASK, "here", 1, None, lambda _doing: None, database, run_seconds)


async def tell(presence: Presence, reason: Reason) -> None:
    """Tell, and let the row be written."""
    presence.report(reason)
    await presence.keep()


def row(shop: Connection[Cursor]) -> tuple[Any, ...]:
    """Return what the row says."""
    [found] = rows(shop, "SELECT state, kind, reason FROM aioworker_worker")
    return found


async def test_runs_and_waits_that_take_turns_within_a_second_are_not_written(
    database: Database, shop: Connection[Cursor]
) -> None:
    """At 100/s each start wrote the row twice, and waited for the disk each time."""
    presence = made(database)
    await tell(presence, BUDGET)

    await tell(presence, RUNNING)

    assert row(shop) == ("waiting", "budget", BUDGET.words)


async def test_the_end_of_the_work_is_written_at_once(
    database: Database, shop: Connection[Cursor]
) -> None:
    """It comes once, not with each start: whoever asks then reads no run that is over."""
    presence = made(database)
    await tell(presence, RUNNING)

    await tell(presence, EMPTY)

    assert row(shop) == ("waiting", "empty", "nothing queued")


async def test_a_failure_is_written_at_once_whatever_was_before(
    database: Database, shop: Connection[Cursor]
) -> None:
    presence = made(database)
    await tell(presence, RUNNING)

    await tell(presence, CONTENTION)
    assert row(shop) == ("waiting", "contention", CONTENTION.words)

    await tell(presence, RUNNING)
    assert row(shop) == ("running", "running", TASK)


async def test_a_run_that_may_outlast_what_counts_as_alive_is_written_at_once(
    database: Database, shop: Connection[Cursor]
) -> None:
    """Nothing is written in it: `health` would take its worker for dead."""
    presence = made(database, run_seconds=600)
    await tell(presence, BUDGET)

    await tell(presence, RUNNING)

    assert row(shop) == ("running", "running", TASK)


async def test_what_is_known_of_the_lanes_goes_with_the_row(
    database: Database, shop: Connection[Cursor]
) -> None:
    """It is written with the row, and makes no write of its own."""
    presence = made(database)
    told = Waiting(held=1)
    presence.waiting = lambda: told
    await tell(presence, RUNNING)
    told = Waiting(held=2)
    await presence.keep()

    [found] = await workers(database, TASK)
    assert found.waiting == Waiting(held=1)

    await tell(presence, EMPTY)
    [found] = await workers(database, TASK)
    assert found.waiting == Waiting(held=2)


@pytest.mark.parametrize("written", ["NULL", "'throttle'"], ids=["earlier", "later"])
async def test_a_worker_of_another_version_is_read(
    database: Database, shop: Connection[Cursor], written: str
) -> None:
    """One writes no kind, the other one that this version does not know."""
    await tell(made(database), BUDGET)
    execute(shop, f"UPDATE aioworker_worker SET kind = {written}")

    [found] = await workers(database, TASK)

    assert (found.state, found.why) == ("waiting", Reason(ReasonKind.UNKNOWN, BUDGET.words))
    assert not found.fails


@pytest.mark.parametrize("version", EARLIER, ids=lambda path: path.name)
async def test_workers_are_read_from_a_table_that_waits_for_init(
    database: Database, shop: Connection[Cursor], version: Path
) -> None:
    """Between new code and `init`, those of the earlier version work on."""
    make_tables(shop, version)
    columns = [name for name, *_rest in rows(shop, "SHOW COLUMNS FROM aioworker_worker")]
    execute(
        shop,
        "INSERT INTO aioworker_worker (host, pid, task, version, session, state, reason, since,"
        f" seen{', id' if 'id' in columns else ''}) VALUES ('web1', 7, '{TASK}', '0.0.1', 5,"
        " 'stalled', 'breaker open', SYSDATE(6), SYSDATE(6)"
        f"{', 1' if 'id' in columns else ''})",
    )

    [found] = await workers(database, TASK)

    assert (found.name, found.why) == ("web1:7", Reason(ReasonKind.UNKNOWN, "breaker open"))
    assert found.waiting is None
    assert found.stalled
