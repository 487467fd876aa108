"""The commands that mean all tasks of the app: `init` and `consume`."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from aioworker.cli import console
from aioworker.cli.common import App, TaskNames, TaskOption, app_tasks, prepare, run
from aioworker.words import count
from aioworker.worker import signals

if TYPE_CHECKING:
    from aioworker.worker.process import Done


class WithSettings(TyperCommand):
    """A command whose help ends with the settings, as `Settings` has them."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the table of the settings."""
        from aioworker.settings import Settings

        with formatter.section("Settings (environment, .env)"):
            formatter.write_dl(
                [(name, f"{meaning}  [{default}]") for name, default, meaning in Settings.table()]
            )


def init(
    names: TaskNames = None,
    option: TaskOption = None,
    app_names: App = None,
    show: Annotated[
        bool, typer.Option("--print", help="Show what it would do, and the least privileges.")
    ] = False,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh",
            help="Forget pauses, rates, notes of runs, history and workers of all tasks of the"
            " database, such as a copy of production; no message is touched.",
        ),
    ] = False,
) -> None:
    """Make or upgrade the budget's tables and declare the queues; can be run again.

    Makes its tables in the database (none with AIOWORKER_BUDGET=worker), or adds what those of
    an earlier version lack, declares each task's four queues and waits until they outlive a
    broker that is killed. A queue that is there and differs is reported, and not changed.
    Without a TASK: all that the app registers, or the main job.

    With --fresh every task of the database starts as if it never had; exits 1 and changes
    nothing while a worker is alive there. What is in the queues stays.
    """
    from aioworker.commands import init

    settings = prepare(app=app_names)
    meant = [*(names or []), *(option or [])]
    if fresh:
        init.refuse_forgetting(settings, meant)
    tasks = app_tasks(settings, meant)
    if show:
        console.say_all(run(init.plan(settings, tasks, forget=fresh)))
    else:
        run(init.init(settings, tasks, console.say, console.note, forget=fresh))


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
    from aioworker.worker import process, reload

    raise_early = signals.keep_early()
    origin = reload.Origin.of_this_process()
    settings = prepare(app=app_names, rate_limit=rate_limit)
    tasks = app_tasks(settings, [*(names or []), *(option or [])])
    process.refuse_shared_budgets(settings, tasks)
    settings.nodes()  # what their files lack is said before anything is done
    if settings.budget == "shared" or any(task.needs_database for task in tasks):
        settings.database()
    if check:
        from aioworker.commands import init

        run(init.refuse_older_tables(settings))
        reload.end_check([task.name for task in tasks])

    working = process.Process(
        settings,
        tasks,
        burst=burst,
        origin=origin,
        raise_early=raise_early,
        report=_report,
    )
    with asyncio.Runner() as runner, working.naming_what_ran():
        done = runner.run(working.run())
    raise typer.Exit(0 if done.complete else 1)


def _report(done: Done) -> None:
    """Say what a burst came to."""
    from aioworker.settling.outcome import Kind

    settled = done.settled
    retried = sum(settled[kind] for kind in (Kind.RETRY, Kind.POSTPONED, Kind.MOVED))
    console.say(
        f"done {count(settled[Kind.ACK], 'message')} in {count(done.starts, 'start')};"
        f" dead letters {settled[Kind.DEAD_LETTER]}, to retry {retried},"
        f" given back {settled[Kind.RELEASED]}"
    )
