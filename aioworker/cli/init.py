"""The command `init`."""

from __future__ import annotations

from typing import Annotated

import typer

from aioworker.cli import console
from aioworker.cli.common import App, TaskNames, TaskOption, app_tasks, prepare, run


def init(
    names: TaskNames = None,
    option: TaskOption = None,
    app_names: App = None,
    show: Annotated[
        bool, typer.Option("--print", help="Show what it would do, and the least privileges.")
    ] = False,
) -> None:
    """Make or upgrade the budget's tables and declare the queues; can be run again.

    Makes two tables in the database (none with AIOWORKER_BUDGET=worker), or adds what those of
    an earlier version lack, declares each task's four queues and waits until they outlive a
    broker that is killed. A queue that is there and differs is reported, and not changed.
    Without a TASK: all that the app registers, or the main job.
    """
    from aioworker.commands import init

    settings = prepare(app=app_names)
    tasks = app_tasks(settings, [*(names or []), *(option or [])])
    if show:
        console.say_all(run(init.plan(settings, tasks)))
    else:
        run(init.init(settings, tasks, console.say, console.note))
