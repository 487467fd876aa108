"""The commands `status` and `health`, and the lines of `status` as a person reads them."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from aioworker.cli import console
from aioworker.cli.common import (
    App,
    BudgetName,
    TaskName,
    TaskOption,
    app_tasks,
    named,
    names_to_show,
    one_of,
    prepare,
    run,
)
from aioworker.clock import APART_SECONDS
from aioworker.errors import UsageError
from aioworker.limits import Source
from aioworker.reasons import ReasonKind
from aioworker.words import count, duration, moment
from aioworker.worker import signals

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aioworker.commands.status import Limit, Oldest, SharedStatus, Status
    from aioworker.settings import Settings
    from aioworker.status.read import Worker
    from aioworker.tasks.task import AnyTask

WATCH_SECONDS = 2.0
_SOURCES = {
    Source.RUN_TIME: "set at run time",
    Source.SETTING: "by setting",
    Source.TASK: "the task's own",
    Source.WORKERS: "the workers' own",
}


def status(
    name: TaskName = None,
    option: TaskOption = None,
    budget: BudgetName = None,
    app_names: App = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a line and task, for programs.")
    ] = False,
    watching: Annotated[
        bool, typer.Option("--watch", help="Show it again every 2 seconds, until Ctrl-C.")
    ] = False,
    counting: Annotated[
        bool, typer.Option("--stale", help="Count the rows that need writing: reads all of them.")
    ] = False,
) -> None:
    """Show queues, budget and workers of a task, or of all, and why it waits now.

    Without a TASK: all that have a budget in the database. Exits 0, or 1 when RabbitMQ or the
    database could not be asked: what the other one tells is shown all the same. Of the main job,
    if the database is away and there is neither a TASK nor an app. --stale imports the app, tells
    nothing of tasks without keys and needed, and exits 1 when rows cannot be counted.
    """
    from aioworker.commands import status as asking

    if counting and watching:
        raise UsageError("expected --stale or --watch, got both: --stale reads whole tables")
    meant = one_of(name, option, budget=budget)
    if counting and budget is not None:
        raise UsageError("expected --stale or --budget, got both: a budget sweeps nothing")
    settings = prepare(app=app_names)
    names = [] if budget is not None else names_to_show(settings, meant)
    counted = _tasks_to_count(settings, meant) if counting else []
    complete = True
    before: list[str] = []

    async def show() -> str:
        nonlocal before, complete
        if budget is not None:
            shared = await asking.look_at_budget(settings, budget)
            return shared.as_json() if as_json else aligned(shared_lines(shared))
        found = await asking.look(settings, names, before, counted)
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


def _tasks_to_count(settings: Settings, names: Sequence[str]) -> list[AnyTask]:
    """Return the app's tasks that are meant, of which it can be told what needs writing.

    Raises:
        UsageError: One that is named, or all, cannot tell.
    """
    found = app_tasks(settings, names)
    able = [one for one in found if one.keys is not None and one.reader is not None]
    if len(able) < len(names) or not able:
        lacking = "keys" if found[0].keys is None else "needed"
        raise UsageError(f"task {found[0].name!r} has no {lacking}: it cannot tell what is stale")
    return able


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


def text(status: Status) -> str:
    """Return the lines of a task's status as one text."""
    return aligned(lines(status))


def aligned(shown: Sequence[tuple[str, str]]) -> str:
    """Return lines as one text, values aligned."""
    return "\n".join(f"{name:<11}{' '.join(value.split())}" for name, value in shown)


def shared_lines(shared: SharedStatus) -> list[tuple[str, str]]:
    """Return what a person reads of a budget that tasks share: names and values, in order."""
    tasks = ", ".join(shared.tasks) or "none has a worker that says so"
    paused = [("paused", shared.limit.pause)] if shared.limit.pause else []
    limit = dict(_budget_lines(shared.limit, ReasonKind.UNKNOWN))
    if shared.limit.source == Source.UNKNOWN:  # no worker says which
        rate = "what the tasks' code says; no start has told it yet"
        limit |= {"rate": rate, "next start": "as that allows"}
    return [("budget", shared.budget), ("tasks", tasks), *paused, *limit.items()]


def lines(status: Status) -> list[tuple[str, str]]:
    """Return what a person reads: names and values, in order."""
    shown = [("task", status.task), ("waits", status.waits)]
    if status.queued is not None:
        numbers = ", ".join(f"{name} {_number(n)}" for name, n in asdict(status.queued).items())
        held = f"; {status.held} held by workers" if status.held else ""
        shown.append(("queued", f"{numbers}{held}"))
    if status.oldest is not None and (ages := _ages(status.oldest)):
        shown.append(("oldest", ages))
    if status.backlog_seconds:
        shown.append(("done in", f"{duration(status.backlog_seconds)} at most, at this rate"))
    if status.stale is not None or status.stale_error is not None:
        number = count(status.stale or 0, "row")
        shown.append(("stale", status.stale_error or f"{number} of all that it sweeps"))
    if status.budget is not None:
        shown += _budget_lines(status.budget, status.waits_kind)
    for worker in status.workers or []:
        shown.append(("worker", _worker_line(worker)))
    if status.budget is not None and status.budget.rates_differ:
        rates = {one.rate or "none" for one in status.workers or [] if one.alive}
        shown.append(("warning", f"workers differ in their own rate: {', '.join(sorted(rates))}"))
    ahead = status.clock_ahead_seconds or 0.0
    if abs(ahead) > APART_SECONDS:
        way = "ahead of" if ahead > 0 else "behind"
        words = f"this machine's clock is {duration(abs(ahead))} {way} the database's, which counts"
        shown.append(("warning", words))
    shown.append(("broker", status.broker_error or "reachable"))
    if status.budget is None or status.budget.scope == "shared":
        shown.append(("database", status.database_error or "reachable"))
    return shown


def _ages(oldest: Oldest) -> str:
    """Return how old the oldest messages are at most, where that is known."""
    named = {
        "urgent": oldest.urgent_seconds,
        "bulk": oldest.bulk_seconds,
        "came back": oldest.came_back_seconds,
    }
    known = [f"{name} {duration(age)}" for name, age in named.items() if age is not None]
    return f"at most: {', '.join(known)}" if known else ""


def _budget_lines(limit: Limit, waits: ReasonKind) -> list[tuple[str, str]]:
    changed = ""
    if limit.set_by is not None and limit.set_at is not None:
        why = f": {limit.set_why}" if limit.set_why else ""
        changed = f"; last change by {limit.set_by} at {moment(limit.set_at)}{why}"
    until = ""
    if limit.set_until is not None and limit.set_until_seconds is not None:
        until = f" until {moment(limit.set_until)}, for {duration(limit.set_until_seconds)} more"
    shown = [("rate", f"{_rate(limit)}{until}{changed}")]
    if limit.shares is not None:
        shown.append(("shares", limit.shares_pause or f"budget {limit.shares}"))
    if limit.scope != "shared":
        return shown
    if limit.last_start is None:
        unlimited = limit.rate == "none" and limit.shares is None
        shown.append(("last start", "not counted without a rate limit" if unlimited else "never"))
    else:
        by = f" by {limit.last_worker}" if limit.last_worker else ""
        shown.append(("last start", f"{moment(limit.last_start)}{by}"))
    if limit.next_start is not None and limit.next_start_seconds is not None:
        at = f"{limit.next_start:%H:%M:%S} UTC, in {duration(limit.next_start_seconds)}"
        shown.append(("next start", at))
    else:
        shown.append(("next start", _next_start(limit, waits)))
    shown.append(("turn", f"held by {limit.turn}" if limit.turn else "free"))
    return shown


def _rate(limit: Limit) -> str:
    """Return the rate, whose starts it counts, and where it comes from."""
    if limit.source == Source.UNKNOWN:
        which = "they differ" if limit.rates_differ else "none is here to tell it"
        return f"each worker's own; {which}"
    if limit.shares is not None and limit.rate == "none":
        return "the budget's alone"
    whose = "of all workers" if limit.scope == "shared" else "of each worker alone"
    return f"{limit.rate} {whose}, {_SOURCES[Source(limit.source)]}"


def _next_start(limit: Limit, waits: ReasonKind) -> str:
    """Return when the next start may begin, where no moment is known."""
    if limit.paused:
        left = limit.paused_until_seconds
        ends = "" if left is None else f", which ends in {duration(left)}"
        return f"not while paused{ends}"
    if limit.shares_pause:
        return "not while its budget is paused"
    if waits is ReasonKind.OTHER_BUDGET:
        return "not while it waits for that"
    if waits.timed:
        return "as the worker tells"
    if waits.red:
        return "not while it waits for that"
    return "as each worker's rate allows" if limit.rate == "unknown" else "at once"


def _worker_line(worker: Worker) -> str:
    seen = "" if worker.alive else f"; not seen for {duration(worker.seen_seconds)}"
    return (
        f"{worker.host}:{worker.pid} {worker.version}, rate {worker.rate or 'none'},"
        f" {worker.state} since {worker.since:%H:%M:%S} UTC: {worker.reason}{seen}"
    )


def _number(messages: int | None) -> str:
    return "missing" if messages is None else str(messages)
