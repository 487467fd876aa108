"""Refreshes database rows in the background, no faster than the database can stand.

What is here is all there is to import: `task` registers a function, which may share a `Budget`
with others, take a `Context` and raise `Retry` or `DeadLetter`; `Producer` and `publish_sync`
publish to it; whatever they raise is an `AioworkerError`. `aioworker.testing` is for tests of your
tasks.
"""

# Before all else; even `__future__` is a file that might lie in the current folder.
from aioworker import early  # noqa: F401 - for what it does

# isort: split
from typing import TYPE_CHECKING, Any

from aioworker.errors import AioworkerError, DeadLetter, Retry
from aioworker.tasks.budget import Budget
from aioworker.tasks.context import Context
from aioworker.tasks.registry import task
from aioworker.tasks.task import Task

if TYPE_CHECKING:
    from aioworker.producer import Producer
    from aioworker.sync import publish_sync

    __version__: str

__all__ = [
    "AioworkerError",
    "Budget",
    "Context",
    "DeadLetter",
    "Producer",
    "Retry",
    "Task",
    "publish_sync",
    "task",
]
# A module of tasks needs no client of RabbitMQ: who publishes does.
_PUBLISHING = {"Producer": "aioworker.producer", "publish_sync": "aioworker.sync"}


def __getattr__(name: str) -> Any:
    """Import what publishes, and look up the version, when they are asked for."""
    if name == "__version__":
        from importlib.metadata import version

        return version("aioworker")
    if name in _PUBLISHING:
        from importlib import import_module

        return getattr(import_module(_PUBLISHING[name]), name)
    raise AttributeError(f"module 'aioworker' has no attribute {name!r}")


def _publish_sync(*args: Any, **kwargs: Any) -> str:
    """Publish where no event loop is, by what `publish_sync` means when it is called."""
    from aioworker import publish_sync

    return publish_sync(*args, **kwargs)


Task.publisher = _publish_sync


def __dir__() -> list[str]:
    """Return every name, those too that are imported when they are asked for."""
    return sorted({*globals(), *__all__, "__version__"})
