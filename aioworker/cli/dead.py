"""The commands of `aioworker dead`."""

from __future__ import annotations

import re
import signal
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aioworker import console, words
from aioworker.cli.common import App, TaskName, TaskOption, named, prepare, run, to_look
from aioworker.errors import AioworkerError, UsageError

if TYPE_CHECKING:
    from aioworker.commands.letters import Filter
    from aioworker.settings import Settings

app = typer.Typer(
    name="dead",
    invoke_without_command=True,
)
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}

Ids = Annotated[
    list[str] | None,
    typer.Option(
        "--id", metavar="ID", help="Only this message, by its id as it was printed; repeatable."
    ),
]
Reason = Annotated[
    str | None,
    typer.Option("--reason", metavar="TEXT", help="Only those whose reason contains this."),
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
        console.say_all(ctx.get_help())


@app.command("list")
def show_list(
    name: TaskName = None,
    option: TaskOption = None,
    app_names: App = None,
    ids: Ids = None,
    reason: Reason = None,
    older_than: OlderThan = None,
    as_json: AsJson = False,
) -> None:
    """List the dead letters of a task, or of all: id, when, lane, attempts, reason.

    Without a TASK: all that have a budget in the database. If that cannot be read and there is
    no app, the main job is meant, and a line says so. Those that cannot be listed are named at
    the end, exit status 1.
    """
    wanted = _filter(ids, reason, older_than)
    settings = prepare(app=app_names)
    from aioworker.commands import dead

    tasks = _meant(settings, named(name, option))
    run(dead.show_list(settings, tasks, wanted, as_json=as_json))


@app.command("show")
def show_one(
    words: Annotated[
        list[str],
        typer.Argument(metavar="[TASK] ID", help="The task, and the message's id."),
    ],
    option: TaskOption = None,
    app_names: App = None,
    as_json: AsJson = False,
) -> None:
    """Show one dead letter whole: its headers and its body.

    Without a TASK: as `dead list`, if that means only one.
    """
    *first, message_id = words
    names = named(first, option)
    settings = prepare(app=app_names)
    from aioworker.commands import dead

    run(dead.show_one(settings, _one(settings, names), message_id, as_json=as_json))


@app.command()
def requeue(
    name: TaskName = None,
    option: TaskOption = None,
    app_names: App = None,
    ids: Ids = None,
    reason: Reason = None,
    older_than: OlderThan = None,
) -> None:
    """Put dead letters back into their lanes; their attempts are counted anew.

    Without a TASK: the only one that has a budget in the database; if nothing can tell which,
    name it. Without a filter, all of the task. Each is confirmed in its lane before it leaves the
    dead letters. Exits 1 if no letter has one of the ids; the others are done.
    """
    wanted = _filter(ids, reason, older_than)
    settings = prepare(app=app_names)
    from aioworker.commands import dead

    run(dead.requeue(settings, _one(settings, named(name, option), changing=True), wanted))


@app.command()
def drop(
    name: TaskName = None,
    option: TaskOption = None,
    app_names: App = None,
    ids: Ids = None,
    reason: Reason = None,
    older_than: OlderThan = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Take dead letters away for good, after asking.

    Without a TASK: the only one that has a budget in the database; if nothing can tell which,
    name it. Without a filter, all of the task.
    """
    wanted = _filter(ids, reason, older_than)
    settings = prepare(app=app_names)
    from aioworker.commands import dead

    task = _one(settings, named(name, option), changing=True)
    shown = None
    if not yes:
        # Nothing is held, and no event loop runs, while a person thinks.
        shown = run(dead.preview(settings, task, wanted))
        what = words.count(shown.total(), "dead letter")
        if shown and not _ask(f"drop {what} of {task} for good?"):
            raise AioworkerError("dropped nothing; --yes drops without asking")
    run(dead.drop(settings, task, wanted, shown))


def _meant(settings: Settings, names: list[str], *, changing: bool = False) -> list[str]:
    """Return the tasks that are meant; one that is named may not be registered any more."""
    from aioworker.commands import meant

    if not names and not settings.app and settings.budget != "shared":
        return [meant.guess(changing=changing)]
    if not names:
        names = to_look(settings, names)
    return run(meant.of_queues(settings, names, changing=changing))


def _one(settings: Settings, names: list[str], *, changing: bool = False) -> str:
    from aioworker.commands import meant

    return meant.only(_meant(settings, names, changing=changing))


def _ask(question: str) -> bool:
    """Ask a person, until a signal."""

    def end(number: int, _frame: Any) -> None:
        stopped = AioworkerError(f"stopped by {signal.Signals(number).name}")
        stopped.add_note("dropped nothing")
        raise stopped

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return console.confirm(question)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _filter(ids: list[str] | None, reason: str | None, older_than: str | None) -> Filter:
    from aioworker.commands.letters import Filter

    # An empty variable of the shell would mean all.
    for option, values in (("--id", ids or []), ("--reason", [] if reason is None else [reason])):
        if not all(value.strip() for value in values):
            raise UsageError(f"expected {option} with a text, got: ''; without it, all are meant")
    age = None
    if older_than is not None:
        match = re.fullmatch(r"([0-9]{1,6})([smhd])", older_than)
        if match is None:
            raise UsageError(f"expected an age such as 30m, 2h or 7d, got: {older_than!r}")
        age = timedelta(**{_UNITS[match[2]]: int(match[1])})
    return Filter(frozenset(ids or ()), reason or "", age)
