"""Refreshes database rows in the background, no faster than the database can stand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

# Imported here and now: the function `task` has the name of the module it comes from, and
# whichever is imported last is what `aioworker.task` means.
from aioworker.task import Context, task

if TYPE_CHECKING:
    __version__: str

__all__ = ["Context", "task"]


def __getattr__(name: str) -> Any:
    """Look up the version when it is asked for."""
    if name == "__version__":
        from importlib.metadata import version

        return version("aioworker")
    raise AttributeError(f"module 'aioworker' has no attribute {name!r}")
