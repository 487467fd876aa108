"""The commands `status` and `health`."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Annotated

import typer

from aioworker.cli import console
from aioworker.cli.common import App, TaskName, TaskOption, named, names_to_show, prepare, run
from aioworker.worker import signals

WATCH_SECONDS = 2.0


def status(
    name: TaskName = None,
    option: TaskOption = None,
    app_names: App = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a line and task, for programs.")
    ] = False,
    watching: Annotated[
        bool, typer.Option("--watch", help="Show it again every 2 seconds, until Ctrl-C.")
    ] = False,
) -> None:
    """Show queues, budget and workers of a task, or of all, and why it waits now.

    Without a TASK: all that have a budget in the database. Exits 0, or 1 when RabbitMQ or the
    database could not be asked: what the other one tells is shown all the same. Of the main job,
    if the database is away and there is neither a TASK nor an app.
    """
    from aioworker.cli.text import text
    from aioworker.commands import status as asking

    settings = prepare(app=app_names)
    names = names_to_show(settings, named(name, option))
    complete = True
    before: list[str] = []

    async def show() -> str:
        nonlocal before, complete
        found = await asking.look(settings, names, before)
        before = [one.task for one in found]
        complete = all(one.complete for one in found)
        if as_json:
            return "\n".join(one.as_json() for one in found)
        return "\n\n".join(map(text, found))

    async def watch() -> None:
        shown_again = asyncio.ensure_future(console.watch(show, WATCH_SECONDS))
        signals.on_stop(lambda _signal: shown_again.cancel())
        with suppress(asyncio.CancelledError):
            await shown_again

    if watching:
        asyncio.run(watch())
    else:
        console.say_all(run(show()))
    raise typer.Exit(0 if complete else 1)


def health(name: TaskName = None, option: TaskOption = None, app_names: App = None) -> None:
    """Tell whether this machine's workers of a task, or of all, are alive and get on with it.

    Without a TASK: all that have a budget in the database, each of which has to have a worker
    here. Asks the database alone. A worker that waits for a server, or is paused, is healthy.
    Exits 1 when none was seen for 90 s, or when one stands still: messages wait, the budget
    is free, and nothing has started for two intervals.
    """
    settings = prepare(app=app_names)
    from aioworker.commands.health import check

    console.say_all(run(check(settings, named(name, option))))
