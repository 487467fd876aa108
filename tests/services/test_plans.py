"""What the statements look at: the same wherever a page or a chunk lies in a large table."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import pytest

from aioworker import repo
from aioworker.addresses import DatabaseAddress
from support import servers
from tests.conftest import execute, make_database, simple_addons

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

    from aioworker.mysql.database import Database

ROWS = 2**20
LOOKED_AT = "SHOW SESSION STATUS WHERE variable_name REGEXP '^Handler_(read_|icp_attempts)'"


@pytest.fixture(scope="module")
def large(pair: servers.Servers) -> Iterator[servers.Servers]:
    """The servers, with a database of a million add-ons and the indexes that such a site has."""
    found = dataclasses.replace(pair, mysql_url=f"{pair.mysql_url}_large")
    with servers.connect(found.mysql_url, create=True) as connection:
        execute(
            connection,
            "CREATE TABLE addons (id INT UNSIGNED PRIMARY KEY, addontype_id INT UNSIGNED NOT NULL,"
            " status TINYINT UNSIGNED NOT NULL, inactive TINYINT UNSIGNED NOT NULL)",
            "INSERT INTO addons VALUES (1, 1, 4, 0)",
            *(
                f"INSERT INTO addons SELECT id + {2**power}, 1, 4, 0 FROM addons"
                for power in range(ROWS.bit_length() - 1)
            ),
            "ALTER TABLE addons ADD KEY inactive (inactive), ADD KEY status (status)",
            "ANALYZE TABLE addons",
        )
        yield found
        execute(connection, f"DROP DATABASE {DatabaseAddress.parse(found.mysql_url).database}")


@pytest.fixture
async def million(large: servers.Servers) -> AsyncIterator[Database]:
    """The large database as the worker uses it."""
    made = make_database(large)
    yield made
    made.close()


async def looked_at(database: Database, statement: str, args: object) -> int:
    """Run a statement and return how many rows and index entries the server read for it."""
    before, _found, after = [
        await database.query(*call) for call in ((LOOKED_AT,), (statement, args), (LOOKED_AT,))
    ]
    return sum(int(value) for _name, value in after) - sum(int(value) for _name, value in before)


async def test_a_page_of_a_sweep_costs_the_same_wherever_it_lies(million: Database) -> None:
    """Else a sweep costs the square of its table: hours, where it could take minutes."""
    first, middle, last = [
        await looked_at(million, repo.PAGE, (after, repo.PAGE_SIZE))
        for after in (0, ROWS // 2, ROWS - repo.PAGE_SIZE)
    ]

    assert pytest.approx(first, rel=0.1) == middle
    assert pytest.approx(first, rel=0.1) == last
    assert first < 3 * repo.PAGE_SIZE


async def test_the_size_of_a_sweep_is_one_look_at_each_row(million: Database) -> None:
    assert await looked_at(million, repo.SIZE, (0,)) < 1.1 * ROWS
    assert await looked_at(million, repo.SIZE, (ROWS - 1000,)) < 1100


async def test_a_page_of_personas_is_not_the_end_of_a_sweep(
    database: Database, shop: Connection[Cursor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the rows of a page those are left that are swept; there may be none."""
    monkeypatch.setattr(repo, "PAGE_SIZE", 3)
    simple_addons(shop, 12)
    execute(shop, "UPDATE addons SET addontype_id = 9 WHERE id BETWEEN 3 AND 9")

    pages = [page async for page in repo.swept_ids(database, 1)]

    assert pages == [[2], [10], [11, 12]]
    assert await repo.count_swept(database, 1) == 4


async def test_a_chunk_costs_what_is_of_its_own_add_ons(
    database: Database, shop: Connection[Cursor]
) -> None:
    """Each row by an index: what lies beside it in the tables is not looked at."""
    simple_addons(shop, 4000)
    execute(shop, "ANALYZE TABLE addons, versions, files")

    first, last = [
        await looked_at(database, repo.STALE, (json.dumps([*range(after + 1, after + 1001)]),))
        for after in (0, 3000)
    ]
    written = await looked_at(database, repo.WRITE, (json.dumps([(9, 0, 0)] * 100),))

    assert pytest.approx(first, rel=0.1) == last
    assert first < 10 * 1000
    assert written < 10 * 100


async def test_only_the_files_of_a_newest_version_that_qualifies_are_looked_at(
    database: Database, shop: Connection[Cursor]
) -> None:
    """Of an add-on with many versions, they would be most of what is read."""
    simple_addons(shop, 10)
    execute(
        shop,
        "INSERT INTO versions (addon_id, version, created, modified)"
        " SELECT id, 'old', '2001-01-01', '2001-01-01' FROM addons JOIN"
        " (WITH RECURSIVE n AS (SELECT 1 AS i UNION ALL SELECT i + 1 FROM n WHERE i < 100)"
        " SELECT i FROM n) AS numbers",
    )
    execute(shop, "INSERT INTO files (version_id, status) SELECT id, 4 FROM versions")
    execute(shop, "ANALYZE TABLE addons, versions, files")
    ids = json.dumps([*range(1, 11)])

    newest = await looked_at(database, repo.STALE, (ids,))
    execute(
        shop,
        "UPDATE files JOIN versions ON versions.id = version_id SET status = 5"
        " WHERE version <> 'old'",
    )
    others = await looked_at(database, repo.STALE, (ids,))

    assert newest < 10 * 150  # a hundred versions each, and the files of one
    assert others > 10 * 250
