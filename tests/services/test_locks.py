"""What a write keeps others from: nearly nothing, for a moment."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from aioworker import repo
from aioworker.mysql.database import Database
from tests.conftest import (
    current_versions,
    eventually,
    execute,
    make_database,
    rows,
    simple_addons,
)

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

    from support import servers


class Watched(Database):
    """Calls someone before each write."""

    before_write: Callable[[], None]

    async def execute(self, statement: str, args: object = None) -> int:
        """Call, then write."""
        self.before_write()
        return await super().execute(statement, args)


async def test_a_thousand_stale_rows_are_ten_transactions_in_the_order_of_their_ids(
    pair: servers.Servers, shop: Connection[Cursor]
) -> None:
    """Each is committed before the next begins: no row is locked for longer."""
    simple_addons(shop, 1000)
    watched = make_database(pair, Watched)
    assert isinstance(watched, Watched)
    committed: list[tuple[int, int | None]] = []
    written = "SELECT COUNT(*), MAX(id) FROM addons WHERE current_version IS NOT NULL"
    watched.before_write = lambda: committed.extend(rows(shop, written))

    await repo.refresh(watched, list(range(1000, 0, -1)))

    assert committed == [(0, None)] + [(n, n) for n in range(100, 1000, 100)]
    watched.close()


def write_runs(connection: Connection[Cursor]) -> bool:
    """Return whether the worker's write is under way, its rows locked."""
    statement = (
        "SELECT COUNT(*) FROM information_schema.processlist"
        " WHERE info LIKE 'UPDATE /* aioworker update_current_version */%'"
    )
    return bool(rows(connection, statement)[0][0])


async def test_beside_a_write_others_change_files_and_insert_versions(
    pair: servers.Servers, shop: Connection[Cursor], database: Database
) -> None:
    """Files of the chunk; versions of add-ons that the chunk does not change."""
    simple_addons(shop, 1000)
    execute(
        shop,
        "UPDATE addons SET current_version = id + 10000 WHERE id > 100",
        # The last of the hundred rows takes three seconds; the other 99 are locked meanwhile.
        "CREATE TRIGGER slow BEFORE UPDATE ON addons FOR EACH ROW"
        " SET NEW.average_daily_users = IF(OLD.id = 100 AND OLD.current_version IS NULL, SLEEP(3),"
        " NEW.average_daily_users)",
        "SET SESSION innodb_lock_wait_timeout = 1",
    )
    refreshing = asyncio.create_task(repo.refresh(database, list(range(1, 1001))))
    await asyncio.to_thread(eventually, lambda: write_runs(shop), "the write runs")

    # A wait for any lock of the writer would fail here, after a second.
    execute(
        shop,
        "UPDATE files SET status = 1 WHERE version_id = 10001",
        "UPDATE files SET status = 4",
        # By id: for a range of them the server may choose to read, and lock, all the others too.
        "INSERT INTO versions (addon_id, version, created, modified) VALUES"
        " (101, '0.1', '2001-01-01', '2001-01-01'), (1000, '0.1', '2001-01-01', '2001-01-01')",
        "UPDATE addons SET average_daily_users = 1 WHERE id = 101",
        "UPDATE addons SET average_daily_users = 1 WHERE id = 1000",
    )
    assert write_runs(shop)

    result = await refreshing
    assert len(result.changed) == 100
    assert current_versions(shop) == {n: n + 10_000 for n in range(1, 1001)}


async def test_a_chunk_with_nothing_to_change_takes_no_lock(
    database: Database, shop: Connection[Cursor]
) -> None:
    """It does not even wait for someone who holds every row."""
    simple_addons(shop, 1000)
    execute(shop, "UPDATE addons SET current_version = id + 10000")
    with shop.cursor() as cursor:
        for table in ("addons", "versions", "files"):
            cursor.execute(f"SELECT id FROM {table} FOR UPDATE")

    result = await repo.refresh(database, list(range(1, 1001)))

    assert result == repo.Refresh()
    shop.rollback()
