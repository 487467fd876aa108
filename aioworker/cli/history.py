"""The commands `audit` and `history`, and their lines as a person reads them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import typer

from aioworker.cli import console
from aioworker.cli.common import (
    App,
    BudgetName,
    TaskName,
    TaskOption,
    named,
    one_of,
    prepare,
    run,
    seconds_of,
)
from aioworker.errors import UsageError
from aioworker.words import count, moment

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aioworker.commands.history import Audit, Change, Start

KEPT_SECONDS = 7 * 86_400
LAST = 20
MOST = 10_000

Json = Annotated[bool, typer.Option("--json", help="One JSON object a line, for programs.")]


def audit(
    name: TaskName = None,
    option: TaskOption = None,
    budget: BudgetName = None,
    since: Annotated[
        str | None,
        typer.Option("--since", metavar="AGE", help="Only the last 30m, 24h, 7d."),
    ] = None,
    as_json: Json = False,
    app_names: App = None,
) -> None:
    """Tell whether the rate of a task, or of all and of what they share, was kept, by their starts.

    Those of the last 7 days are kept, 100,000 at most. Exits 1 if a rate was not kept.
    """
    seconds = None if since is None else seconds_of(since, "--since with an age")
    if seconds is not None and not 0 < seconds <= KEPT_SECONDS:
        raise UsageError(f"expected --since from 1s to 7d, got: {since!r}")
    meant = one_of(name, option, budget=budget)
    settings = prepare(app=app_names)
    from aioworker.commands import history as asking

    found = run(asking.audit(settings, meant, budget, seconds))
    console.say_all("\n".join(one.as_json() for one in found) if as_json else audited(found))
    raise typer.Exit(0 if all(one.kept for one in found) else 1)


def history(
    name: TaskName = None,
    option: TaskOption = None,
    last: Annotated[
        int, typer.Option("--last", min=1, max=MOST, help="How many lines, at most.")
    ] = LAST,
    as_json: Json = False,
    app_names: App = None,
) -> None:
    """Show the last starts of a task, or of all, and what was changed at run time meanwhile."""
    settings = prepare(app=app_names)
    from aioworker.commands import history as asking

    found = run(asking.last(settings, named(name, option), last))
    if found:
        console.say_all("\n".join(one.as_json() for one in found) if as_json else shown(found))


def audited(found: Sequence[Audit]) -> str:
    """Return the lines of each task's audit, values aligned."""
    parts = []
    for one in found:
        whose = ("task", one.task) if one.task else ("budget", one.budget)
        rows = [whose, *_audit_lines(one)]
        parts.append("\n".join(f"{label:<14}{value}" for label, value in rows))
    return "\n\n".join(parts)


def _audit_lines(audit: Audit) -> list[tuple[str, str]]:
    if audit.since is None or audit.until is None:
        return [("rate", "no start is noted")]
    between = f"from {moment(audit.since)} to {moment(audit.until)}"
    lines = [
        ("rate", "kept" if audit.kept else "not kept"),
        ("starts", f"{audit.starts:,}, {between}"),
        ("charges", _apart(audit, audit.least_charge)),
        ("first writes", _apart(audit, audit.least_write)),
        ("any minute", _window(audit.most_in_minute, audit.excess_in_minute)),
        ("any hour", _window(audit.most_in_hour, audit.excess_in_hour)),
    ]
    if audit.unfinished:
        lines.append(("without end", f"{audit.unfinished:,}: the worker died, or runs still"))
    if audit.missing:
        words = "by workers of an earlier version, or of rows that are gone"
        lines.append(("not noted", f"{count(audit.missing, 'start')} {words}"))
    lines.append(("not in it", "AIOWORKER_BUDGET=worker; writes outside of ctx.transaction()"))
    return lines


def _apart(audit: Audit, distance: float | None) -> str:
    if distance is not None:
        # Rounded down: what is not kept does not look as if it were.
        return f"at least {math.floor(distance * 1000) / 1000:.3f} intervals apart"
    return "fewer than two, or no limit of its own" if audit.task else "fewer than two"


def _window(most: int, excess: int) -> str:
    allowed = "as the rate allows" if excess <= 0 else f"{excess:,} more than the rate allows"
    return f"at most {count(most, 'start')}, {allowed}"


def shown(found: Sequence[Start | Change]) -> str:
    """Return a line for each start and change."""
    tasks = {one.task for one in found}
    lines = []
    for one in found:
        task = f"{one.task}  " if len(tasks) > 1 else ""
        lines.append(f"{moment(one.at)}  {task}{_words(one)}")
    return "\n".join(lines)


def _words(one: Start | Change) -> str:
    from aioworker.commands.history import Start

    if not isinstance(one, Start):
        why = f": {one.why}" if one.why else ""
        return f"{one.what}, by {one.who}{why}"
    ids = "" if one.ids is None else f", {count(one.ids, 'id')}"
    changed = "" if one.changed is None else f", {one.changed:,} changed"
    ran = "no end is noted"
    if one.ended is not None:
        seconds = (one.ended - one.at).total_seconds()
        ran = f"{one.outcome} after {seconds:.1f} s"
    messages = count(one.messages, "message")
    return f"start {one.number} by {one.worker}: {messages}{ids}{changed}; {ran}"
