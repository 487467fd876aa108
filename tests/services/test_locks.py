"""What a write keeps others from: nearly nothing, for a moment."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from aioworker import repo
from aioworker.db import Cursor as WorkerCursor
from aioworker.db import Database
from support import servers
from tests.conftest import current_versions, execute, make_database, rows, simple_addons

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor


class Watched(Database):
    """Calls someone before each commit, while all locks of the transaction are held."""

    before_commit: Callable[[], None]

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[WorkerCursor]:
        """Write, call, commit."""
        async with super().transaction() as cursor:
            yield cursor
            self.before_commit()


async def test_a_thousand_stale_rows_are_ten_transactions_in_the_order_of_their_ids(
    pair: servers.Servers, shop: Connection[Cursor]
) -> None:
    """Each is committed before the next begins: no row is locked for longer."""
    simple_addons(shop, 1000)
    watched = make_database(pair, Watched)
    assert isinstance(watched, Watched)
    committed = []
    watched.before_commit = lambda: committed.extend(
        rows(shop, "SELECT COUNT(*), MAX(id) FROM addons WHERE current_version IS NOT NULL")
    )

    await repo.refresh(watched, list(range(1000, 0, -1)))

    assert committed == [(0, None)] + [(n, n) for n in range(100, 1000, 100)]
    watched.close()


async def test_beside_a_write_others_change_files_and_insert_versions(
    pair: servers.Servers, shop: Connection[Cursor]
) -> None:
    """Files of the chunk; versions of add-ons that the chunk does not change."""
    simple_addons(shop, 1000)
    execute(shop, "UPDATE addons SET current_version = id + 10000 WHERE id > 200")
    watched = make_database(pair, Watched)
    assert isinstance(watched, Watched)
    other = servers.connect(pair.mysql_url)
    execute(other, "SET SESSION innodb_lock_wait_timeout = 1")
    calls = 0

    def other_writer() -> None:
        nonlocal calls
        calls += 1
        # A wait for any lock of the writer would fail here, after a second.
        execute(
            other,
            "UPDATE files SET status = 4",
            "UPDATE files SET status = 1 WHERE version_id = 10001",
            "UPDATE files SET status = 4 WHERE version_id = 10001",
            "INSERT INTO versions (addon_id, version, created, modified)"
            " SELECT id, '0.1', '2001-01-01', '2001-01-01' FROM addons WHERE id > 200",
            "UPDATE addons SET average_daily_users = 1 WHERE id > 200",
        )

    watched.before_commit = other_writer

    await repo.refresh(watched, list(range(1, 1001)))

    assert calls == 2
    assert current_versions(shop) == {n: n + 10_000 for n in range(1, 1001)}
    other.close()
    watched.close()


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

    assert result == repo.Refresh(changed=0)
    shop.rollback()
