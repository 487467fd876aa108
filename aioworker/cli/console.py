"""What a person reads while a command runs: results, and progress beside them."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from contextlib import contextmanager
from io import TextIOWrapper
from typing import TYPE_CHECKING, NoReturn

from aioworker.words import printable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from rich.console import Console, ConsoleOptions
    from rich.text import Text

LINE_SECONDS = 5.0


def open_streams() -> None:
    """Have all three streams, though whoever started us closed one, and any character in them."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - for the whole process
        elif mode == "w" and isinstance(stream := getattr(sys, name), TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(out := sys.stdout, TextIOWrapper):
        sys.stdout = _Output(out)


class OutputError(Exception):
    """Standard output takes nothing, as on a full disk; its text is the system's reason."""


class _Output(TextIOWrapper):
    """Standard output, whoever writes to it: the help is printed by a library.

    Args:
        stream: The one before, which others may know by `sys.__stdout__`.
    """

    def __init__(self, stream: TextIOWrapper) -> None:
        super().__init__(
            stream.buffer,
            encoding=stream.encoding,
            errors=stream.errors,
            line_buffering=stream.line_buffering,
        )
        self._before = stream  # whose end would close the buffer that both write to

    def write(self, text: str) -> int:
        with self._taken():
            return super().write(text)

    def flush(self) -> None:
        with self._taken():
            super().flush()

    @contextmanager
    def _taken(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # Python would try again at its end, and say so in lines of its own.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            if isinstance(error, BrokenPipeError):
                raise  # whoever reads has seen enough
            raise OutputError(error.strerror) from error


def say(line: str) -> None:
    """Print a result in one line, to standard output.

    Raises:
        OutputError: It takes nothing.
    """
    sys.stdout.write(printable(line) + "\n")
    sys.stdout.flush()


def say_all(text: str) -> None:
    """Print a result of several lines."""
    for line in text.split("\n"):
        say(line)


def note(line: str) -> None:
    """Print progress in one line, to standard error."""
    sys.stderr.write(printable(line) + "\n")
    sys.stderr.flush()


def confirm(question: str) -> bool:
    """Ask a person; anything but yes is no."""
    note(f"{question} [y/N]")
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def is_terminal() -> bool:
    """Return whether a person watches the progress."""
    return sys.stderr.isatty()


async def watch(show: Callable[[], Awaitable[str]], seconds: float) -> NoReturn:
    """Show a text again and again, until cancelled: in place on a terminal, else one by one."""
    if not sys.stdout.isatty():
        while True:
            say_all(await show())
            await asyncio.sleep(seconds)
    from rich.live import Live

    with Live(auto_refresh=False, screen=True) as live:
        while True:
            live.update(_Fitting(await show()), refresh=True)
            await asyncio.sleep(seconds)


class _Fitting:
    """A text as far as the terminal has room for it; a last line says how much it has not.

    Args:
        text: What is to be seen.
    """

    def __init__(self, text: str) -> None:
        self._text = "\n".join(map(printable, text.split("\n")))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        from rich.text import Text

        lines = list(Text(self._text).wrap(console, options.max_width))
        height = options.height or console.height
        if len(lines) > height:
            hidden = len(lines) - (height - 1)
            lines[height - 1 :] = [Text(f"… {hidden} more lines do not fit")]
        yield Text("\n").join(lines)


@contextmanager
def progress(what: str, total: int | None) -> Iterator[Callable[[int, str], None]]:
    """Show how far long work is: a bar on a terminal, a line now and then elsewhere.

    Args:
        what: The words before the bar.
        total: How many there are to do, None where that is not known; only the bar needs it.

    Yields:
        What to call with the number done and the line that says so.
    """
    if not is_terminal():
        shown_at = time.monotonic()

        def show_line(_done: int, line: str) -> None:
            nonlocal shown_at
            if time.monotonic() - shown_at >= LINE_SECONDS:
                shown_at = time.monotonic()
                note(line)

        yield show_line
        return
    # rich takes 40 ms to import: only where it is seen.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (what, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        bar = bars.add_task(what, total=total)
        yield lambda done, _line: bars.update(bar, completed=done)
