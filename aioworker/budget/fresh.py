"""Forgetting what a database knows of the tasks' runs: in a copy, all of it is the original's.

Every row of the budget becomes as `init` makes it, also those of tasks that this code does not
name: a worker of another app that works there would wait for a row that is gone.

Who is alive there is told by the copy, too: workers of the original were seen a moment ago, but not
here. A worker writes this server's name into its task's row before it starts anything, and the copy
has the original's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aioworker.budget import schema, tables
from aioworker.budget.tables import ALIVE_SECONDS, GAP_US, PAUSE_OVER, SERVER
from aioworker.errors import DatabaseError
from aioworker.mysql import errors
from aioworker.mysql.errors import ER, MySQLError
from aioworker.words import command, count, moment

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aioworker.mysql.database import Cursor, Database

# Workers charge no start meanwhile.
_LOCK = "SELECT task FROM aioworker_budget ORDER BY task FOR UPDATE"
_AS_NEW = {"last_start": f"'{tables.LONG_AGO}'", "server": SERVER}
_RESET = "UPDATE aioworker_budget\nSET " + ",\n    ".join(
    f"{column} = {_AS_NEW.get(column, 'DEFAULT')}"
    for column in schema.columns("aioworker_budget")
    if column != "task"
)
# What was forgotten by each, in words.
_DELETE = {
    "run note": "DELETE FROM aioworker_run",
    "start": "DELETE FROM aioworker_start",
    "change": "DELETE FROM aioworker_change",
    "worker": "DELETE FROM aioworker_worker",
}
_COUNT = f"""SELECT COALESCE(SUM(paused AND NOT {PAUSE_OVER}), 0),
    COALESCE(SUM({GAP_US} IS NOT NULL), 0),
    COALESCE(SUM(running IS NOT NULL OR deaths IS NOT NULL), 0)
FROM aioworker_budget"""

_TASKS = "SELECT task FROM aioworker_budget ORDER BY task"
_TURN = "SELECT IS_USED_LOCK(%(lock)s)"
# MariaDB reads the first of these, MySQL the second: it warns of the other one.
_SESSIONS = "/*M! information_schema.processlist */ /*!80022 performance_schema.processlist */"
# Without a row of its task nobody can tell whose worker it is. Of all columns, the first version
# had these.
_WORKERS = f"""SELECT host, pid, worker.task, TIMESTAMPDIFF(SECOND, seen, SYSDATE(6)),
    seen + INTERVAL {ALIVE_SECONDS} SECOND
FROM aioworker_worker AS worker LEFT JOIN aioworker_budget AS budget ON budget.task = worker.task
WHERE seen > SYSDATE(6) - INTERVAL {ALIVE_SECONDS} SECOND AND (
    COALESCE(server = {SERVER}, TRUE)
    OR session IN (
        SELECT id FROM {_SESSIONS}
        WHERE db = DATABASE() AND id <> CONNECTION_ID()
    )
) ORDER BY host, pid, worker.task"""


async def refuse_workers(database: Database) -> None:
    """See that no worker is alive there; before `init` there is none.

    Raises:
        DatabaseError: One is, or holds a turn.
    """
    with tables.explaining(database):
        try:
            async with database.transaction() as cursor:
                await _see_that_nobody_works(database, cursor)
        except MySQLError as error:
            if errors.code(error) != ER.NO_SUCH_TABLE:
                raise


async def forget(database: Database, keys: Sequence[str]) -> str:
    """Forget all, in one transaction, and make the rows that are not there.

    Args:
        database: Where.
        keys: The rows' keys.

    Returns:
        How much was forgotten, in words.

    Raises:
        DatabaseError: A worker is alive there, or the user may not; nothing was changed.
    """
    with tables.explaining(database):
        async with database.transaction() as cursor:
            await cursor.execute(_LOCK)
            await _see_that_nobody_works(database, cursor)
            await cursor.execute(_COUNT)
            pauses, rates, notes = map(int, await cursor.fetchone())
            await cursor.execute(_RESET)
            forgotten = {"pause": pauses, "rate": rates, "run note": notes}
            for what, statement in _DELETE.items():
                forgotten[what] = forgotten.get(what, 0) + await cursor.execute(statement)
            for key in keys:
                await cursor.execute(tables.FIRST_ROW, {"task": key})
    return f"forgot {', '.join(count(number, what) for what, number in forgotten.items())}"


def statements(keys: Sequence[str]) -> list[str]:
    """Return what `forget` runs, for a person to read.

    Args:
        keys: The keys of the rows that it makes, as a statement has them.
    """
    rows = [tables.FIRST_ROW % {"task": key} for key in keys]
    return ["START TRANSACTION", _LOCK, _RESET, *_DELETE.values(), *rows, "COMMIT"]


async def _see_that_nobody_works(database: Database, cursor: Cursor) -> None:
    found = []
    until = None
    await cursor.execute(_WORKERS)
    for host, pid, task, age, end in await cursor.fetchall():
        found.append(f"{host}:{pid} of {task}, seen {max(age, 0)} s ago")
        until = end if until is None else max(until, end)
    await cursor.execute(_TASKS)
    for [task] in await cursor.fetchall():
        await cursor.execute(_TURN, {"lock": tables.lock_name(await database.schema(), task)})
        [session] = await cursor.fetchone()
        if session is not None:
            found.append(f"session {session} in the turn of {task}")
    if found:
        killed = f"; one that was killed counts until {moment(until)}" if until else ""
        raise DatabaseError(
            f"expected no worker alive at {database.address.shown}, got: {', '.join(found)};"
            f" nothing was changed: end it, then run `{command('init --fresh')}` again{killed}"
        )
