"""Tables of every earlier version, upgraded in place on a real server with rows in them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from aioworker.budget import schema, tables
from aioworker.budget.shared import SharedBudget
from aioworker.errors import DatabaseError
from aioworker.limits import RateLimit
from support import servers
from tests.conftest import (
    EARLIER,
    TASK,
    database_name,
    execute,
    make_tables,
    rows,
)

if TYPE_CHECKING:
    from pathlib import Path

    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

    from aioworker.mysql.database import Database

ONE_START = EARLIER[3]  # the last version whose budget had one moment for charge and first write
ADDED = (  # to that
    "added last_charge, last_write, bulk_next, paused_until, paused_until_of,"
    " set_until, set_until_of, gap_after_us, shares,"
    " wants_urgent, wants_bulk, urgent_starts"
)
NO_KIND = EARLIER[4]  # the last version whose workers gave no kind of their reason
NO_LANES = EARLIER[6]  # the last version whose workers told nothing of their lanes
NO_TURNS = EARLIER[7]  # the last version whose starts did not tell which lane is next
NO_ENDS = EARLIER[8]  # the last version of which nothing set at run time had an end
VERSIONS = pytest.mark.parametrize("version", EARLIER, ids=lambda path: path.name)
# What a DBA, and the workers, have written into it.
KEPT = {
    "task": f"'{TASK}'",
    "last_start": "'2026-11-24 02:10:00.123456'",
    "last_charge": "'2026-11-24 02:10:00'",
    "last_write": "'2026-11-24 02:10:00.123456'",
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
    "bulk_next": "TRUE",
    "running": """'["a"]'""",
    "deaths": """'{"a": 4}'""",
}
# What the statements of earlier versions are given.
GIVEN = {
    **{"task": TASK, "gap": 30_000_000, "worker": "web1:42", "usual_us": 0, "passed_us": 0},
    **{"id": "0123456789ab", "host": "web1", "pid": 42, "version": "0.1.0", "rate": "2/m"},
    **{"session": 7, "state": "waiting", "kind": "budget", "reason": "budget", "ahead": 0},
    **{"lanes": None},
    **{"messages": '["a"]', "together": 1, "over": ("a",), "noted": ("a",), "counted": ("a",)},
    **{"running": '["a"]', "deaths": '{"a": 1}', "value": 0, "who": "dba", "why": "window"},
}
LONG_AGO = (
    "UPDATE aioworker_budget SET last_start = '2000-01-01', last_charge = '2000-01-01',"
    f" last_write = '2000-01-01', paused = FALSE, gap_us = NULL, server = {tables.SERVER}"
)
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
    make_tables(shop, version)
    there = [name for name, *_rest in columns(shop, "aioworker_budget")]
    values = ", ".join(KEPT[name] for name in there)
    execute(shop, f"INSERT INTO aioworker_budget ({', '.join(there)}) VALUES ({values})")
    return there


def statements(version: Path) -> list[tuple[str, str]]:
    """Return the name and the text of each statement of an earlier version."""
    text = (version / "statements.sql").read_text()
    return re.findall(r"^-- (\w+)\n(.+?);$", text, re.DOTALL | re.MULTILINE)


async def upgrade(database: Database) -> list[str]:
    """Do what `init` does with the tables."""
    return [await schema.settle(database, name) for name in schema.NAMES]


@VERSIONS
async def test_an_upgrade_keeps_all_that_an_earlier_version_knew(
    shop: Connection[Cursor], database: Database, version: Path
) -> None:
    wanted = [columns(shop, name) for name in schema.NAMES]
    there = make(shop, version)
    kept = f"SELECT {', '.join(there)} FROM aioworker_budget"
    before = rows(shop, kept)

    told = await upgrade(database)

    assert "shares" in told[0]
    assert [columns(shop, name) for name in schema.NAMES] == wanted
    assert rows(shop, kept) == before
    assert await upgrade(database) == ["was there"] * len(schema.NAMES)
    assert await schema.changes(database) == {}


@VERSIONS
async def test_all_that_earlier_workers_and_commands_say_works_after_an_upgrade(
    pair: servers.Servers, shop: Connection[Cursor], database: Database, version: Path
) -> None:
    """They run on beside newer ones until the last of them is restarted."""
    make(shop, version)
    await upgrade(database)
    lock = tables.lock_name(database_name(pair), TASK)
    execute(shop, f"SELECT GET_LOCK('{lock}', 0)")

    with shop.cursor() as cursor:
        matched = [
            (name, cursor.execute(text, {**GIVEN, "lock": lock}))
            for name, text in statements(version)
        ]
    shop.commit()

    wrote = {name for name, count in matched if count}
    assert {"adopt", "stamp", "insert", "leave", "set_rate", "set_paused"} <= wrote
    assert rows(shop, "SELECT task, paused FROM aioworker_budget") == [(TASK, 0)]


@VERSIONS
async def test_an_earlier_worker_and_a_newer_one_keep_their_distance(
    pair: servers.Servers, shop: Connection[Cursor], database: Database, version: Path
) -> None:
    """The one's start holds the other's back, whichever columns each of them knows."""
    make(shop, version)
    await upgrade(database)
    lock = tables.lock_name(database_name(pair), TASK)
    budget = SharedBudget(database, TASK, RateLimit.parse("2/m"), "web2:1")
    [text] = [text for name, text in statements(version) if name == "charge"]

    def charges() -> int:
        with shop.cursor() as cursor:
            cursor.execute(f"SELECT GET_LOCK('{lock}', 0)")
            matched = int(cursor.execute(text, {**GIVEN, "lock": lock}))
            cursor.execute(f"SELECT RELEASE_LOCK('{lock}')")
        shop.commit()
        return matched

    execute(shop, LONG_AGO)
    assert await budget.check() is None
    assert charges() == 1
    wait = await budget.check()
    assert wait is not None
    assert wait.reason.words.startswith("budget: next start at ")

    execute(shop, LONG_AGO)
    async with budget.turn() as wait:
        assert wait is None
        assert await budget.charge(["a"]) is None
        await budget.ended(["a"])
    assert charges() == 0


async def test_an_upgrade_tells_workers_of_the_first_version_apart(
    shop: Connection[Cursor], database: Database
) -> None:
    """They had no id of their own, and go on writing rows without one."""
    make(shop, EARLIER[0])
    execute(shop, *map(WORKER.format, (1, 2)))

    assert await upgrade(database) == [
        "added last_charge, last_write, bulk_next, paused_by, paused_at, paused_why, paused_until,"
        " paused_until_of, set_until, set_until_of, gap_after_us, running, deaths, shares,"
        " wants_urgent, wants_bulk, urgent_starts",
        "added id, kind, lanes, shares",
        "made",
        "made",
        "made",
    ]

    execute(shop, WORKER.format(3))
    found = rows(shop, "SELECT id, pid FROM aioworker_worker ORDER BY pid")
    assert [pid for _id, pid in found] == [1, 2, 3]
    assert len({key for key, _pid in found}) == 3


@pytest.mark.parametrize(
    ("version", "table"),
    [
        (ONE_START, "aioworker_budget"),
        (NO_KIND, "aioworker_worker"),
        (NO_LANES, "aioworker_worker"),
        (NO_TURNS, "aioworker_budget"),
        (NO_ENDS, "aioworker_budget"),
    ],
    ids=["budget", "kind", "lanes", "bulk_next", "ends"],
)
async def test_the_newest_columns_are_added_without_copying_a_row(
    shop: Connection[Cursor], database: Database, version: Path, table: str
) -> None:
    """Else whoever writes the row would wait for the copy."""
    make(shop, version)
    statement = (await schema.changes(database))[table]

    execute(shop, f"{statement}, ALGORITHM=INSTANT")

    assert table not in await schema.changes(database)


async def test_an_upgrade_behind_a_long_transaction_lets_others_through_and_names_it(
    pair: servers.Servers,
    shop: Connection[Cursor],
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever reads the row waits behind a waiting ALTER: workers would stand still."""
    make(shop, ONE_START)
    monkeypatch.setattr(schema, "LOCK_TRIES", 2)
    monkeypatch.setattr(schema, "LOCK_SECONDS", 1)
    told: list[str] = []
    with servers.connect(pair.mysql_url) as holder, holder.cursor() as cursor:
        cursor.execute("START TRANSACTION")
        cursor.execute("SELECT task FROM aioworker_budget")
        cursor.execute("SELECT CONNECTION_ID()")
        [session] = cursor.fetchone() or [0]

        with pytest.raises(DatabaseError) as caught:
            await schema.settle(database, "aioworker_budget", told.append)

        named = rf"(perhaps )?held by session {session} of "
        assert caught.match(
            rf"^no lock on table aioworker_budget at \S+ within 1 s, in 2 tries: {named}"
        )
        [holders] = told
        assert f"session {session} of" in holders
    assert await schema.settle(database, "aioworker_budget") == ADDED


@pytest.mark.parametrize("version", [ONE_START, None], ids=["earlier", "this"])
async def test_a_table_that_the_server_hides_for_a_moment_is_not_said_to_be_made(
    shop: Connection[Cursor],
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
    version: Path | None,
) -> None:
    """MariaDB shows no column while somebody changes it: a DBA read that the pause was gone."""
    if version is not None:
        make(shop, version)
    monkeypatch.setattr(schema, "PAUSE_SECONDS", 0.0)
    look, looks = schema._found, 0

    async def hidden_at_first(database: Database, name: str) -> list[str]:
        nonlocal looks
        looks += 1
        return [] if looks == 1 else await look(database, name)

    monkeypatch.setattr(schema, "_found", hidden_at_first)

    told = await schema.settle(database, "aioworker_budget")

    assert told == ("was there" if version is None else ADDED)
    monkeypatch.undo()
    assert "aioworker_budget" not in await schema.changes(database)
