"""How a command runs: its settings and tasks, a signal that cuts it short, and its end."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer
from typer.core import TyperCommand

from aioworker import console
from aioworker.errors import AioworkerError, UsageError
from aioworker.signals import on_stop

if TYPE_CHECKING:
    import signal
    from collections.abc import Coroutine, Sequence

    from aioworker.settings import Settings
    from aioworker.task import AnyTask

_Result = TypeVar("_Result")

EXIT_SECONDS = 2.0
TaskName = Annotated[
    str | None,
    typer.Argument(metavar="TASK", help="The task, where there are several; or --task TASK."),
]
App = Annotated[
    str | None,
    typer.Option("--app", metavar="MODULE", help="Module that registers tasks; several by commas."),
]


class TaskCommand(TyperCommand):
    """A command whose first word may be a task; `--task TASK` anywhere is the same."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put what `--task` names before all other words."""
        options = list(args)
        first: list[str] = []
        rest: list[str] = []
        while options and options[0] != "--":
            word, equals, value = options.pop(0).partition("=")
            if word != "--task":
                rest.append(f"{word}{equals}{value}")
            elif equals:
                first.append(value)
            elif options:
                first.append(options.pop(0))
            else:
                raise UsageError("expected --task TASK, got: --task at the end")
        return super().parse_args(ctx, [*first, *rest, *options])


def named(*names: str | None) -> list[str]:
    """Return the task that is named; none for none.

    Raises:
        UsageError: Several are.
    """
    found = [name for name in names if name is not None]
    if len(found) > 1:
        raise UsageError(f"expected one task, got: {' '.join(found)}")
    return found


def prepare(**options: str | None) -> Settings:
    """Read the settings, and begin to log.

    Args:
        options: What the user gave as options, by the settings' names.
    """
    from aioworker import logs
    from aioworker.settings import Settings

    console.remember_app(options.get("app"))
    settings = Settings.load(**options)
    logs.configure(settings.log_level, settings.log_format)
    return settings


def app_tasks(settings: Settings, names: Sequence[str]) -> list[AnyTask]:
    """Return the app's tasks that are meant, the main job without an app."""
    from aioworker import logs, meant

    found = meant.of_app(settings, names)
    logs.configure(settings.log_level, settings.log_format)  # a module may have changed it
    return found


def app_task(settings: Settings, names: Sequence[str]) -> AnyTask:
    """Return the app's only task that is meant."""
    from aioworker import meant

    found = app_tasks(settings, names)
    meant.only([one.name for one in found])
    return found[0]


def to_look(settings: Settings, names: Sequence[str]) -> list[str]:
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


def end(status: int) -> NoReturn:
    """End the process; threads and exit handlers of modules may take EXIT_SECONDS for theirs."""

    def cut_off() -> None:
        time.sleep(EXIT_SECONDS)
        left = [one.name for one in threading.enumerate() if not one.daemon and one.is_alive()]
        others = ", ".join(name for name in left if name != threading.main_thread().name)
        console.tell(f"aioworker: ended without waiting for {others or 'an exit handler'}")
        with suppress(Exception):
            sys.stdout.flush()
        os._exit(status)

    threading.Thread(target=cut_off, name="aioworker exit", daemon=True).start()
    sys.exit(status)
