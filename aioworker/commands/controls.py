"""What an operator sets while the workers run: the rate limit, a pause.

It is kept in the task's row of `aioworker_budget`, with who, when and why. Every worker
reads the row at least every two seconds, and all of it outlives them.
"""

from __future__ import annotations

import getpass
import os
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from aioworker.budget import tables
from aioworker.commands import meant
from aioworker.errors import UsageError
from aioworker.limits import InForce, NoLimit, RateLimit, in_force
from aioworker.tasks.registry import find, registered

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from aioworker.budget.tables import Row
    from aioworker.mysql.database import Database
    from aioworker.settings import Settings

REASON_LENGTH = 500

_SET_RATE = """UPDATE aioworker_budget SET gap_us = %(value)s,
    set_by = %(who)s, set_at = SYSDATE(6), set_why = %(why)s WHERE task = %(task)s"""
_SET_PAUSED = """UPDATE aioworker_budget SET paused = %(value)s,
    paused_by = %(who)s, paused_at = SYSDATE(6), paused_why = %(why)s WHERE task = %(task)s"""


@dataclass(frozen=True, slots=True)
class RateSet:
    """A rate limit that was set or taken back.

    Args:
        task: The task.
        rate: What is in force now.
        before: What was in force before.
        pause: Who paused the task and why; empty if it is not paused.
    """

    task: str
    rate: InForce
    before: InForce
    pause: str


@dataclass(frozen=True, slots=True)
class Paused:
    """A task that is paused.

    Args:
        task: The task.
        earlier: Who had paused it before, and why: nothing was changed then. Empty for nobody.
    """

    task: str
    earlier: str


@dataclass(frozen=True, slots=True)
class Resumed:
    """A task that nobody pauses any more.

    Args:
        task: The task.
        rate: What is in force now.
        changed: Whether it was paused.
    """

    task: str
    rate: InForce
    changed: bool


async def set_rate(
    settings: Settings, names: Sequence[str], rate: RateLimit | NoLimit | None, why: str | None
) -> RateSet | Paused:
    """Set the rate limit of all workers of the task that is meant, or take it back (None).

    Raises:
        DatabaseError: The row cannot be written; nothing was changed.
        UsageError: No one task is meant.
    """
    gap: int | None = None
    if isinstance(rate, RateLimit):
        if rate.paused:
            return await pause(settings, names, why)
        gap = rate.gap_us
    elif rate is NoLimit.NONE:
        gap = 0
    async with _row(settings, names) as (database, name, before):
        await _set(database, name, _SET_RATE, gap, why)
        own = await tables.rates(database, name)
        was, now = (
            rate_in_force(settings, name, row, own) for row in (before, replace(before, gap_us=gap))
        )
        return RateSet(name, now, was, before.pause)


async def pause(settings: Settings, names: Sequence[str], why: str | None) -> Paused:
    """Let no start of the task that is meant begin any more; one that runs ends as usual.

    Raises:
        DatabaseError: The row cannot be written; nothing was changed.
        UsageError: No one task is meant.
    """
    async with _row(settings, names) as (database, name, before):
        if not before.paused:
            await _set(database, name, _SET_PAUSED, True, why)
        return Paused(name, before.pause)


async def resume(settings: Settings, names: Sequence[str], why: str | None) -> Resumed:
    """End a pause of the task that is meant.

    Raises:
        DatabaseError: The row cannot be written; nothing was changed.
        UsageError: No one task is meant.
    """
    async with _row(settings, names) as (database, name, before):
        own = await tables.rates(database, name)
        if before.paused:
            await _set(database, name, _SET_PAUSED, False, why)
        return Resumed(name, rate_in_force(settings, name, before, own), before.paused)


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


@asynccontextmanager
async def _row(
    settings: Settings, names: Sequence[str]
) -> AsyncIterator[tuple[Database, str, Row]]:
    """Yield the database, the task that is meant, and its row."""
    async with settings.database(locks=False) as database:
        name = meant.only(await meant.of_table(database, names))
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
