"""Whether the database works, and the task in it: asked before a start and after a failure."""

from __future__ import annotations

import asyncio
import math
import time
from typing import TYPE_CHECKING

from aioworker.errors import DatabaseError
from aioworker.mysql import errors
from aioworker.mysql.errors import MySQLError
from aioworker.status.presence import Presence
from aioworker.tasks.context import Context
from aioworker.tasks.task import AnyTask

if TYPE_CHECKING:
    from aioworker.mysql.database import Database


class Probe:
    """Asks for one task of one worker.

    Args:
        task: The task.
        database: The database that its runs use.
        presence: Keeps the worker's own row there.
        timeout: Seconds for the database to answer.
    """

    def __init__(
        self, task: AnyTask, database: Database, presence: Presence, timeout: float
    ) -> None:
        self._task = task
        self._database = database
        self._presence = presence
        self._timeout = timeout
        self._asking = asyncio.Lock()
        self._asked_at = -math.inf  # when the last question to the database began
        self._away: DatabaseError | None = None  # and what that came to

    async def check_database(self) -> None:
        """See that the protected database takes writes, by one of our own.

        Raises:
            DatabaseError: It does not.
        """
        if not (self._presence.keeps_row or self._task.needs_database):
            return
        wanted = time.monotonic()
        # Of a task that uses no database several runs may fail at once: one question, begun
        # after the last of them failed, does for all.
        async with self._asking:
            if self._asked_at < wanted:
                began, away = time.monotonic(), None
                try:
                    await self._write()
                except DatabaseError as error:
                    away = error
                self._asked_at, self._away = began, away
            if self._away is not None:
                raise self._away

    async def check_task(self) -> None:
        """See that the task can work at all, by its own check.

        Raises:
            DatabaseError: A table or a privilege is missing, or the server is away.
        """
        if self._task.check is not None:
            with self._database.explaining():
                await self._task.check(Context(self._database, self._task.name))

    async def _write(self) -> None:
        """Write over the run's own connection; over another one if that one takes nothing."""
        if self._task.needs_database and self._database.is_open:
            self._database.expect(None)  # ours is no write of the run
            try:
                await self._write_over(self._database)
            except Exception as error:
                if isinstance(error, MySQLError) and errors.server_only_reads(error):
                    raise self._database.explain(error) from error
                # The run may have spoiled the session: another one tells whether it has.
                self._database.close()
            else:
                return
        other = self._database.another()
        try:
            await self._write_over(other)
        except (MySQLError, TimeoutError) as error:
            raise other.explain(error) from error
        finally:
            other.close()

    async def _write_over(self, database: Database) -> None:
        async with asyncio.timeout(self._timeout):
            await self._presence.prove(database)
