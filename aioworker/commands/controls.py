"""What an operator sets while the workers run: the rate limit, a pause.

It is kept in the task's row of `aioworker_budget`, with who, when and why. Every worker
reads the row at least every two seconds, and all of it outlives them.
"""

from __future__ import annotations

import getpass
import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from aioworker.budget import tables
from aioworker.commands import which_tasks
from aioworker.errors import UsageError
from aioworker.limits import InForce, NoLimit, RateLimit, Source, in_force
from aioworker.tasks.registry import find, registered

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from aioworker.budget.tables import Row
    from aioworker.mysql.database import Database
    from aioworker.settings import Settings

_SET_RATE = """UPDATE aioworker_budget SET gap_us = %(value)s,
    set_by = %(who)s, set_at = SYSDATE(6), set_why = %(why)s WHERE task = %(task)s"""
_SET_PAUSED = """UPDATE aioworker_budget SET paused = %(value)s,
    paused_by = %(who)s, paused_at = SYSDATE(6), paused_why = %(why)s WHERE task = %(task)s"""


async def set_rate(
    settings: Settings, names: Sequence[str], rate: RateLimit | NoLimit | None, why: str | None
) -> str:
    """Set the rate limit of all workers of the task that is meant, or take it back (None).

    Returns:
        What was done, in one line.

    Raises:
        DatabaseError: The row cannot be written; nothing was changed.
        UsageError: No one task is meant, or the budget is each worker's own.
    """
    gap = None if rate is None else 0
    if isinstance(rate, RateLimit):
        if rate.paused:
            return await pause(settings, names, why)
        gap = rate.gap_us
    async with _row(settings, names) as (database, name, before):
        await _set(database, name, _SET_RATE, gap, why)
        own = await tables.rates(database, name)
    was = _shown(rate_in_force(settings, name, before, own))
    now = _shown(rate_in_force(settings, name, before._replace(gap_us=gap), own))
    still = f"; still {before.pause}" if before.pause else ""
    return f"{name}: rate limit {now} (was {was}){still}"


async def pause(settings: Settings, names: Sequence[str], why: str | None) -> str:
    """Let no start of the task that is meant begin any more; one that runs ends as usual.

    Returns:
        What was done, in one line.

    Raises:
        DatabaseError: The row cannot be written; nothing was changed.
        UsageError: No one task is meant, or the budget is each worker's own.
    """
    async with _row(settings, names) as (database, name, before):
        if before.paused:
            return f"{name}: {before.pause}; nothing was changed"
        await _set(database, name, _SET_PAUSED, True, why)
    return f"{name}: paused; what runs ends, nothing new begins"


async def resume(settings: Settings, names: Sequence[str], why: str | None) -> str:
    """End a pause of the task that is meant.

    Returns:
        What was done, in one line.

    Raises:
        DatabaseError: The row cannot be written; nothing was changed.
        UsageError: No one task is meant, or the budget is each worker's own.
    """
    async with _row(settings, names) as (database, name, before):
        own = await tables.rates(database, name)
        rate = _shown(rate_in_force(settings, name, before, own))
        if not before.paused:
            return f"{name}: not paused, rate limit {rate}; nothing was changed"
        await _set(database, name, _SET_PAUSED, False, why)
    return f"{name}: resumed, rate limit {rate}"


def rate_in_force(settings: Settings, name: str, row: Row | None, workers: set[str]) -> InForce:
    """Return the rate limit in force, as far as this process can know it.

    Args:
        settings: This process's settings.
        name: The task's name; its own rate is known if its module is imported here.
        row: The task's row; None where there is none.
        workers: The rates that its workers have of their own.
    """
    own = find(name).rate_limit or NoLimit.NONE if name in registered() else None
    return in_force(own, settings.rate_limit, row, workers)


def _shown(force: InForce) -> str:
    """Return a rate limit and where it comes from."""
    if force.source is Source.UNKNOWN:
        return "each worker's own"
    return f"{force.rate}, {force.source}"


@asynccontextmanager
async def _row(
    settings: Settings, names: Sequence[str]
) -> AsyncIterator[tuple[Database, str, Row]]:
    """Yield the database, the task that is meant, and its row.

    Raises:
        UsageError: The budget is each worker's own, and none would follow a row.
    """
    if settings.budget != "shared":
        raise UsageError(
            "AIOWORKER_BUDGET=worker: each worker keeps its own budget, and nothing can be set"
            " at run time"
        )
    async with settings.database(locks=False) as database:
        name = which_tasks.only(await which_tasks.of_table(database, names))
        with tables.explaining(database):
            yield database, name, await tables.read(database, name)


async def _set(
    database: Database, name: str, statement: str, value: object, why: str | None
) -> None:
    arguments = {"value": value, "who": _operator(), "why": why, "task": name}
    await database.execute(statement, arguments)


def _operator() -> str:
    """Return who gives the order, as this machine knows it."""
    try:
        return (os.environ.get("SUDO_USER") or getpass.getuser())[:190]
    except (KeyError, OSError):  # a user without a name, as in a container
        return f"uid {os.getuid()}"
