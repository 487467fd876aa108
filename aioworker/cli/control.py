"""The commands `rate-limit`, `pause` and `resume`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from aioworker.cli import console
from aioworker.cli.common import App, TaskName, TaskOption, named, prepare, run
from aioworker.errors import UsageError

if TYPE_CHECKING:
    from aioworker.commands.controls import Paused
    from aioworker.limits import InForce

Why = Annotated[
    str | None, typer.Option("--reason", metavar="TEXT", help="Why; kept, and shown by status.")
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

    why = controls.checked_reason(settings, why)
    done = run(controls.set_rate(settings, named(given, option), rate, why))
    if isinstance(done, controls.Paused):
        _say_paused(done)
        return
    still = f"; still {done.pause}" if done.pause else ""
    console.say(f"{done.task}: rate limit {_rate(done.rate)} (was {_rate(done.before)}){still}")


def pause(
    name: TaskName = None, option: TaskOption = None, why: Why = None, app_names: App = None
) -> None:
    """Let no start of a task begin, on any worker, until `resume`; it outlives them.

    What runs ends as usual. Messages stay queued.
    """
    settings = prepare(app=app_names)
    from aioworker.commands import controls

    why = controls.checked_reason(settings, why)
    _say_paused(run(controls.pause(settings, named(name, option), why)))


def resume(
    name: TaskName = None, option: TaskOption = None, why: Why = None, app_names: App = None
) -> None:
    """End a pause of a task, on every worker."""
    settings = prepare(app=app_names)
    from aioworker.commands import controls

    why = controls.checked_reason(settings, why)
    done = run(controls.resume(settings, named(name, option), why))
    if done.changed:
        console.say(f"{done.task}: resumed, rate limit {_rate(done.rate)}")
    else:
        console.say(f"{done.task}: not paused, rate limit {_rate(done.rate)}; nothing was changed")


def _say_paused(done: Paused) -> None:
    if done.earlier:
        console.say(f"{done.task}: {done.earlier}; nothing was changed")
    else:
        console.say(f"{done.task}: paused; what runs ends, nothing new begins")


def _rate(force: InForce) -> str:
    """Return a rate limit and where it comes from."""
    from aioworker.limits import Source

    if force.source is Source.UNKNOWN:
        return "each worker's own"
    return f"{force.rate}, {force.source}"
