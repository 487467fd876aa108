"""The commands `rate-limit`, `pause` and `resume`."""

from __future__ import annotations

from typing import Annotated

import typer

from aioworker.cli import console
from aioworker.cli.common import App, TaskName, TaskOption, named, prepare, run
from aioworker.errors import UsageError

REASON_LENGTH = 500


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


Why = Annotated[
    str | None,
    typer.Option(
        "--reason",
        metavar="TEXT",
        callback=_in_one_line,
        help="Why; kept, and shown by status.",
    ),
]


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

    console.say(run(controls.set_rate(settings, named(given, option), rate, why)))


def pause(
    name: TaskName = None, option: TaskOption = None, why: Why = None, app_names: App = None
) -> None:
    """Let no start of a task begin, on any worker, until `resume`; it outlives them.

    What runs ends as usual. Messages stay queued.
    """
    settings = prepare(app=app_names)
    from aioworker.commands import controls

    console.say(run(controls.pause(settings, named(name, option), why)))


def resume(
    name: TaskName = None, option: TaskOption = None, why: Why = None, app_names: App = None
) -> None:
    """End a pause of a task, on every worker."""
    settings = prepare(app=app_names)
    from aioworker.commands import controls

    console.say(run(controls.resume(settings, named(name, option), why)))
