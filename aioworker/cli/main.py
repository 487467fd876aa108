"""The command line: reads options and settings, owns signals, logging and exit statuses.

Exit statuses: 0 done, 1 not done, 2 wrong usage or settings. What a command needs is
imported when it runs, so that help answers at once; and before the app's modules are, behind
which the current folder is on the path.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from aioworker import console
from aioworker.cli import dead, publish
from aioworker.cli.common import (
    App,
    TaskName,
    TaskOption,
    app_tasks,
    end,
    named,
    prepare,
    run,
    to_look,
)
from aioworker.errors import AioworkerError, UsageError
from aioworker.logs import journal_mark
from aioworker.words import count
from aioworker.worker import signals

if TYPE_CHECKING:
    from aioworker.worker.process import Done

TaskNames = Annotated[list[str] | None, typer.Argument(metavar="TASK", help="The tasks' names.")]
WATCH_SECONDS = 2.0
_debug = False  # main() reports errors outside of any command's context

app = typer.Typer(
    name="aioworker",
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(dead.app)


class _WithSettings(TyperCommand):
    """A command whose help ends with the settings, as `Settings` has them."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        from aioworker.settings import Settings

        with formatter.section("Settings (environment, .env)"):
            formatter.write_dl(
                [(name, f"{meaning}  [{default}]") for name, default, meaning in Settings.table()]
            )


@app.callback()
def main_options(
    ctx: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """Refresh database rows in the background, no faster than the database can stand.

    Exits 0 when done, 1 when not, 2 when the usage or a setting is wrong.
    """
    global _debug
    _debug = debug
    if ctx.invoked_subcommand is None:
        console.say_all(ctx.get_help())


@app.command()
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
        run(init.init(settings, tasks))


@app.command(cls=_WithSettings)
def consume(
    names: TaskNames = None,
    option: TaskOption = None,
    app_names: App = None,
    rate_limit: Annotated[
        str | None,
        typer.Option(
            metavar="COUNT/UNIT", help="How often each task starts, such as 2/m; none, no limit."
        ),
    ] = None,
    burst: Annotated[bool, typer.Option("--burst", help="End once the lanes are empty.")] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Only load settings and tasks; 0 if they load, and no table needs init.",
        ),
    ] = False,
) -> None:
    """Run the worker: take messages, write what needs writing, no faster than the rate.

    Without a TASK: all that the app registers, or the main job. Each task has lanes and a
    budget of its own; a slow or limited one holds up no other.

    SIGTERM or SIGINT: takes no new message, finishes what runs, exits 0; a second one ends
    it at once, and nothing is lost. SIGHUP: goes on with new code and settings; if those do
    not load, says why and goes on with the old. With --burst exits 0 if all it took is done,
    1 if a message became a dead letter, went to retry or was given back, or if it is paused.
    """
    from aioworker.commands import init
    from aioworker.worker import process, reload

    raise_early = signals.keep_early()
    origin = reload.Origin.of_this_process()
    settings = prepare(app=app_names, rate_limit=rate_limit)
    tasks = app_tasks(settings, [*(names or []), *(option or [])])
    settings.nodes()  # what their files lack is said before anything is done
    if settings.budget == "shared" or any(task.needs_database for task in tasks):
        settings.database()
    if check:
        run(init.refuse_older_tables(settings))
        reload.end_check([task.name for task in tasks])

    work = process.Process(settings, tasks, burst=burst, origin=origin, raise_early=raise_early)
    done = work.run()
    if burst:
        _report(done)
    raise typer.Exit(0 if done.complete else 1)


def _report(done: Done) -> None:
    """Say what a burst came to."""
    from aioworker.settling.outcome import Kind

    settled = done.settled
    retried = settled[Kind.RETRY] + settled[Kind.POSTPONED]
    console.say(
        f"done {count(settled[Kind.ACK], 'message')} in {count(done.starts, 'start')};"
        f" dead letters {settled[Kind.DEAD_LETTER]}, to retry {retried},"
        f" given back {settled[Kind.RELEASED]}"
    )


app.command()(publish.publish_all)
app.command()(publish.publish)


@app.command()
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
    names = to_look(settings, named(name, option))
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
        stop = asyncio.Event()
        signals.on_stop(lambda _signal: stop.set())
        await console.watch(show, WATCH_SECONDS, stop)

    if watching:
        asyncio.run(watch())
    else:
        console.say_all(run(show()))
    raise typer.Exit(0 if complete else 1)


@app.command()
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


Why = Annotated[
    str | None, typer.Option("--reason", metavar="TEXT", help="Why; kept, and shown by status.")
]


@app.command("rate-limit", context_settings={"ignore_unknown_options": True})  # such as -1/m
def rate_limit(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TASK] RATE", help="The task, and its rate: 10/m, or none."),
    ] = None,
    option: TaskOption = None,
    reset: Annotated[
        bool, typer.Option("--reset", help="Take the rate back: the workers' own counts again.")
    ] = False,
    why: Why = None,
    app_names: App = None,
) -> None:
    """Set the rate limit of all workers of a task while they run; it outlives them.

    They follow within 2 seconds or one interval, whichever is sooner. 0/m pauses, none is no
    limit; a new rate does not end a pause, `resume` does.
    """
    given = list(words or [])
    if len(given) > (1 if reset else 2) or not (given or reset):
        usage = "[TASK] --reset" if reset else "[TASK] RATE"
        raise UsageError(f"expected rate-limit {usage}, got: {' '.join(given) or 'nothing'}")
    from aioworker.limits import parse_limit

    rate = None if reset else parse_limit(given.pop())
    settings = prepare(app=app_names)
    from aioworker.commands import controls

    why = controls.checked_reason(settings, why)
    run(controls.set_rate(settings, named(given, option), rate, why))


@app.command()
def pause(
    name: TaskName = None, option: TaskOption = None, why: Why = None, app_names: App = None
) -> None:
    """Let no start of a task begin, on any worker, until `resume`; it outlives them.

    What runs ends as usual. Messages stay queued.
    """
    settings = prepare(app=app_names)
    from aioworker.commands import controls

    why = controls.checked_reason(settings, why)
    run(controls.pause(settings, named(name, option), why))


@app.command()
def resume(
    name: TaskName = None, option: TaskOption = None, why: Why = None, app_names: App = None
) -> None:
    """End a pause of a task, on every worker."""
    settings = prepare(app=app_names)
    from aioworker.commands import controls

    why = controls.checked_reason(settings, why)
    run(controls.resume(settings, named(name, option), why))


def main() -> None:
    """Run the command line and exit with its status."""
    if os.getpid() == 1:
        signals.end_as_first_process(signal.SIGTERM)
    console.open_streams()
    try:
        status = app(standalone_mode=False)
    except AioworkerError as error:
        status = 2 if isinstance(error, UsageError) else 1
        _fail(error, "; ".join([str(error), *getattr(error, "__notes__", [])]))
    except _usage_error as error:
        status = 2
        _fail(error, f"{error.format_message()} `{_path(error)} --help` shows the usage.")
    except console.OutputError as error:
        status = 1
        _fail(error, f"cannot write to standard output: {error}")
    except Exception as error:  # noqa: BLE001 - a fault of ours, still one line
        status = 1
        _fail(error, f"unexpected {type(error).__name__}: {error}; --debug shows where")
    end(status or 0)


# typer carries its own copy of click, whose errors have no public name.
_usage_error: Any = typer.BadParameter.__mro__[1]


def _path(error: Any) -> str:
    return error.ctx.command_path if error.ctx is not None else "aioworker"


def _fail(error: BaseException, line: str) -> None:
    if _debug:
        import traceback

        for part in "".join(traceback.format_exception(error)).rstrip("\n").split("\n"):
            console.tell(part)
    mark = journal_mark(logging.ERROR)
    console.tell(f"{mark}aioworker: {' '.join(line.split())}")
