"""Which tasks a command means.

What runs or publishes means the app's tasks, or the main job if there is no app. What looks or
controls means the tasks of `aioworker_budget`, so that it works where the app is not installed:
it imports no module of a user's. The only task is the default.
"""

from __future__ import annotations

import difflib
from contextlib import suppress
from typing import TYPE_CHECKING

from aioworker import addons
from aioworker.budget import tables
from aioworker.budget.pace import budget_key
from aioworker.errors import (
    AioworkerError,
    DatabaseError,
    QueueMissingError,
    UnknownTaskError,
    UsageError,
)
from aioworker.tasks import load
from aioworker.tasks.names import check_name
from aioworker.tasks.registry import find, registered
from aioworker.words import command

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aioworker.mysql.database import Database
    from aioworker.settings import Settings
    from aioworker.tasks.task import AnyTask

MAIN_JOB = addons.update_current_version.name
LISTED = 20  # names in an error, at most


def of_app(settings: Settings, names: Sequence[str]) -> list[AnyTask]:
    """Import the app's modules, and return the tasks that are meant.

    Args:
        settings: The settings, which name the app.
        names: The tasks' names; none for all that the app registers.

    Raises:
        UnknownTaskError: One is not registered.
        UsageError: The app registers no task.
        AioworkerError: A module does not import.
    """
    own = registered()
    load.load(settings.app)
    theirs = [name for name in registered() if name not in own]
    if settings.app and not theirs:
        places = ", ".join(load.located(module) for module in settings.app)
        raise UsageError(f"expected {places} to register a task with @task")
    unknown = [name for name in names if name not in registered()]
    if unknown and settings.app:
        raise UnknownTaskError(_unknown(unknown[0], theirs))
    if unknown:
        raise UnknownTaskError(
            f"unknown task {unknown[0]!r}: without --app or AIOWORKER_APP only {MAIN_JOB} is known"
        )
    return [find(name) for name in dict.fromkeys(names or theirs or [MAIN_JOB])]


async def of_table(database: Database, names: Sequence[str]) -> list[str]:
    """Return the tasks that are meant, of those that have a budget.

    Args:
        database: Where their rows are.
        names: The tasks' names; none for all that are there.

    Raises:
        UnknownTaskError: One is not there.
        AioworkerError: None is there at all.
        DatabaseError: The table cannot be read.
    """
    with tables.explaining(database):
        known = await tables.tasks(database)
    if not known:
        where = database.address.shown
        raise AioworkerError(f"no task has a budget at {where}: run `{command('init')}`")
    for name in names:
        if name not in known:
            raise UnknownTaskError(_unknown(name, known))
    return list(names) or known


async def every_row(database: Database) -> list[str]:
    """Return the keys of all rows, those of budgets that tasks share behind the tasks'.

    Raises:
        AioworkerError: There is none.
        DatabaseError: The table cannot be read.
    """
    known = await of_table(database, ())
    with tables.explaining(database):
        return known + [budget_key(name) for name in await tables.budgets(database)]


async def of_budgets(database: Database, name: str) -> str:
    """Return the key of a budget that tasks share.

    Raises:
        UnknownTaskError: There is no such budget.
        DatabaseError: The table cannot be read.
    """
    with tables.explaining(database):
        known = await tables.budgets(database)
    if name in known:
        return budget_key(name)
    there = f"there are: {_listed(known)}" if known else "no task shares one"
    raise UnknownTaskError(f"unknown budget {name!r}: {there}")


async def of_queues(
    settings: Settings, names: Sequence[str], *, changing: bool = False
) -> tuple[list[str], str]:
    """Return the tasks whose queues are meant; a task that is named needs no database.

    Args:
        settings: The settings.
        names: The tasks' names; none for all that have a budget.
        changing: Whether what lies in the queues is to be changed: nothing is guessed then.

    Returns:
        Their names; and why nothing tells which, where the main job is taken: a guess. Empty if
        something does.

    Raises:
        UsageError: None is named, and there is neither a table nor an app to tell the tasks.
        AioworkerError: None is named, and none is there, or nobody can tell which are.
    """
    for name in names:
        check_name(name)
    if names:
        return list(names), ""
    if settings.budget != "shared":
        why = "AIOWORKER_BUDGET=worker keeps no table of the tasks, and there is no app"
        if changing:
            raise UsageError(f"name the task, since {why}")
        return [MAIN_JOB], why
    try:
        async with settings.database(locks=False) as database:
            return await of_table(database, ()), ""
    except DatabaseError as error:
        if changing:
            raise _unnamed(error) from error
        why = f"the database cannot tell which tasks there are: {error}"
        return untold(settings, names, error), why


def untold(settings: Settings, names: Sequence[str], error: DatabaseError) -> list[str]:
    """Return the tasks to look at while the table cannot be read.

    A name is believed; without an app only the main job can be meant.

    Raises:
        DatabaseError: None is named, and there is an app.
    """
    for name in names:
        check_name(name)
    if settings.app and not names:
        raise _unnamed(error) from error
    return list(names) or [MAIN_JOB]


def _unnamed(error: DatabaseError) -> DatabaseError:
    return DatabaseError(f"name the task, since the database cannot tell which are there: {error}")


async def missing(settings: Settings, name: str, queue: str) -> AioworkerError:
    """Return the error for a task's queue that is not there, by what else is known of the task."""
    known: list[str] = []
    if settings.budget == "shared":
        with suppress(DatabaseError):
            async with settings.database(locks=False) as database:
                with tables.explaining(database):
                    known = await tables.tasks(database)
    if name in known:
        return QueueMissingError.of(queue, name)
    absent = f"queue {queue} does not exist"
    if known:
        return UnknownTaskError(f"{absent}: {_unknown(name, known)}")
    app = "" if settings.app else " and the app (--app, AIOWORKER_APP),"
    return QueueMissingError(
        f"{absent}: check the task's name, {name!r},{app} then run `{command('init')}`"
    )


def only(names: Sequence[str]) -> str:
    """Return the only name.

    Raises:
        UsageError: There are several; the text lists them.
    """
    if len(names) > 1:
        raise UsageError(f"expected one task to be named, there are: {_listed(names)}")
    return names[0]


def _unknown(name: str, known: Sequence[str]) -> str:
    """Return what is wrong with a name, with the nearest one and the list."""
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
    others = f" There are: {_listed(known)}" if len(known) > 1 else ""
    return f"unknown task {name!r}, did you mean {nearest}?{others}"


def _listed(names: Sequence[str]) -> str:
    """Return names in one line, the first of many."""
    ordered = sorted(names)
    more = f" and {len(ordered) - LISTED} more" if len(ordered) > LISTED else ""
    return ", ".join(ordered[:LISTED]) + more
