"""Tasks: functions registered under a name, and what they are called with."""

from __future__ import annotations

import difflib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aioworker.errors import UnknownTaskError
from aioworker.limits import RateLimit

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from aioworker.db import Cursor, Database


@dataclass(frozen=True, slots=True)
class Context:
    """What a task gets besides its chunk.

    Args:
        database: The database that is being protected.
        task: The task's name.
        message_id: The message's id.
        attempt: This run's number for this message, counted from 1.
        counts: Whatever the task counts; shown in the log line of the run.
    """

    database: Database
    task: str
    message_id: str = "none"
    attempt: int = 1
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def log(self) -> logging.Logger:
        """The logger of this task: `aioworker.task.<name>`."""
        return logging.getLogger(f"aioworker.task.{self.task}")

    def transaction(self) -> AbstractAsyncContextManager[Cursor]:
        """Open a transaction: committed at the end, rolled back on an exception."""
        return self.database.transaction()


Function = Callable[[Context, list[int]], Awaitable[None]]
Needed = Callable[[Context, list[int]], Awaitable[list[int]]]
Keys = Callable[[Context, int], AsyncIterator[list[int]]]


@dataclass(slots=True)
class Task:
    """A function that can be published to, made by `task`.

    Args:
        name: What it is registered, published and queued under.
        function: Called with a `Context` and a chunk of up to 1000 ids; must leave the same
            rows when called twice.
        rate_limit: How often it may start; None is no limit.
        keys: Called with a `Context` and an id: yields the ids of a sweep behind that id,
            ascending, in pages.
    """

    name: str
    function: Function
    rate_limit: RateLimit | None
    keys: Keys
    reader: Needed | None = None

    async def __call__(self, ctx: Context, ids: list[int]) -> None:
        """Run the function itself, as undecorated."""
        await self.function(ctx, ids)

    def needed(self, reader: Needed) -> Needed:
        """Register a function that returns which ids of a chunk still need writing.

        It only reads. A chunk that needs nothing costs nothing of the rate limit.
        """
        self.reader = reader
        return reader


_registry: dict[str, Task] = {}


def task(*, rate_limit: str | None, keys: Keys) -> Callable[[Function], Task]:
    """Register a function as the task of its name.

    Args:
        rate_limit: Starts in a unit of time, such as `"2/m"`; None is no limit.
        keys: See `Task`.

    Raises:
        RateLimitError: `rate_limit` is not COUNT/UNIT.
    """
    rate = None if rate_limit is None else RateLimit.parse(rate_limit)

    def register(function: Function) -> Task:
        registered = Task(function.__name__, function, rate, keys)
        _registry[registered.name] = registered
        return registered

    return register


def find(name: str) -> Task:
    """Return the task of this name.

    Raises:
        UnknownTaskError: None is registered; the text has the nearest name.
    """
    try:
        return _registry[name]
    except KeyError:
        known = difflib.get_close_matches(name, _registry, n=1, cutoff=0) or ["none"]
        raise UnknownTaskError(f"unknown task {name!r}, did you mean {known[0]}?") from None
