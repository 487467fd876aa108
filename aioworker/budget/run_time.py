"""What operators set at run time, in the budget's row: a rate, a pause; each may have an end.

Whoever first sees that an end has come, a worker or a command, clears what was set until then: so
workers of an earlier version, which know of no ends, go by it, too. Ends are moments of the
database's clock: if that is set forward or back, they come as much earlier or later.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple

from aioworker.budget import history
from aioworker.budget.tables import PAUSE_END, PAUSE_OVER, RATE_END, RATE_OVER
from aioworker.mysql import errors
from aioworker.mysql.errors import ErrorKind, MySQLError

if TYPE_CHECKING:
    from aioworker.mysql.database import Database

TRIES = 10  # of a statement that the server chose to end a deadlock
TRY_SECONDS = 0.05

# Assigned from left to right; NULL without an end. What was set before without an end counts again
# at this one's.
_SET_RATE = f"""UPDATE aioworker_budget
SET gap_after_us = IF(%(seconds)s IS NULL, NULL, IF({RATE_END} IS NULL, gap_us, gap_after_us)),
    gap_us = %(gap_us)s, set_by = %(who)s, set_why = %(why)s,
    set_at = SYSDATE(6), set_until = set_at + INTERVAL %(seconds)s SECOND, set_until_of = set_at
WHERE task = %(task)s"""
# A pause is not replaced by a shorter one.
_PAUSE = f"""UPDATE aioworker_budget
SET paused = TRUE, paused_by = %(who)s, paused_why = %(why)s,
    paused_at = SYSDATE(6), paused_until = paused_at + INTERVAL %(seconds)s SECOND,
    paused_until_of = paused_at
WHERE task = %(task)s AND (NOT paused
    OR {PAUSE_END} <= COALESCE(SYSDATE(6) + INTERVAL %(seconds)s SECOND, {PAUSE_END}))"""
_RESUME = """UPDATE aioworker_budget
SET paused = FALSE, paused_until = NULL,
    paused_by = %(who)s, paused_at = SYSDATE(6), paused_why = %(why)s
WHERE task = %(task)s"""
_END_RATE = f"""UPDATE aioworker_budget
SET gap_us = gap_after_us, gap_after_us = NULL, set_until = NULL,
    set_by = %(who)s, set_at = SYSDATE(6), set_why = NULL
WHERE task = %(task)s AND {RATE_OVER}"""
_END_PAUSE = f"""UPDATE aioworker_budget
SET paused = FALSE, paused_until = NULL,
    paused_by = %(who)s, paused_at = SYSDATE(6), paused_why = NULL
WHERE task = %(task)s AND {PAUSE_OVER}"""


class Change(NamedTuple):
    """Who changes what, why, and for how long.

    Args:
        who: Who.
        what: What, in a few words.
        why: Why, in one line; None if that is not said.
        seconds: After how many seconds it ends; None for never.
    """

    who: str
    what: str
    why: str | None = None
    seconds: float | None = None


_RATE_ENDED = Change("end", "the rate limit set until then ended")
_PAUSE_ENDED = Change("end", "the pause ended")


async def set_rate(database: Database, task: str, gap_us: int | None, change: Change) -> None:
    """Set the interval between starts of all workers.

    Args:
        database: Where the row is.
        task: Whose.
        gap_us: In microseconds; 0 is no limit, None leaves it to the workers.
        change: By whom, and for how long: then what was set before without an end counts again.

    Raises:
        MySQLError: The row cannot be written; nothing was changed.
    """
    await _change(database, task, _SET_RATE, change, gap_us=gap_us)


async def pause(database: Database, task: str, change: Change) -> bool:
    """Let no start begin; return whether that was set: a longer pause stays.

    Raises:
        MySQLError: The row cannot be written; nothing was changed.
    """
    return await _change(database, task, _PAUSE, change)


async def resume(database: Database, task: str, change: Change) -> None:
    """End a pause.

    Raises:
        MySQLError: The row cannot be written; nothing was changed.
    """
    await _change(database, task, _RESUME, change)


async def clear_ended(database: Database, task: str) -> None:
    """Clear what was set until a moment that has come; somebody else may have done so before.

    Raises:
        MySQLError: The row cannot be written.
    """
    await _change(database, task, _END_RATE, _RATE_ENDED)
    await _change(database, task, _END_PAUSE, _PAUSE_ENDED)


async def _change(
    database: Database, task: str, statement: str, change: Change, **values: object
) -> bool:
    """Change the row, again if that lost a deadlock; return whether there was one to change."""
    arguments = {"task": task, **change._asdict(), **values}
    tries = 0
    while True:
        try:
            return await _change_once(database, statement, arguments)
        except MySQLError as error:
            tries += 1
            if tries == TRIES or errors.kind(error) is not ErrorKind.CONTENTION:
                raise
        await asyncio.sleep(TRY_SECONDS)


async def _change_once(database: Database, statement: str, arguments: dict[str, object]) -> bool:
    """Change the row, and note who did."""
    async with database.transaction() as cursor:
        changed = await cursor.execute(statement, arguments) > 0
        for note in history.CHANGED if changed else ():
            await cursor.execute(note, arguments)
    return changed
