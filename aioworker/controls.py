"""What an operator sets while the workers run: the rate limit, a pause.

It is kept in the task's row of `aioworker_budget`, with who, when and why. Every worker
reads the row at least every two seconds, and all of it outlives them.
"""

from __future__ import annotations

import getpass
import os
from typing import TYPE_CHECKING

from aioworker import tables
from aioworker.console import say
from aioworker.errors import UsageError
from aioworker.limits import RateLimit, shown_interval

if TYPE_CHECKING:
    from aioworker.db import Database
    from aioworker.settings import Settings
    from aioworker.tables import Row
    from aioworker.task import AnyTask

REASON_LENGTH = 500

_SET_RATE = """UPDATE aioworker_budget SET gap_us = %(value)s,
    set_by = %(who)s, set_at = SYSDATE(6), set_why = %(why)s WHERE task = %(task)s"""
_SET_PAUSED = """UPDATE aioworker_budget SET paused = %(value)s,
    paused_by = %(who)s, paused_at = SYSDATE(6), paused_why = %(why)s WHERE task = %(task)s"""


async def set_rate(
    settings: Settings, task: AnyTask, rate: RateLimit | None, why: str | None
) -> None:
    """Set the rate limit of all workers, or take it back (None).

    Raises:
        DatabaseError: The row cannot be written; nothing was changed.
    """
    if rate is not None and rate.paused:
        await pause(settings, task, why)
        return
    gap = None if rate is None else rate.gap_us
    async with settings.database() as database:
        before = await _row(database, task)
        await _set(database, task, _SET_RATE, gap, why)
        was, now = (limit_in_force(settings, task, g) for g in (before.gap_us, gap))
        still = f"; still {before.pause}" if before.paused else ""
        say(f"{task.name}: rate limit {now} (was {was}){still}")


async def pause(settings: Settings, task: AnyTask, why: str | None) -> None:
    """Let no start begin any more; one that runs ends as usual.

    Raises:
        DatabaseError: The row cannot be written; nothing was changed.
    """
    async with settings.database() as database:
        before = await _row(database, task)
        if before.paused:
            say(f"{task.name}: {before.pause}; nothing was changed")
            return
        await _set(database, task, _SET_PAUSED, True, why)
        say(f"{task.name}: paused; what runs ends, nothing new begins")


async def resume(settings: Settings, task: AnyTask, why: str | None) -> None:
    """End a pause.

    Raises:
        DatabaseError: The row cannot be written; nothing was changed.
    """
    async with settings.database() as database:
        before = await _row(database, task)
        if not before.paused:
            limit = limit_in_force(settings, task, before.gap_us)
            say(f"{task.name}: not paused, rate limit {limit}; nothing was changed")
            return
        await _set(database, task, _SET_PAUSED, False, why)
        say(f"{task.name}: resumed, rate limit {limit_in_force(settings, task, before.gap_us)}")


def limit_in_force(settings: Settings, task: AnyTask, gap_us: int | None) -> str:
    """Return the rate limit and where it comes from, in words."""
    limit, source = limit_and_source(settings, task, gap_us)
    return f"{limit}, {source}"


def limit_and_source(settings: Settings, task: AnyTask, gap_us: int | None) -> tuple[str, str]:
    """Return the rate limit, `none` where there is none, and `run time`, `setting` or `task`."""
    if gap_us is not None:
        return shown_interval(gap_us), "run time"
    if settings.rate_limit is not None:
        return str(settings.rate_limit), "setting"
    return str(task.rate_limit or "none"), "task"


def checked_reason(settings: Settings, why: str | None) -> str | None:
    """Return a reason as it is kept, in one line; refuse what no worker would follow.

    Raises:
        UsageError: The budget is each worker's own, or the reason cannot be kept.
    """
    if settings.budget != "shared":
        raise UsageError(
            "AIOWORKER_BUDGET=worker: each worker keeps its own budget, and nothing can be set"
            " at run time"
        )
    if why is None:
        return None
    line = " ".join(why.split())
    if len(line) > REASON_LENGTH or not line.isprintable():
        raise UsageError(
            f"--reason: expected up to {REASON_LENGTH} printable characters,"
            f" got: {len(line)}, beginning with {line[:20]!r}"
        )
    return line


async def _row(database: Database, task: AnyTask) -> Row:
    with tables.explaining(database):
        return await tables.read(database, task.name)


async def _set(
    database: Database, task: AnyTask, statement: str, value: object, why: str | None
) -> None:
    arguments = {"value": value, "who": _operator(), "why": why, "task": task.name}
    with tables.explaining(database):
        await database.execute(statement, arguments)


def _operator() -> str:
    """Return who gives the order, as this machine knows it."""
    try:
        return (os.environ.get("SUDO_USER") or getpass.getuser())[:190]
    except (KeyError, OSError):  # a user without a name, as in a container
        return f"uid {os.getuid()}"
