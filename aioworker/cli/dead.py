"""The commands of `aioworker dead`."""

from __future__ import annotations

import signal
import sys
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aioworker import words
from aioworker.cli import console
from aioworker.cli.common import (
    App,
    TaskName,
    TaskOption,
    named,
    names_to_show,
    prepare,
    run,
    seconds_of,
)
from aioworker.errors import AioworkerError, UsageError
from aioworker.words import count

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable, Iterator

    from aioworker.commands.dead import Moved
    from aioworker.rabbitmq.dead_letters import Progress
    from aioworker.rabbitmq.letter import Filter, Letter
    from aioworker.settings import Settings

app = typer.Typer(name="dead", invoke_without_command=True)
INDENT = 4 * " "
MANY = 500  # letters, and a look at them takes seconds: how far it is, is shown
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

    def show(task: str, letter: Letter) -> None:
        if as_json:
            console.say(words.as_json({"task": task, **asdict(letter)}))
        else:
            console.say(f"{task}: {line(letter)}" if len(tasks) > 1 else line(letter))

    def end(task: str, letters: int) -> None:
        if not as_json:
            console.note(f"{count(letters, 'dead letter')} of {task}")

    progress = _progress("looked at", quiet=sys.stdout.isatty())
    run(dead.read_all(settings, tasks, wanted, show=show, end=end, progress=progress))


@app.command("show")
def show_one(
    given: Annotated[
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
    *first, message_id = given
    names = named(first, option)
    settings = prepare(app=app_names)
    from aioworker.commands import dead

    task = _one(settings, names)

    def show(letter: Letter, headers: dict[str, str | None], body: str) -> None:
        if as_json:
            found = {"task": task, **asdict(letter), "headers": headers, "body": body}
            console.say(words.as_json(found))
            return
        console.say(line(letter))
        # Indented, since a sender chooses the names too: none can look like a line of ours.
        for header, value in sorted(headers.items()):
            console.say(f"{INDENT}{header}: {value}")
        console.say("")
        console.say(f"{INDENT}body: {body}")

    progress = _progress("looked at", quiet=sys.stdout.isatty())
    if not run(dead.read_one(settings, task, message_id, show, progress)):
        _refuse_absent(task, [message_id])


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

    task = _one(settings, named(name, option), changing=True)
    done = run(dead.requeue(settings, task, wanted, _progress("requeueing:")))
    _say_moved("requeued", task, done, "came meanwhile, and stayed")


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
        shown = run(dead.preview(settings, task, wanted, _progress("looked at")))
        if shown and not _agrees(task, shown):
            raise AioworkerError("dropped nothing; --yes drops without asking")
    done = run(dead.drop(settings, task, wanted, shown, _progress("dropping:")))
    _say_moved("dropped", task, done, "of those shown did not lie there any more")


def line(letter: Letter) -> str:
    """Return a letter in one line: id, when, lane, attempts, reason."""
    when = letter.failed_at or "unknown time"
    runs = "" if letter.attempts is None else f" attempts={letter.attempts}"
    return f"{letter.word} {when} lane={letter.lane}{runs} {' '.join(letter.reason.split())}"


def _progress(doing: str, *, quiet: bool = False) -> Progress:
    """Return what shows how far a look is, if it takes long.

    Args:
        doing: What is done, such as `looked at`.
        quiet: Whether a person sees the letters themselves pass by.
    """

    @contextmanager
    def shown(there: int) -> Iterator[Callable[[int], None]]:
        if quiet or there < MANY:
            yield lambda _seen: None
            return
        with console.progress("dead letters", there) as show:
            yield lambda seen: show(seen, f"{doing} {seen} of {count(there, 'dead letter')}")

    return shown


def _say_moved(did: str, task: str, done: Moved, others: str) -> None:
    """Say what became of letters, and of others; then refuse ids that no letter has."""
    console.say(f"{did} {count(done.letters, 'dead letter')} of {task}")
    if done.others:
        console.note(f"{count(done.others, 'dead letter')} {others}")
    _refuse_absent(task, done.absent)


def _refuse_absent(task: str, ids: list[str]) -> None:
    """Say which ids that were given no letter has.

    Raises:
        AioworkerError: There are such.
    """
    if ids:
        raise AioworkerError(f"no dead letter of {task} has the id {', '.join(map(repr, ids))}")


def _meant(settings: Settings, names: list[str], *, changing: bool = False) -> list[str]:
    """Return the tasks that are meant; one that is named may not be registered any more."""
    from aioworker.commands import which_tasks

    if not names and settings.app:
        names = names_to_show(settings, names)
    found, guessed = run(which_tasks.of_queues(settings, names, changing=changing))
    if guessed:
        console.note(f"aioworker: {which_tasks.MAIN_JOB} is meant, since {guessed}")
    return found


def _one(settings: Settings, names: list[str], *, changing: bool = False) -> str:
    from aioworker.commands import which_tasks

    return which_tasks.only(_meant(settings, names, changing=changing))


def _agrees(task: str, letters: Counter[Letter]) -> bool:
    """Show a person what is to be dropped, and ask; until a signal."""

    def end(number: int, _frame: Any) -> None:
        stopped = AioworkerError(f"stopped by {signal.Signals(number).name}")
        stopped.add_note("dropped nothing")
        raise stopped

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for letter in letters.elements():
            console.note(line(letter))
        what = count(letters.total(), "dead letter")
        return console.confirm(f"drop {what} of {task} for good?")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _filter(ids: list[str] | None, reason: str | None, older_than: str | None) -> Filter:
    from aioworker.rabbitmq.letter import Filter

    # An empty variable of the shell would mean all.
    for option, values in (("--id", ids or []), ("--reason", [] if reason is None else [reason])):
        if not all(value.strip() for value in values):
            raise UsageError(f"expected {option} with a text, got: ''; without it, all are meant")
    age = None
    if older_than is not None:
        age = timedelta(seconds=seconds_of(older_than, "an age"))
    return Filter(frozenset(ids or ()), reason or "", age)
