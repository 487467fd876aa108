"""How a command runs: its settings and task, its signals, its end by one of them."""

from __future__ import annotations

import asyncio
import importlib
import signal
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from aioworker.errors import AioworkerError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from aioworker.settings import Settings
    from aioworker.task import Task

_Result = TypeVar("_Result")

DEFAULT_TASK = "update_current_version"
TaskName = Annotated[str, typer.Argument(metavar="TASK", help="The task's name.")]


def prepare(name: str, **options: str | None) -> tuple[Settings, Task]:
    """Read the settings, begin to log, and find the task."""
    from aioworker import logs
    from aioworker.settings import Settings
    from aioworker.task import find

    settings = Settings.load(**options)
    logs.configure(settings.log_level, settings.log_format)
    importlib.import_module("aioworker.addons")  # registers the main job
    return settings, find(name)


def on_signal(react: Callable[[signal.Signals], None]) -> None:
    """Call *react* at the first SIGTERM or SIGINT; a second one ends the process at once."""
    loop = asyncio.get_running_loop()

    def first(received: signal.Signals) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)
        react(received)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, first, number)


def run(work: Coroutine[Any, Any, _Result]) -> _Result:
    """Run a command that a signal cuts short."""

    async def cut_short() -> _Result:
        received: list[signal.Signals] = []
        working = asyncio.current_task()

        def react(number: signal.Signals) -> None:
            received.append(number)
            if working is not None:
                working.cancel()

        on_signal(react)
        try:
            return await work
        except asyncio.CancelledError as error:
            stopped = AioworkerError(f"stopped by {received[0].name}")
            for note in getattr(error, "__notes__", []):
                stopped.add_note(note)
            raise stopped from error

    return asyncio.run(cut_short())
