"""Which message ran when its worker died, and how often: kept in the budget's row.

The charge notes the message that it lets run, and its end takes the note back. A note that
is found in one's turn is of a worker that died, or lost the database, in the middle of its
run. What a worker merely held is never noted, so no number of restarts counts against it.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from typing import TYPE_CHECKING

from aioworker.errors import DatabaseError
from aioworker.logs import fields
from aioworker.mysql.errors import MySQLError

if TYPE_CHECKING:
    from aioworker.budget.tables import Row
    from aioworker.mysql.database import Database

log = logging.getLogger(__name__)

MOST_DEATHS = 5  # of its workers while it ran: then a message is a dead letter
KEPT = 100  # messages that are remembered, so that the row stays small
WITHDRAW_SECONDS = 2.0

_WRITE = """UPDATE aioworker_budget SET running = NULL, deaths = %(deaths)s
WHERE task = %(task)s AND IS_USED_LOCK(%(lock)s) = CONNECTION_ID()"""
_WITHDRAW = """UPDATE aioworker_budget SET running = NULL
WHERE task = %(task)s AND holder = %(worker)s AND running = %(running)s"""


class Deaths:
    """The notes of one task's row, as one worker reads and writes them.

    Args:
        database: Where the row is.
        arguments: `task`, `lock` (the name of its turn) and `worker`, for the statements.
    """

    def __init__(self, database: Database, arguments: dict[str, object]) -> None:
        self._database = database
        self._arguments = arguments
        self._deaths: Counter[str] = Counter()
        self._running: str | None = None  # what this worker noted and has not taken back
        self._over = False  # whether that ended, and the row does not say so yet

    def of(self, message: str) -> int:
        """Return how often a worker died while this message ran, as of the last `review`."""
        return self._deaths[message]

    def note(self, message: str) -> str:
        """Return the note for a charge that lets a message run."""
        self._running, self._over = message, False
        return json.dumps([message])

    def void(self) -> None:
        """Forget a note that was not written: its start was not charged."""
        self._running = None

    async def review(self, row: Row) -> None:
        """Count what ran when its worker died; only in one's turn.

        This worker lives: what others counted of it, while it was cut off from the
        database, is taken back.
        """
        self._deaths = Counter(row.deaths)
        died, mine = row.running, self._running
        if mine is not None:
            if died == [mine] and row.holder == self._arguments["worker"]:
                died = []
            elif self._deaths[mine]:
                self._deaths[mine] -= 1
        self._deaths.update(died)
        if not row.running and mine is None:
            return
        self.paid(await self._database.execute(_WRITE, self._noted()))
        for message in died:
            log.warning(
                "worker died while it ran",
                extra=fields(worker=row.holder, message_id=message, deaths=self._deaths[message]),
            )

    def ended(self, message: str) -> None:
        """Note that a message did not kill its worker: to be written before the turn is given back.

        On a lost connection the note stays: see `withdraw`.
        """
        if self._running is not None or message in self._deaths:
            del self._deaths[message]
            self._over = True

    def owed(self) -> tuple[list[str], dict[str, object]]:
        """Return what is to be run before the turn is given back, if anything; its arguments."""
        return [_WRITE] if self._over else [], self._noted()

    def paid(self, matched: int) -> None:
        """Note how many rows that statement wrote."""
        if matched:
            self._running, self._over = None, False

    async def withdraw(self) -> None:
        """Take back a note whose turn is lost, unless it was counted already.

        Out of reach of the database it stays, and the next `review` takes it back.
        """
        if self._running is None:
            return
        arguments = {**self._arguments, "running": json.dumps([self._running])}
        try:
            async with asyncio.timeout(WITHDRAW_SECONDS):
                if await self._database.execute(_WITHDRAW, arguments):
                    self._running = None
        except (MySQLError, DatabaseError, TimeoutError):
            return

    def _noted(self) -> dict[str, object]:
        counted = {key: deaths for key, deaths in self._deaths.items() if deaths > 0}
        newest = dict(list(counted.items())[-KEPT:])
        deaths = json.dumps(newest) if newest else None
        return {**self._arguments, "deaths": deaths}
