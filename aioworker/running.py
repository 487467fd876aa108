"""How a command runs: its settings and tasks, a signal that cuts it short, and its end."""

from __future__ import annotations

import asyncio
import importlib
import os
import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer

from aioworker import console
from aioworker.errors import AioworkerError, UsageError
from aioworker.signals import on_stop

if TYPE_CHECKING:
    import signal
    from collections.abc import Coroutine

    from aioworker.settings import Settings
    from aioworker.task import AnyTask

_Result = TypeVar("_Result")

MAIN_JOB = "aioworker.addons"
EXIT_SECONDS = 2.0
DEFAULT_TASK = "update_current_version"
TaskName = Annotated[str, typer.Argument(metavar="TASK", help="The task's name.")]
App = Annotated[
    str | None,
    typer.Option("--app", metavar="MODULE", help="Module that registers tasks; several by commas."),
]


def prepare(name: str, **options: str | None) -> tuple[Settings, AnyTask]:
    """Read the settings, begin to log, and find the task."""
    settings, [task] = prepare_all([name], **options)
    return settings, task


def prepare_all(names: list[str], **options: str | None) -> tuple[Settings, list[AnyTask]]:
    """Read the settings, begin to log, and find the tasks.

    Without a name they are all that the app's modules register, or the main job where
    there is no app.
    """
    from aioworker import apps, logs
    from aioworker.settings import Settings
    from aioworker.task import find, registered

    settings = Settings.load(**options)
    logs.configure(settings.log_level, settings.log_format)
    importlib.import_module(MAIN_JOB)
    own = registered()
    apps.load(settings.app)
    logs.configure(settings.log_level, settings.log_format)  # a module may have changed it
    theirs = [one for one in registered() if one not in own]
    if settings.app and not theirs:
        raise UsageError(f"expected {', '.join(settings.app)} to register a task with @task")
    return settings, [find(name) for name in dict.fromkeys(names or theirs or [DEFAULT_TASK])]


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
