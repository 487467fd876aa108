"""The words and lines of `aioworker status`, as a person reads them."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from aioworker.clock import APART_SECONDS
from aioworker.limits import Source
from aioworker.words import duration

if TYPE_CHECKING:
    from aioworker.commands.status import Limit, Status
    from aioworker.reasons import ReasonKind
    from aioworker.status.read import Worker

_SOURCES = {
    Source.RUN_TIME: "set at run time",
    Source.SETTING: "by setting",
    Source.TASK: "the task's own",
    Source.WORKERS: "the workers' own",
}


def text(status: Status) -> str:
    """Return the lines as one text, values aligned."""
    return "\n".join(f"{name:<11}{' '.join(value.split())}" for name, value in lines(status))


def lines(status: Status) -> list[tuple[str, str]]:
    """Return what a person reads: names and values, in order."""
    shown = [("task", status.task), ("waits", status.waits)]
    if status.queued is not None:
        numbers = ", ".join(f"{name} {_number(n)}" for name, n in asdict(status.queued).items())
        shown.append(("queued", numbers))
    if status.backlog_seconds:
        shown.append(("done in", f"{duration(status.backlog_seconds)} at this rate"))
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


def _budget_lines(limit: Limit, waits: ReasonKind) -> list[tuple[str, str]]:
    changed = ""
    if limit.set_by is not None and limit.set_at is not None:
        why = f": {limit.set_why}" if limit.set_why else ""
        changed = f"; last change by {limit.set_by} at {limit.set_at:%Y-%m-%d %H:%M:%S} UTC{why}"
    shown = [("rate", f"{_rate(limit)}{changed}")]
    if limit.scope != "shared":
        return shown
    if limit.last_start is None:
        unlimited = limit.rate == "none"
        shown.append(("last start", "not counted without a rate limit" if unlimited else "never"))
    else:
        by = f" by {limit.last_worker}" if limit.last_worker else ""
        shown.append(("last start", f"{limit.last_start:%Y-%m-%d %H:%M:%S} UTC{by}"))
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
    whose = "of all workers" if limit.scope == "shared" else "of each worker alone"
    return f"{limit.rate} {whose}, {_SOURCES[Source(limit.source)]}"


def _next_start(limit: Limit, waits: ReasonKind) -> str:
    """Return when the next start may begin, where no moment is known."""
    if limit.paused:
        return "not while paused"
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
