"""The worker's row: what it says of runs and waits, and how often it is written."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from aioworker.status.presence import Presence
from tests.conftest import TASK, rows

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

    from aioworker.mysql.database import Database


def made(database: Database, run_seconds: float = 30) -> Presence:
    """Make a worker that keeps a row."""
    return Presence(TASK, "here", 1, None, lambda _doing: None, database, run_seconds)


async def told(presence: Presence, state: str, reason: str) -> None:
    """Tell, and let the row be written."""
    presence.tell(state, reason, logging.DEBUG)
    await presence.keep()


def row(shop: Connection[Cursor]) -> tuple[Any, ...]:
    """Return what the row says."""
    [found] = rows(shop, "SELECT state, reason FROM aioworker_worker")
    return found


async def test_runs_and_waits_that_take_turns_within_a_second_are_not_written(
    database: Database, shop: Connection[Cursor]
) -> None:
    """At 100/s each start wrote the row twice, and waited for the disk each time."""
    presence = made(database)
    await told(presence, "waiting", "budget: next start at 02:10:00 UTC")

    await told(presence, "running", TASK)

    assert row(shop) == ("waiting", "budget: next start at 02:10:00 UTC")


async def test_a_failure_is_written_at_once_whatever_was_before(
    database: Database, shop: Connection[Cursor]
) -> None:
    presence = made(database)
    await told(presence, "running", TASK)

    await told(presence, "waiting", "database, contention: Deadlock (1213)")
    assert row(shop) == ("waiting", "database, contention: Deadlock (1213)")

    await told(presence, "running", TASK)
    assert row(shop) == ("running", TASK)


async def test_a_run_that_may_outlast_what_counts_as_alive_is_written_at_once(
    database: Database, shop: Connection[Cursor]
) -> None:
    """Nothing is written in it: `health` would take its worker for dead."""
    presence = made(database, run_seconds=600)
    await told(presence, "waiting", "budget: next start at 02:10:00 UTC")

    await told(presence, "running", TASK)

    assert row(shop) == ("running", TASK)
