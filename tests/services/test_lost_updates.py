"""Another writer between our read and our write: nothing newer is overwritten."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from aioworker import repo
from aioworker.errors import RowsContendedError
from aioworker.mysql.database import Database
from support import servers
from tests.conftest import current_versions, execute, make_database, rows, simple_addons

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

IDS = list(range(1, 1001))


class Raced(Database):
    """Lets another writer go first, before each of its writes."""

    other_writer: Callable[[int], None]
    writes = 0

    async def execute(self, statement: str, args: object = None) -> int:
        """Let the other writer commit, then write."""
        self.writes += 1
        self.other_writer(self.writes)
        return await super().execute(statement, args)


@pytest.fixture
def raced(pair: servers.Servers, shop: Connection[Cursor]) -> Raced:
    """A thousand stale add-ons, and a database whose reads are overtaken."""
    simple_addons(shop, 1000)
    made = make_database(pair, Raced)
    assert isinstance(made, Raced)
    return made


def add_version(shop: Connection[Cursor], addon: int, version: int) -> None:
    """Publish a newer version of an add-on and make it the current one."""
    execute(
        shop,
        "INSERT INTO versions (id, addon_id, version, created, modified)"
        f" VALUES ({version}, {addon}, '2.0', '2010-02-01', '2010-02-01')",
        f"INSERT INTO files (version_id, status) VALUES ({version}, 4)",
        f"UPDATE addons SET current_version = {version} WHERE id = {addon}",
    )


async def test_a_newer_answer_of_another_writer_is_not_overwritten(
    raced: Raced, shop: Connection[Cursor]
) -> None:
    def other_writer(write: int) -> None:
        if write == 1:
            add_version(shop, 7, 50_007)

    raced.other_writer = other_writer

    result = await repo.refresh(raced, IDS)

    assert current_versions(shop) == {n: n + 10_000 for n in IDS} | {7: 50_007}
    assert (len(result.changed), raced.writes) == (999, 10)
    raced.close()


async def test_a_row_changed_to_another_wrong_value_is_read_again(
    raced: Raced, shop: Connection[Cursor]
) -> None:
    """Compare-and-set loses it, and the second read finds it."""

    def other_writer(write: int) -> None:
        if write == 1:
            execute(shop, "UPDATE addons SET current_version = 10001 WHERE id = 7")

    raced.other_writer = other_writer

    result = await repo.refresh(raced, IDS)

    assert current_versions(shop) == {n: n + 10_000 for n in IDS}
    assert (len(result.changed), raced.writes) == (1000, 11)
    raced.close()


async def test_a_winning_version_that_is_deleted_meanwhile_loses_no_other_row(
    raced: Raced, shop: Connection[Cursor]
) -> None:
    """Error 1452 on the write: that add-on is read again and becomes NULL."""

    def other_writer(write: int) -> None:
        if write == 1:
            execute(
                shop,
                "DELETE FROM files WHERE version_id = 10007",
                "DELETE FROM versions WHERE id = 10007",
                "UPDATE addons SET current_version = NULL WHERE id = 7",
            )

    raced.other_writer = other_writer

    result = await repo.refresh(raced, IDS)

    assert current_versions(shop) == {n: n + 10_000 for n in IDS} | {7: None}
    assert (len(result.changed), result.refused) == (999, {})
    raced.close()


async def test_an_add_on_deleted_meanwhile_is_left_out(
    raced: Raced, shop: Connection[Cursor]
) -> None:
    def other_writer(write: int) -> None:
        if write == 1:
            execute(
                shop,
                "DELETE FROM files WHERE version_id = 10007",
                "DELETE FROM versions WHERE id = 10007",
                "DELETE FROM addons WHERE id = 7",
            )

    raced.other_writer = other_writer

    result = await repo.refresh(raced, IDS)

    assert rows(shop, "SELECT COUNT(*), SUM(current_version = id + 10000) FROM addons") == [
        (999, 999)
    ]
    assert len(result.changed) == 999
    raced.close()


async def test_a_row_that_changes_every_time_is_left_for_the_next_attempt(
    raced: Raced, shop: Connection[Cursor]
) -> None:
    """Four writes lost to the same writer: the rest waits, the others stay written."""

    def other_writer(write: int) -> None:
        wrong = 10_001 + write % 2
        execute(shop, f"UPDATE addons SET current_version = {wrong} WHERE id = 7")

    raced.other_writer = other_writer

    with pytest.raises(RowsContendedError) as contended:
        await repo.refresh(raced, [5, 6, 7])

    assert str(contended.value) == (
        "rows changed 4 times between read and write, the first of them add-on 7;"
        " 1 left for the next attempt"
    )
    assert raced.writes == 4
    assert {n: current_versions(shop)[n] for n in (5, 6)} == {5: 10_005, 6: 10_006}
    raced.close()
