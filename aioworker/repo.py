"""All SQL of the main job: which add-ons are stale, and the write of the right answer.

The rule: an add-on's current version is the newest (by `created`, `modified`, `id`) of its
versions that qualify. Self-hosted add-ons (status 6): every version. Public ones (4): those
that have files, all of them public. Others: those that have files, all of them of a valid
status. Personas (type 9) have none. Nothing found is NULL. It is the rule of
addons.mozilla.org's code base in May 2010.

A chunk is read without locks and written in short transactions by primary key, each row
only where it still holds what was read: an answer computed from older rows never
overwrites a newer one. Dates are compared in SQL, where zero dates sort oldest; drivers
turn them into other things.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple

from aioworker.errors import RowsContendedError
from aioworker.mysql import errors
from aioworker.mysql.errors import MySQLError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from aioworker.mysql.database import Database

TASK = "update_current_version"
PAGE_SIZE = 5000  # rows that are looked at for a page
TRANSACTION_SIZE = 100
READS_AGAIN = 3
LARGEST_ID = 2**32 - 1  # of an INT UNSIGNED

# The comment shows in the server's list of processes.
_COMMENT = f"/* aioworker {TASK} */"

# The rows are found by their primary key alone: with these conditions in the WHERE, MariaDB reads
# the index of `inactive` from its beginning for each page, and a sweep costs the square of the
# table. A page is one row of text for the reason below: a list of its ids.
_SWEPT = "IF(status IN (1, 2, 3, 4, 6, 7) AND inactive = 0 AND addontype_id <> 9, id, NULL)"
PAGE = f"""SELECT {_COMMENT} MAX(id), GROUP_CONCAT({_SWEPT} ORDER BY id) FROM (
SELECT id, status, inactive, addontype_id FROM addons WHERE id > %s ORDER BY id LIMIT %s) AS page"""
SIZE = f"SELECT {_COMMENT} COUNT({_SWEPT}) FROM addons WHERE id > %s"

# Files are judged by one aggregate: MariaDB answers EXISTS and NOT EXISTS by reading the
# whole index of files, three times slower.
_QUALIFIES = """(addon.status = 6 OR (
    SELECT COALESCE(MIN(IF(addon.status = 4, file.status = 4,
        file.status IN (1, 2, 3, 4, 6, 7))), 0)
    FROM files AS file WHERE file.version_id = version.id))"""
_NEWEST = "ORDER BY version.created DESC, version.modified DESC, version.id DESC LIMIT 1"

# The newest version of most add-ons qualifies. So its files are looked at first, and those of the
# others only if it does not. The LIMIT that limits nothing keeps the condition
# out of the inner query, where each stale row's answer would be worked out a second time. The
# answer is one row of JSON: aiomysql takes a dozen milliseconds for a thousand rows.
STALE = f"""SELECT {_COMMENT} JSON_ARRAYAGG(JSON_ARRAY(id, missing, held, answer)) FROM (
SELECT chunk.id, addon.id IS NULL AS missing, addon.current_version AS held,
    IF(addon.addontype_id <> 9, COALESCE(
        (SELECT IF({_QUALIFIES}, version.id, NULL)
            FROM versions AS version WHERE version.addon_id = addon.id {_NEWEST}),
        (SELECT version.id
            FROM versions AS version WHERE version.addon_id = addon.id AND {_QUALIFIES} {_NEWEST})
    ), NULL) AS answer
FROM JSON_TABLE(%s, '$[*]' COLUMNS (id INT UNSIGNED PATH '$')) AS chunk
LEFT JOIN addons AS addon ON addon.id = chunk.id
LIMIT 18446744073709551615) AS answers
WHERE missing OR NOT (held <=> answer)"""

WRITE = f"""UPDATE {_COMMENT} JSON_TABLE(%s, '$[*]' COLUMNS (id INT UNSIGNED PATH '$[0]',
    held INT UNSIGNED PATH '$[1]', answer INT UNSIGNED PATH '$[2]')) AS stale
STRAIGHT_JOIN addons AS addon ON addon.id = stale.id
SET addon.current_version = stale.answer WHERE addon.current_version <=> stale.held"""

# The least that a user needs for these statements: privilege, table.
PRIVILEGES = (
    ("SELECT", "addons"),
    ("SELECT", "versions"),
    ("SELECT", "files"),
    ("UPDATE (current_version)", "addons"),
)


class Stale(NamedTuple):
    """An add-on whose stored version is not the right one."""

    addon_id: int
    stored: int | None
    answer: int | None


@dataclass(slots=True)
class Refresh:
    """What a refresh of a chunk came to.

    Args:
        changed: The ids of the rows that were written. Of rows that somebody else changed at the
            same time, only how many were is sure.
        missing: Ids of which there is no add-on.
        refused: The server's words for each id whose row the data refused.
    """

    changed: list[int] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)
    refused: dict[int, str] = field(default_factory=dict)


async def swept_ids(database: Database, after: int) -> AsyncIterator[list[int]]:
    """Yield the ids of the add-ons that a sweep refreshes, ascending, in pages.

    Those whose current version is NULL are among them: they need it most.

    Args:
        database: Where the add-ons are.
        after: Begin behind this id; 0 is the beginning.
    """
    last: int | None = after
    while last is not None:
        [[last, ids]] = await database.query(PAGE, (last, PAGE_SIZE))
        if ids:
            yield json.loads(f"[{ids}]")


async def count_swept(database: Database, after: int) -> int:
    """Count the add-ons whose ids `swept_ids` yields."""
    [[size]] = await database.query(SIZE, (after,))
    return int(size)


async def read_stale(database: Database, ids: Sequence[int]) -> tuple[list[Stale], list[int]]:
    """Return the stale add-ons among *ids*, by id, and the ids that do not exist.

    Takes no lock.
    """
    [[answers]] = await database.query(STALE, (json.dumps(list(ids)),))
    rows = sorted(json.loads(answers or "[]"), key=itemgetter(0))
    stale = [Stale(row[0], row[2], row[3]) for row in rows if not row[1]]
    return stale, [row[0] for row in rows if row[1]]


async def refresh(database: Database, ids: Sequence[int], result: Refresh | None = None) -> Refresh:
    """Write the right version into every stale add-on among *ids*.

    Transactions of 100 rows in the order of their ids; the other rows of one that the data
    refuses are written one by one. No ids at all: sees that it may read and write.

    Args:
        database: Where the add-ons are.
        ids: The add-ons.
        result: What is returned, filled as it goes, so that it is right after an error too.

    Raises:
        RowsContendedError: A row changed again between read and write, four times.
        MySQLError: The server refused for another reason than the data; what was
            committed before stays.
    """
    result = result or Refresh()
    stale, result.missing = await read_stale(database, ids)
    if not ids:
        await _write(database, [])
    for start in range(0, len(stale), TRANSACTION_SIZE):
        await _settle(database, stale[start : start + TRANSACTION_SIZE], result)
    return result


async def _settle(database: Database, rows: list[Stale], result: Refresh) -> None:
    """Write up to 100 rows, reading again those that were lost to another writer."""
    for _ in range(1 + READS_AGAIN):
        refusal = None
        try:
            written = await _write(database, rows)
        except MySQLError as error:
            written = 0
            if errors.kind(error) is errors.ErrorKind.DATA:
                refusal = error
            elif errors.code(error) not in errors.DEADLOCKS:
                raise
        ids = [row.addon_id for row in rows]
        if written == len(rows):
            result.changed += ids
            return
        again = rows
        try:
            again, _missing = await read_stale(database, ids)
        finally:
            left = {row.addon_id for row in again}
            result.changed += sorted(ids, key=left.__contains__)[:written]
        if refusal is not None and len(rows) > 1:
            for row in again:
                await _settle(database, [row], result)
            return
        if refusal is not None and again == rows:
            result.refused[rows[0].addon_id] = errors.describe(refusal)
            return
        if not again:
            return
        rows = again
    raise RowsContendedError(
        f"rows changed {1 + READS_AGAIN} times between read and write, the first of them"
        f" add-on {rows[0].addon_id}; {len(rows)} left for the next attempt"
    )


async def _write(database: Database, rows: list[Stale]) -> int:
    """Write rows that still hold what was read, in one transaction; return how many did."""
    return await database.execute(WRITE, (json.dumps(rows),))
