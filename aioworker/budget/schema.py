"""aioworker's own tables as this version has them, and their change in place.

A table of an earlier version is given the columns that it lacks, and keeps all that is in it.
Workers of that version read and write on beside newer ones: every statement names its columns,
and what came after the first version is NULL or has a default.
"""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from aioworker.budget import tables
from aioworker.errors import DatabaseError
from aioworker.mysql import errors
from aioworker.mysql.errors import ER, MySQLError
from aioworker.words import command

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from aioworker.mysql.database import Database

NAMES = (
    "aioworker_budget",
    "aioworker_worker",
    "aioworker_run",
    "aioworker_start",
    "aioworker_change",
)

# One column a line: these are also what a table of an earlier version is held against.
BUDGET = """CREATE TABLE IF NOT EXISTS aioworker_budget (
    task VARCHAR(190) CHARACTER SET ascii COLLATE ascii_bin NOT NULL PRIMARY KEY,
    last_start DATETIME(6) NOT NULL,
    last_charge DATETIME(6) NULL,
    last_write DATETIME(6) NULL,
    server VARCHAR(100) NOT NULL,
    starts BIGINT UNSIGNED NOT NULL DEFAULT 0,
    holder VARCHAR(190) NULL,
    bulk_next BOOLEAN NOT NULL DEFAULT FALSE,
    paused BOOLEAN NOT NULL DEFAULT FALSE,
    paused_by VARCHAR(190) NULL,
    paused_at DATETIME(6) NULL,
    paused_why VARCHAR(500) NULL,
    paused_until DATETIME(6) NULL,
    paused_until_of DATETIME(6) NULL,
    gap_us BIGINT UNSIGNED NULL,
    set_by VARCHAR(190) NULL,
    set_at DATETIME(6) NULL,
    set_why VARCHAR(500) NULL,
    set_until DATETIME(6) NULL,
    set_until_of DATETIME(6) NULL,
    gap_after_us BIGINT UNSIGNED NULL,
    running TEXT NULL,
    deaths TEXT NULL,
    shares VARCHAR(100) CHARACTER SET ascii COLLATE ascii_bin NULL,
    wants_urgent DATETIME(6) NULL,
    wants_bulk DATETIME(6) NULL,
    urgent_starts BIGINT UNSIGNED NOT NULL DEFAULT 0
) ENGINE=InnoDB ROW_FORMAT=DYNAMIC DEFAULT CHARACTER SET utf8mb4"""

# The first version had no `id`: its rows, and those that its workers write, are told apart by
# what was their key.
WORKER = """CREATE TABLE IF NOT EXISTS aioworker_worker (
    id CHAR(12) CHARACTER SET ascii COLLATE ascii_bin NOT NULL
        DEFAULT (LEFT(SHA2(CONCAT_WS(':', host, pid, task), 256), 12)) PRIMARY KEY,
    host VARCHAR(100) NOT NULL,
    pid INT UNSIGNED NOT NULL,
    task VARCHAR(190) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    version VARCHAR(40) NOT NULL,
    rate VARCHAR(20) NULL,
    session BIGINT UNSIGNED NOT NULL,
    state VARCHAR(20) NOT NULL,
    reason VARCHAR(500) NOT NULL,
    since DATETIME(6) NOT NULL,
    seen DATETIME(6) NOT NULL,
    kind VARCHAR(40) NULL,
    lanes TEXT NULL,
    shares VARCHAR(100) CHARACTER SET ascii COLLATE ascii_bin NULL
) ENGINE=InnoDB ROW_FORMAT=DYNAMIC DEFAULT CHARACTER SET utf8mb4"""

RUN = """CREATE TABLE IF NOT EXISTS aioworker_run (
    task VARCHAR(190) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    message VARCHAR(64) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    together SMALLINT UNSIGNED NOT NULL,
    most SMALLINT UNSIGNED NULL,
    deaths SMALLINT UNSIGNED NOT NULL DEFAULT 0,
    worker VARCHAR(190) NULL,
    since DATETIME(6) NOT NULL,
    PRIMARY KEY (task, message)
) ENGINE=InnoDB ROW_FORMAT=DYNAMIC DEFAULT CHARACTER SET utf8mb4"""

START = """CREATE TABLE IF NOT EXISTS aioworker_start (
    task VARCHAR(190) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    number BIGINT UNSIGNED NOT NULL,
    charged DATETIME(6) NOT NULL,
    gap_us BIGINT UNSIGNED NULL,
    shared VARCHAR(190) CHARACTER SET ascii COLLATE ascii_bin NULL,
    shared_gap_us BIGINT UNSIGNED NULL,
    worker VARCHAR(190) NOT NULL,
    messages SMALLINT UNSIGNED NOT NULL,
    ids INT UNSIGNED NULL,
    first_write DATETIME(6) NULL,
    ended DATETIME(6) NULL,
    changed INT UNSIGNED NULL,
    outcome VARCHAR(20) NULL,
    PRIMARY KEY (task, number),
    KEY task_charged (task, charged),
    KEY shared_charged (shared, charged),
    KEY charged (charged)
) ENGINE=InnoDB ROW_FORMAT=DYNAMIC DEFAULT CHARACTER SET utf8mb4"""

CHANGE = """CREATE TABLE IF NOT EXISTS aioworker_change (
    id BIGINT UNSIGNED NOT NULL AUTO_INCREMENT PRIMARY KEY,
    task VARCHAR(190) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    changed DATETIME(6) NOT NULL,
    who VARCHAR(190) NOT NULL,
    what VARCHAR(190) NOT NULL,
    why VARCHAR(500) NULL,
    KEY changed (task, changed)
) ENGINE=InnoDB ROW_FORMAT=DYNAMIC DEFAULT CHARACTER SET utf8mb4"""

STATEMENTS = dict(zip(NAMES, (BUDGET, WORKER, RUN, START, CHANGE), strict=True))

# Whoever reads the row waits behind an ALTER that waits, so it gives way to them again and again.
LOCK_SECONDS = 2
LOCK_TRIES = 10
PAUSE_SECONDS = 1.0
# The lock was not to be had, or another `init` was first; or the table was there and not seen:
# MariaDB shows no column of one while its definition changes.
_AGAIN = frozenset({ER.LOCK_WAIT_TIMEOUT, ER.DUP_FIELDNAME, ER.TABLE_EXISTS_ERROR})

_COLUMNS = """SELECT LOWER(column_name) FROM information_schema.columns
WHERE table_schema = DATABASE() AND table_name = %s"""
# Who holds a lock on a table: what MySQL tells, and MariaDB if it is set up to. Otherwise it is
# somebody who is in the middle of a transaction.
_HOLDERS = (
    (
        "held by",
        """SELECT processlist_id, processlist_user, processlist_host,
    SYSDATE() - INTERVAL processlist_time SECOND
    FROM performance_schema.metadata_locks
    JOIN performance_schema.threads ON thread_id = owner_thread_id
    WHERE object_type = 'TABLE' AND lock_status = 'GRANTED'
    AND object_schema = DATABASE() AND object_name = %(table)s
    AND processlist_id <> CONNECTION_ID()""",
    ),
    (
        "held by",
        """SELECT id, user, host, SYSDATE() - INTERVAL time SECOND
    FROM information_schema.metadata_lock_info
    JOIN information_schema.processlist ON id = thread_id
    WHERE table_schema = DATABASE() AND table_name = %(table)s
    AND id <> CONNECTION_ID()""",
    ),
    (
        "perhaps held by",
        """SELECT id, user, host, SYSDATE() - INTERVAL time SECOND
    FROM information_schema.innodb_trx
    JOIN information_schema.processlist ON id = trx_mysql_thread_id
    WHERE id <> CONNECTION_ID()""",
    ),
)


async def settle(
    database: Database, name: str, note: Callable[[str], None] = lambda _line: None
) -> str:
    """Make a table that is not there, or add what one of an earlier version lacks.

    Args:
        database: Where the table is.
        name: Its name.
        note: Prints once who holds a lock on it, if that has to be waited for.

    Returns:
        What became of it: `made`, `was there`, or which columns were added.

    Raises:
        DatabaseError: Others held a lock on it all the time; they are named.
        MySQLError: The user may not.
    """
    said = False
    for _ in range(LOCK_TRIES):
        found = await _found(database, name)
        statement = change(name, found)
        if statement is None:
            return "was there"
        try:
            await database.execute(f"SET SESSION lock_wait_timeout = {LOCK_SECONDS}")
            # With IF NOT EXISTS a table that was there would be said to be made.
            await database.execute(statement.replace("TABLE IF NOT EXISTS", "TABLE"))
        except MySQLError as error:
            code = errors.code(error)
            if code not in _AGAIN:
                raise
        else:
            return f"added {', '.join(_lacking(name, found))}" if found else "made"
        if code == ER.LOCK_WAIT_TIMEOUT and not said:
            said = True
            note(f"waiting for a lock on table {name}: {await _holders(database, name)}")
        await asyncio.sleep(PAUSE_SECONDS)
    raise DatabaseError(
        f"no lock on table {name} at {database.address.shown} within {LOCK_SECONDS} s, in"
        f" {LOCK_TRIES} tries: {await _holders(database, name)}; run `{command('init')}` again"
        " when that has ended"
    )


async def changes(database: Database) -> dict[str, str]:
    """Return what makes each table what it is to be, by its name, where some of them are there."""
    found = {name: await _found(database, name) for name in NAMES}
    if not any(found.values()):
        return {}
    wanted = {name: change(name, columns) for name, columns in found.items()}
    return {name: statement for name, statement in wanted.items() if statement is not None}


async def older(database: Database) -> str:
    """Return which tables wait for `init`, and where, or nothing if none does."""
    wanted = await changes(database)
    where = database.address.shown
    return f"{' and '.join(wanted)} at {where}: {tables.older()}" if wanted else ""


def change(name: str, found: Collection[str]) -> str | None:
    """Return the statement that makes a table what it is to be; None if it is that.

    The server chooses the way that disturbs others least: none waits while columns are added.

    Args:
        name: The table's name.
        found: The columns that it has; none, if it is not there.
    """
    if not found:
        return STATEMENTS[name]
    lacking = _lacking(name, found)
    if not lacking:
        return None
    parts = [f"ADD COLUMN {column} {definition}" for column, definition in lacking.items()]
    if any("PRIMARY KEY" in definition for definition in lacking.values()):
        parts.insert(0, "DROP PRIMARY KEY")
    return f"ALTER TABLE {name}\n    " + ",\n    ".join(parts)


def columns(name: str) -> dict[str, str]:
    """Return the definitions of a table's columns, by their names."""
    listed = STATEMENTS[name].partition("(\n    ")[2].rpartition("\n)")[0]
    found = dict(column.split(" ", 1) for column in re.split(r",\n    (?=\w)", listed))
    for key in ("PRIMARY", "KEY"):  # no column
        found.pop(key, None)
    return found


def _lacking(name: str, found: Collection[str]) -> dict[str, str]:
    """Return the definitions of the columns that a table lacks, by their names."""
    return {column: kind for column, kind in columns(name).items() if column not in found}


async def _found(database: Database, name: str) -> list[str]:
    return [column for [column] in await database.query(_COLUMNS, (name,))]


async def _holders(database: Database, name: str) -> str:
    """Return in one line which sessions hold a lock on a table, as far as the server tells."""
    for words, statement in _HOLDERS:
        with suppress(MySQLError):  # not there, or not for this user
            if found := await database.query(statement, {"table": name}):
                return f"{words} {', '.join(map(_session, found))}"
    return "this user cannot see by whom it is held"


def _session(row: tuple[Any, ...]) -> str:
    number, user, host, since = row
    return f"session {number} of {user}@{host} since {since:%Y-%m-%d %H:%M:%S} UTC"
