"""The commands of `aioworker dead`."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from aioworker.errors import UsageError
from aioworker.running import DEFAULT_TASK, App, TaskName, prepare, run

if TYPE_CHECKING:
    from aioworker.dead import Filter

app = typer.Typer(
    name="dead",
    invoke_without_command=True,
)
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}

Ids = Annotated[
    list[str] | None, typer.Option("--id", metavar="ID", help="Only this message; repeatable.")
]
Reason = Annotated[
    str, typer.Option("--reason", metavar="TEXT", help="Only those whose reason contains this.")
]
OlderThan = Annotated[
    str | None,
    typer.Option("--older-than", metavar="AGE", help="Only older ones: 30m, 2h, 7d."),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object a line, for programs.")]


@app.callback()
def dead(ctx: typer.Context) -> None:
    """See, bring back and take away dead letters: messages set aside with a reason."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


@app.command("list")
def show_list(
    name: TaskName = DEFAULT_TASK,
    app_names: App = None,
    ids: Ids = None,
    reason: Reason = "",
    older_than: OlderThan = None,
    as_json: AsJson = False,
) -> None:
    """List the dead letters of a task: id, when, lane, attempts, reason."""
    wanted = _filter(ids, reason, older_than)
    settings, task = prepare(name, app=app_names)
    from aioworker import dead

    run(dead.show_list(settings, task, wanted, as_json=as_json))


@app.command("show")
def show_one(
    message_id: Annotated[str, typer.Argument(metavar="ID", help="The message's id.")],
    name: Annotated[str, typer.Option("--task", metavar="TASK", help="The task's name.")] = (
        DEFAULT_TASK
    ),
    app_names: App = None,
    as_json: AsJson = False,
) -> None:
    """Show one dead letter whole: its headers and its body."""
    settings, task = prepare(name, app=app_names)
    from aioworker import dead

    run(dead.show_one(settings, task, message_id, as_json=as_json))


@app.command()
def requeue(
    name: TaskName = DEFAULT_TASK,
    app_names: App = None,
    ids: Ids = None,
    reason: Reason = "",
    older_than: OlderThan = None,
) -> None:
    """Put dead letters back into their lanes; their attempts are counted anew.

    Without a filter, all of the task. Each is confirmed in its lane before it leaves the
    dead letters.
    """
    wanted = _filter(ids, reason, older_than)
    settings, task = prepare(name, app=app_names)
    from aioworker import dead

    run(dead.requeue(settings, task, wanted))


@app.command()
def drop(
    name: TaskName = DEFAULT_TASK,
    app_names: App = None,
    ids: Ids = None,
    reason: Reason = "",
    older_than: OlderThan = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Take dead letters away for good, after asking. Without a filter, all of the task."""
    wanted = _filter(ids, reason, older_than)
    settings, task = prepare(name, app=app_names)
    from aioworker import dead

    run(dead.drop(settings, task, wanted, yes=yes))


def _filter(ids: list[str] | None, reason: str, older_than: str | None) -> Filter:
    from aioworker.dead import Filter

    age = None
    if older_than is not None:
        match = re.fullmatch(r"([0-9]{1,6})([smhd])", older_than)
        if match is None:
            raise UsageError(f"expected an age such as 30m, 2h or 7d, got: {older_than!r}")
        age = timedelta(**{_UNITS[match[2]]: int(match[1])})
    return Filter(frozenset(ids or ()), reason, age)
