"""The modules that register a user's tasks."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from aioworker.errors import AioworkerError, TaskError, told


def load(modules: Sequence[str]) -> None:
    """Import modules, from the current folder too if they are nowhere else.

    What lies there is behind all that is installed: aioworker's own modules are not taken from it.

    Raises:
        TaskError: One of them does not import; the text says why and where.
        AioworkerError: Likewise, for a server that is away.
    """
    if modules and (folder := os.getcwd()) not in sys.path:
        sys.path.append(folder)
    for module in modules:
        try:
            with _without_bytecode():
                importlib.import_module(module)
        except AioworkerError as error:
            raise TaskError(f"module {module!r}: {error}") from error
        except (Exception, SystemExit) as error:
            # A server that is away comes back, and code that is wrong does not mend itself.
            away = isinstance(error, ConnectionError | TimeoutError)
            raise (AioworkerError if away else TaskError)(
                f"module {module!r} does not import: {told(error)}{place(error)}"
            ) from error


def located(module: str) -> str:
    """Return a loaded module with its file, which may be another than its user thinks."""
    file = getattr(sys.modules.get(module), "__file__", None)
    return f"{module} ({file})" if file else module


@contextmanager
def _without_bytecode() -> Iterator[None]:
    """Leave no compiled code behind: it is told from its source by whole seconds.

    Code that changes twice within one would run as it was, after a reload too.
    """
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


def place(error: BaseException) -> str:
    """Return the file and line of a user's code that raised, in brackets; nothing if none did."""
    if isinstance(error, SyntaxError):
        return ""  # its text has it
    found = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        name = frame.f_code.co_filename
        if not name.startswith("<") and name not in (__file__, importlib.__file__):
            found = f" ({os.path.relpath(name)}, line {line})"
    return found
