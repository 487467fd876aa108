"""What a task gets besides its arguments."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aioworker.tasks.threads import ThreadTransaction, running_loop

if TYPE_CHECKING:
    from collections.abc import Iterable
    from contextlib import AbstractAsyncContextManager

    from aioworker.mysql.database import Cursor, Database


@dataclass(frozen=True, slots=True)
class Context:
    """What a task gets in its first parameter, where that is annotated `Context`.

    Args:
        database: The database that is being protected, for coroutines; a `def` has
            `transaction()`.
        task: The task's name.
        message_id: The message's id.
        attempt: This run's number for this message, counted from 1.
        counts: Whatever the task counts; shown in the log line of the run.
        messages: The ids of all messages that run together; `message_id` and `attempt` are those
            of the one that was published first.
        changed_ids: The ids that `changed` has counted.
    """

    database: Database
    task: str
    message_id: str = "none"
    attempt: int = 1
    counts: Counter[str] = field(default_factory=Counter)
    messages: tuple[str, ...] = ()
    changed_ids: set[Any] = field(default_factory=set, repr=False, compare=False)
    _loop: asyncio.AbstractEventLoop | None = field(
        default_factory=running_loop, repr=False, compare=False
    )

    @property
    def log(self) -> logging.Logger:
        """The logger of this task: `aioworker.task.<name>`."""
        return logging.getLogger(f"aioworker.task.{self.task}")

    def changed(self, ids: Iterable[Any]) -> None:
        """Count rows that this run has changed, in its log line and in those of its messages.

        Args:
            ids: The rows' ids, of its chunk; each counts once.
        """
        new = set(ids) - self.changed_ids
        self.changed_ids.update(new)
        self.counts["changed"] += len(new)

    def transaction(self) -> Transaction:
        """Open a transaction: committed at the end, rolled back on an exception.

        `async with ctx.transaction() as cursor` in an `async def`, whose cursor is awaited;
        `with ctx.transaction() as cursor` in a `def`, whose cursor is not. It works on the
        connection that holds the task's turn, one statement at a time, and may wait until
        the run's first write is due: up to the interval of the rate limit.

        Raises:
            MySQLError: The server refuses a statement; what is not caught becomes a retry
                or a dead letter, by its kind.
            TimeoutError: The run's time is up.
        """
        return Transaction(self.database, self._loop)


class Transaction(ThreadTransaction):
    """A transaction that is not open yet: by `async with` for a coroutine, `with` for a thread."""

    def __init__(self, database: Database, loop: asyncio.AbstractEventLoop | None) -> None:
        super().__init__(database, loop)
        self._ours: AbstractAsyncContextManager[Cursor] = database.transaction()

    async def __aenter__(self) -> Cursor:
        return await self._ours.__aenter__()

    async def __aexit__(self, *error: Any) -> bool | None:
        return await self._ours.__aexit__(*error)
