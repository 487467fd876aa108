"""The commands `rate-limit`, `pause` and `resume`."""

from __future__ import annotations

from typing import Annotated

import typer

from aioworker.cli import console
from aioworker.cli.common import (
    App,
    BudgetName,
    TaskName,
    TaskOption,
    one_of,
    prepare,
    run,
    seconds_of,
)
from aioworker.errors import UsageError

REASON_LENGTH = 500
LONGEST_DAYS = 366


def _in_one_line(why: str | None) -> str | None:
    """Return a reason as it is kept; refuse one that cannot be."""
    if why is None:
        return None
    line = " ".join(why.split())
    if len(line) > REASON_LENGTH or not line.isprintable():
        raise UsageError(
            f"--reason: expected up to {REASON_LENGTH} printable characters,"
            f" got: {len(line)}, beginning with {line[:20]!r}"
        )
    return line


def _checked(span: str | None) -> str | None:
    """Refuse a time that is none, before anything is read."""
    if span is not None:
        _seconds(span)
    return span


def _seconds(span: str | None) -> int | None:
    if span is None:
        return None
    seconds = seconds_of(span, "--for with a time")
    if not 1 <= seconds <= LONGEST_DAYS * 86_400:
        raise UsageError(f"expected --for from 1s to {LONGEST_DAYS}d, got: {span!r}")
    return seconds


Why = Annotated[
    str | None,
    typer.Option(
        "--reason",
        metavar="TEXT",
        callback=_in_one_line,
        help="Why; kept, and shown by status.",
    ),
]

Span = Annotated[
    str | None,
    typer.Option(
        "--for",
        metavar="TIME",
        callback=_checked,
        help="For so long, and then as before: 30m, 2h, 7d.",
    ),
]
Every = Annotated[
    bool, typer.Option("--all", help="All tasks of this database, and the budgets they share.")
]


def rate_limit(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TASK] RATE", help="The task, and its rate: 10/m, or none."),
    ] = None,
    option: TaskOption = None,
    budget: BudgetName = None,
    reset: Annotated[
        bool, typer.Option("--reset", help="Take the rate back: the workers' own counts again.")
    ] = False,
    why: Why = None,
    span: Span = None,
    app_names: App = None,
) -> None:
    """Set the rate limit of all workers of a task while they run; it outlives them.

    They follow within 2 seconds or one interval, whichever is sooner. 0/m pauses, none is no
    limit; a new rate does not end a pause, `resume` does. At the end of --for the rate counts
    that was set before without one, or else the workers' own.
    """
    given = list(words or [])
    if len(given) > (1 if reset else 2) or not (given or reset):
        usage = "[TASK] --reset" if reset else "[TASK] RATE"
        raise UsageError(f"expected rate-limit {usage}, got: {' '.join(given) or 'nothing'}")
    if reset and span is not None:
        raise UsageError("expected --reset or --for, got both: the workers' own rate has no end")
    from aioworker.limits import parse_limit

    rate = None if reset else parse_limit(given.pop())
    meant = one_of(given, option, budget=budget)
    settings = prepare(app=app_names)
    from aioworker.commands import controls

    instruction = controls.Instruction(why, _seconds(span), budget)
    console.say(run(controls.set_rate(settings, meant, rate, instruction)))


def pause(
    name: TaskName = None,
    option: TaskOption = None,
    budget: BudgetName = None,
    every: Every = False,
    span: Span = None,
    why: Why = None,
    app_names: App = None,
) -> None:
    """Let no start of a task begin, on any worker, until `resume`; it outlives them.

    What runs stops before its next transaction: what it has committed stays, and its messages go
    back to their queues, uncounted. A pause is not replaced by a shorter one: that exits 1.
    """
    meant = one_of(name, option, budget=budget, every=every)
    settings = prepare(app=app_names)
    from aioworker.commands import controls

    instruction = controls.Instruction(why, _seconds(span), budget, every)
    console.say_all(run(controls.pause(settings, meant, instruction)))


def resume(
    name: TaskName = None,
    option: TaskOption = None,
    budget: BudgetName = None,
    every: Every = False,
    why: Why = None,
    app_names: App = None,
) -> None:
    """End a pause of a task, on every worker."""
    meant = one_of(name, option, budget=budget, every=every)
    settings = prepare(app=app_names)
    from aioworker.commands import controls

    instruction = controls.Instruction(why, None, budget, every)
    console.say_all(run(controls.resume(settings, meant, instruction)))
