"""Tables of every earlier version, upgraded in place on a real server with rows in them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from aioworker import schema
from aioworker.errors import DatabaseError
from support import servers
from tests.conftest import TASK, execute, rows

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

    from aioworker.db import Database

EARLIER = sorted((Path(__file__).parent.parent / "data/schema").glob("*.sql"))
# What a DBA, and the workers, have written into it.
KEPT = {
    "task": f"'{TASK}'",
    "last_start": "'2026-11-24 02:10:00.123456'",
    "server": "'db1:3306:7'",
    "starts": "811",
    "holder": "'web1:42'",
    "paused": "TRUE",
    "paused_by": "'dba'",
    "paused_at": "'2026-11-24 02:11:00'",
    "paused_why": "'replica lags'",
    "gap_us": "45000000",
    "set_by": "'dba'",
    "set_at": "'2026-11-24 02:09:00'",
    "set_why": "'night window'",
    "running": """'["a"]'""",
    "deaths": """'{"a": 4}'""",
}
WORKER = (
    "INSERT INTO aioworker_worker"
    " (host, pid, task, version, session, state, reason, since, seen)"
    f" VALUES ('web1', {{}}, '{TASK}', '0.1.0', 7, 'waiting', 'budget', NOW(6), NOW(6))"
)


def columns(shop: Connection[Cursor], table: str) -> list[tuple[str, ...]]:
    """Return name, type, NULL or not, and key of each column, by name."""
    return sorted(row[:4] for row in rows(shop, f"SHOW COLUMNS FROM {table}"))


def make(shop: Connection[Cursor], version: Path) -> list[str]:
    """Make an earlier version's tables, and rows in them; return the columns of the budget's."""
    execute(shop, "DROP TABLE aioworker_budget, aioworker_worker")
    execute(shop, *filter(str.strip, version.read_text().split(";\n")))
    there = [name for name, *_rest in columns(shop, "aioworker_budget")]
    values = ", ".join(KEPT[name] for name in there)
    execute(shop, f"INSERT INTO aioworker_budget ({', '.join(there)}) VALUES ({values})")
    return there


async def upgrade(database: Database) -> list[str]:
    """Do what `init` does with the tables."""
    return [await schema.settle(database, name) for name in schema.NAMES]


@pytest.mark.parametrize("version", EARLIER, ids=lambda path: path.stem)
async def test_an_upgrade_keeps_all_that_an_earlier_version_knew(
    shop: Connection[Cursor], database: Database, version: Path
) -> None:
    wanted = [columns(shop, name) for name in schema.NAMES]
    there = make(shop, version)
    kept = f"SELECT {', '.join(there)} FROM aioworker_budget"
    before = rows(shop, kept)

    told = await upgrade(database)

    assert told[0].startswith("added ")
    assert [columns(shop, name) for name in schema.NAMES] == wanted
    assert rows(shop, kept) == before
    assert await upgrade(database) == ["was there", "was there"]
    assert await schema.changes(database) == {}


async def test_an_upgrade_tells_workers_of_the_first_version_apart(
    shop: Connection[Cursor], database: Database
) -> None:
    """They had no id of their own, and go on writing rows without one."""
    make(shop, EARLIER[0])
    execute(shop, *map(WORKER.format, (1, 2)))

    assert await upgrade(database) == [
        "added last_charge, last_write, paused_by, paused_at, paused_why, running, deaths",
        "added id",
    ]

    execute(shop, WORKER.format(3))
    found = rows(shop, "SELECT id, pid FROM aioworker_worker ORDER BY pid")
    assert [pid for _id, pid in found] == [1, 2, 3]
    assert len({key for key, _pid in found}) == 3


async def test_the_newest_columns_are_added_without_copying_a_row(
    shop: Connection[Cursor], database: Database
) -> None:
    """Else whoever writes the row would wait for the copy."""
    make(shop, EARLIER[-1])
    statement = (await schema.changes(database))["aioworker_budget"]

    execute(shop, f"{statement}, ALGORITHM=INSTANT")

    assert "aioworker_budget" not in await schema.changes(database)


async def test_an_upgrade_behind_a_long_transaction_lets_others_through_and_names_it(
    pair: servers.Servers,
    shop: Connection[Cursor],
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whoever reads the row waits behind a waiting ALTER: workers would stand still."""
    make(shop, EARLIER[-1])
    monkeypatch.setattr(schema, "LOCK_TRIES", 2)
    monkeypatch.setattr(schema, "LOCK_SECONDS", 1)
    with servers.connect(pair.mysql_url) as holder, holder.cursor() as cursor:
        cursor.execute("START TRANSACTION")
        cursor.execute("SELECT task FROM aioworker_budget")
        cursor.execute("SELECT CONNECTION_ID()")
        [session] = cursor.fetchone() or [0]

        with pytest.raises(DatabaseError) as caught:
            await schema.settle(database, "aioworker_budget")

        named = rf"held by (one of )?session {session} of "
        assert caught.match(
            rf"^no lock on table aioworker_budget at \S+ within 1 s, in 2 tries: {named}"
        )
        assert f"session {session} of" in capsys.readouterr().err
    assert await schema.settle(database, "aioworker_budget") == "added last_charge, last_write"
