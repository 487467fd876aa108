"""How a command runs: its settings and tasks, a signal that cuts it short, and its end."""

from __future__ import annotations

import asyncio
import os
import re
import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer

from aioworker import words
from aioworker.cli import console
from aioworker.errors import AioworkerError, UsageError
from aioworker.worker.signals import on_stop

if TYPE_CHECKING:
    import signal
    from collections.abc import Coroutine, Sequence

    from aioworker.settings import Settings
    from aioworker.tasks.task import AnyTask

_Result = TypeVar("_Result")

EXIT_SECONDS = 2.0


def _checked(names: list[str] | None) -> list[str] | None:
    """Refuse what an empty variable of the shell leaves behind `--task`: nothing, or an option."""
    for name in names or []:
        if not name.strip() or name.startswith("-"):
            raise UsageError(f"expected --task TASK, got: {name!r}")
    return names


TaskName = Annotated[
    list[str] | None, typer.Argument(metavar="TASK", help="The task, if there are several; one.")
]
TaskNames = Annotated[list[str] | None, typer.Argument(metavar="TASK", help="The tasks' names.")]
TaskOption = Annotated[
    list[str] | None,
    typer.Option("--task", metavar="TASK", callback=_checked, help="The same as TASK."),
]
BudgetName = Annotated[
    str | None,
    typer.Option("--budget", metavar="NAME", help="The budget that tasks share, not a task."),
]
App = Annotated[
    str | None,
    typer.Option("--app", metavar="MODULE", help="Module that registers tasks; several by commas."),
]


_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def seconds_of(text: str, what: str) -> int:
    """Return how many seconds a text such as `30m`, `2h` or `7d` means.

    Args:
        text: The text.
        what: What is expected, for the error: `an age`.

    Raises:
        UsageError: It means none.
    """
    match = re.fullmatch(r"([0-9]{1,6})([smhd])", text)
    if match is None:
        raise UsageError(f"expected {what} such as 30m, 2h or 7d, got: {text!r}")
    return int(match[1]) * _UNITS[match[2]]


def named(*words: list[str] | None) -> list[str]:
    """Return the task that is named, as TASK or by `--task`; none for none.

    Raises:
        UsageError: Several are.
    """
    found = [name for names in words for name in names or []]
    if len(found) > 1:
        raise UsageError(f"expected one task, got: {' '.join(found)}")
    return found


def one_of(*words: list[str] | None, budget: str | None, every: bool = False) -> list[str]:
    """Return the task that is named; none for the only one, for a budget, or for all.

    Raises:
        UsageError: More than one of these is.
    """
    found = named(*words)
    said = [*found, *([] if budget is None else [f"--budget {budget}"]), *["--all"][: int(every)]]
    if len(said) > 1:
        raise UsageError(f"expected a task, --budget or --all, got: {', '.join(said)}")
    return found


def prepare(**options: str | None) -> Settings:
    """Read the settings, and begin to log.

    Args:
        options: What the user gave as options, by the settings' names.
    """
    from aioworker import logs
    from aioworker.settings import Settings

    words.remember_app(options.get("app"))
    settings = Settings.load(**options)
    logs.configure(settings.log_level, settings.log_format)
    return settings


def app_tasks(settings: Settings, names: Sequence[str]) -> list[AnyTask]:
    """Return the app's tasks that are meant, the main job without an app."""
    from aioworker import logs
    from aioworker.commands import which_tasks

    found = which_tasks.of_app(settings, names)
    logs.configure(settings.log_level, settings.log_format)  # a module may have changed it
    return found


def app_task(settings: Settings, names: Sequence[str]) -> AnyTask:
    """Return the app's only task that is meant."""
    from aioworker.commands import which_tasks

    found = app_tasks(settings, names)
    which_tasks.only([one.name for one in found])
    return found[0]


def names_to_show(settings: Settings, names: Sequence[str]) -> list[str]:
    """Return the names of the tasks to look at; none where the table has to tell.

    With `AIOWORKER_BUDGET=worker` there is no table: they are the app's.
    """
    if settings.budget == "shared":
        return list(names)
    return [one.name for one in app_tasks(settings, names)]


def run(work: Coroutine[Any, Any, _Result]) -> _Result:
    """Run a command that a signal cuts short."""

    async def cut_short() -> _Result:
        received: list[signal.Signals] = []
        working = asyncio.current_task()

        def react(number: signal.Signals) -> None:
            received.append(number)
            if working is not None:
                working.cancel()

        on_stop(react)
        try:
            return await work
        except asyncio.CancelledError as error:
            stopped = AioworkerError(f"stopped by {received[0].name}")
            for note in getattr(error, "__notes__", []):
                stopped.add_note(note)
            raise stopped from error

    return asyncio.run(cut_short())


def end_process(status: int) -> NoReturn:
    """End the process; threads and exit handlers of modules may take EXIT_SECONDS for theirs."""

    def cut_off() -> None:
        time.sleep(EXIT_SECONDS)
        left = [one.name for one in threading.enumerate() if not one.daemon and one.is_alive()]
        others = ", ".join(name for name in left if name != threading.main_thread().name)
        console.note(f"aioworker: ended without waiting for {others or 'an exit handler'}")
        with suppress(Exception):
            sys.stdout.flush()
        os._exit(status)

    threading.Thread(target=cut_off, name="aioworker exit", daemon=True).start()
    sys.exit(status)
