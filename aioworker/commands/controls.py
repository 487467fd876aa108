"""What an operator sets while the workers run: the rate limit, a pause; for a while, or for good.

It is kept in the task's row of `aioworker_budget`, with who, when and why. Every worker
reads the row at least every two seconds, and all of it outlives them.
"""

from __future__ import annotations

import getpass
import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, NamedTuple

from aioworker.budget import run_time, tables
from aioworker.budget.pace import budget_name
from aioworker.budget.run_time import Change
from aioworker.commands import which_tasks
from aioworker.errors import AioworkerError, DatabaseError, UsageError
from aioworker.limits import InForce, NoLimit, RateLimit, Source, in_force
from aioworker.tasks.registry import find, registered
from aioworker.words import duration, moment

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from datetime import datetime

    from aioworker.budget.tables import Row
    from aioworker.mysql.database import Database
    from aioworker.settings import Settings


class Instruction(NamedTuple):
    """What an operator says beside what is to be done.

    Args:
        why: Why, in one line; None if that is not said.
        seconds: For how long; None for good.
        budget: The budget that tasks share which is meant; None if it is a task.
        every: Whether all tasks and budgets of the database are meant, one after the other.
    """

    why: str | None = None
    seconds: int | None = None
    budget: str | None = None
    every: bool = False

    def change(self, what: str) -> Change:
        """Return the same, with who does what."""
        span = "" if self.seconds is None else f" for {duration(self.seconds)}"
        return Change(_operator(), what + span, self.why, self.seconds)


async def set_rate(
    settings: Settings,
    names: Sequence[str],
    rate: RateLimit | NoLimit | None,
    instruction: Instruction,
) -> str:
    """Set the rate limit of all workers of the task that is meant, or take it back (None).

    Returns:
        What was done, in one line.

    Raises:
        DatabaseError: The row cannot be written; nothing was changed.
        AioworkerError: It is a pause, and a longer one is set.
        UsageError: No one task is meant, or the budget is each worker's own.
    """
    gap = None if rate is None else 0
    if isinstance(rate, RateLimit):
        if rate.paused:
            return await pause(settings, names, instruction)
        gap = rate.gap_us
    async with _rows(settings, names, instruction) as (database, [name]):
        before = await _read(database, name)
        what = "rate limit reset" if rate is None else f"rate limit {rate}"
        await run_time.set_rate(database, name, gap, instruction.change(what))
        row = await tables.read(database, name)
        own = await tables.rates(database, name)
    was = _shown(rate_in_force(settings, name, before, own))
    now = _shown(rate_in_force(settings, name, row, own))
    still = f"; still {row.pause}" if row.pause else ""
    return f"{shown(name)}: rate limit {now}{_until(row.set_until, instruction)} (was {was}){still}"


async def pause(settings: Settings, names: Sequence[str], instruction: Instruction) -> str:
    """Let no start of what is meant begin any more; what runs stops before its next transaction.

    Returns:
        What was done, in a line for each.

    Raises:
        DatabaseError: A row cannot be written; nothing of it was changed.
        AioworkerError: A longer pause of the only one that is meant is set.
        UsageError: No one task is meant, or the budget is each worker's own.
    """
    lines: list[str] = []
    async with _rows(settings, names, instruction, lines) as (database, meant):
        for name in meant:
            await _read(database, name)
            new = await run_time.pause(database, name, instruction.change("paused"))
            row = await tables.read(database, name)
            if new:
                until = _until(row.paused_until, instruction)
                lines.append(f"{shown(name)}: paused{until}; what runs stops, nothing new begins")
                continue
            lines.append(f"{shown(name)}: {row.pause}; nothing was changed")
            if instruction.seconds is not None and not instruction.every:
                raise AioworkerError(f"{lines[-1]}: a pause is not replaced by a shorter one")
    return "\n".join(lines)


async def resume(settings: Settings, names: Sequence[str], instruction: Instruction) -> str:
    """End a pause of what is meant.

    Returns:
        What was done, in a line for each.

    Raises:
        DatabaseError: A row cannot be written; nothing of it was changed.
        UsageError: No one task is meant, or the budget is each worker's own.
    """
    lines: list[str] = []
    async with _rows(settings, names, instruction, lines) as (database, meant):
        for name in meant:
            before = await _read(database, name)
            own = await tables.rates(database, name)
            rate = _shown(rate_in_force(settings, name, before, own))
            if before.paused:
                await run_time.resume(database, name, instruction.change("resumed"))
                lines.append(f"{shown(name)}: resumed, rate limit {rate}")
            else:
                lines.append(f"{shown(name)}: not paused, rate limit {rate}; nothing was changed")
    return "\n".join(lines)


def rate_in_force(settings: Settings, name: str, row: Row | None, workers: set[str]) -> InForce:
    """Return the rate limit in force, as far as this process can know it.

    Args:
        settings: This process's settings.
        name: The task's name; its own rate is known if its module is imported here.
        row: The task's row; None where there is none.
        workers: The rates that its workers have of their own.
    """
    if budget_name(name) is not None:
        return in_force(None, None, row, workers)  # the setting is a task's
    own = find(name).rate_limit or NoLimit.NONE if name in registered() else None
    return in_force(own, settings.rate_limit, row, workers)


def _shown(force: InForce) -> str:
    """Return a rate limit and where it comes from."""
    if force.source is Source.UNKNOWN:
        return "each worker's own"
    return f"{force.rate}, {force.source}"


def shown(key: str) -> str:
    """Return what a row is called: a task by its name, a budget as such."""
    name = budget_name(key)
    return key if name is None else f"budget {name}"


def _until(end: datetime | None, instruction: Instruction) -> str:
    """Return when what was asked for ends, in words."""
    if end is None or instruction.seconds is None:
        return ""
    return f" until {moment(end)}, in {duration(instruction.seconds)}"


@asynccontextmanager
async def _rows(
    settings: Settings,
    names: Sequence[str],
    instruction: Instruction,
    done: Sequence[str] = (),
) -> AsyncIterator[tuple[Database, list[str]]]:
    """Yield the database, and the keys of the rows that are meant.

    Args:
        settings: The settings.
        names: The task's name; none for the only one.
        instruction: Whether a budget, or every row, is meant.
        done: What was done so far, which an error tells as well.

    Raises:
        UnknownTaskError: There is no such task, or no such budget.
        UsageError: The budget is each worker's own, and none would follow a row.
    """
    if settings.budget != "shared":
        raise UsageError(
            "AIOWORKER_BUDGET=worker: each worker keeps its own budget, and nothing can be set"
            " at run time"
        )
    async with settings.database(locks=False) as database:
        if instruction.budget is not None:
            meant = [await which_tasks.of_budgets(database, instruction.budget)]
        elif instruction.every:
            meant = await which_tasks.every_row(database)
        else:
            meant = [which_tasks.only(await which_tasks.of_table(database, names))]
        try:
            with tables.explaining(database):
                yield database, meant
        except DatabaseError as error:
            for line in done:
                error.add_note(line)
            raise


async def _read(database: Database, name: str) -> Row:
    """Return a task's row, once what was set until now is cleared."""
    row = await tables.read(database, name)
    if row.over:
        await run_time.clear_ended(database, name)
        row = await tables.read(database, name)
    return row


def _operator() -> str:
    """Return who gives the order, as this machine knows it."""
    try:
        return (os.environ.get("SUDO_USER") or getpass.getuser())[:190]
    except (KeyError, OSError):  # a user without a name, as in a container
        return f"uid {os.getuid()}"
