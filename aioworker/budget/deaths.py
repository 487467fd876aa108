"""Which messages ran when their worker died, and how often: a row for each in `aioworker_run`.

The charge notes the messages that it lets run, and how many they are; their end takes the notes
back. A note that is found in one's turn is of a worker that died, or lost the database, in the
middle of a run. If one message ran, it counts as a death of it; of several it is not known whose:
they run with fewer others from then on. What a worker merely held is never noted, so no number of
restarts counts against it.
"""

from __future__ import annotations

import asyncio
import json
import logging
from typing import TYPE_CHECKING, NamedTuple

from aioworker.budget import tables
from aioworker.errors import DatabaseError
from aioworker.logs import fields
from aioworker.mysql.errors import MySQLError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from aioworker.budget.tables import Row
    from aioworker.mysql.database import Database

log = logging.getLogger(__name__)

MOST_DEATHS = 5  # of its workers while it ran alone: then a message is a dead letter
KEPT_DAYS = 7  # of a message that never came back: somebody took it away
WITHDRAW_SECONDS = 2.0

_MINE = "IS_USED_LOCK(%(lock)s) = CONNECTION_ID()"  # nobody else writes while the turn is held
# Behind the charge, in one packet: only if that has let them run.
NOTE = """INSERT INTO aioworker_run (task, message, together, worker, since)
SELECT %(task)s, message, %(together)s, %(worker)s, SYSDATE(6)
FROM JSON_TABLE(%(messages)s, '$[*]' COLUMNS (message VARCHAR(64) PATH '$')) AS noted
WHERE ROW_COUNT() = 1
ON DUPLICATE KEY UPDATE together = %(together)s, worker = %(worker)s, since = SYSDATE(6)"""
_DIED = f"""UPDATE aioworker_run SET deaths = deaths + (together = 1), worker = NULL
WHERE task = %(task)s AND worker IS NOT NULL AND {_MINE}"""
_OLD = f"""DELETE FROM aioworker_run
WHERE task = %(task)s AND since < SYSDATE(6) - INTERVAL {KEPT_DAYS} DAY AND {_MINE}"""
_FORGET = f"""DELETE FROM aioworker_run
WHERE task = %(task)s AND message IN %(over)s AND {_MINE}"""
_WITHDRAW = """DELETE FROM aioworker_run
WHERE task = %(task)s AND worker = %(worker)s AND message IN %(noted)s"""
# What a worker of an earlier version noted, in the budget's row.
_IMPORT = """INSERT INTO aioworker_run (task, message, together, deaths, since)
VALUES (%(task)s, %(message)s, 1, %(deaths)s, SYSDATE(6))
ON DUPLICATE KEY UPDATE together = 1, deaths = deaths + %(deaths)s"""
_IMPORTED = f"""UPDATE aioworker_budget SET running = NULL, deaths = NULL
WHERE task = %(task)s AND {_MINE}"""


class Note(NamedTuple):
    """A message's note.

    Args:
        together: How many messages ran, itself among them.
        deaths: How often its worker died while it ran alone.
        worker: Whose run it is that is on; None if that worker is known to have died.
    """

    together: int
    deaths: int
    worker: str | None


class Deaths:
    """The notes of one task's messages, as one worker reads and writes them.

    Args:
        database: Where they are.
        arguments: `task`, `lock` (the name of its turn) and `worker`, for the statements.
    """

    def __init__(self, database: Database, arguments: dict[str, object]) -> None:
        self._database = database
        self._arguments = arguments
        self._notes: dict[str, Note] = {}
        self._mine: set[str] = set()  # what this worker noted and has not taken back
        self._over: set[str] = set()  # what has ended, and is noted still

    def of(self, message: str) -> int:
        """Return how often a worker died while this message ran, as of the last `review`."""
        return self._notes[message].deaths if message in self._notes else 0

    def together(self, message: str) -> int | None:
        """Return with how many it may run, since a worker died; None for any number."""
        note = self._notes.get(message)
        return None if note is None else max(note.together // 2, 1)

    def note(self, messages: Sequence[str]) -> dict[str, object]:
        """Return the arguments of `NOTE` for a charge that lets messages run."""
        self._mine = set(messages)
        return {"messages": json.dumps(list(messages)), "together": len(messages)}

    def void(self) -> None:
        """Forget notes that were not written: their start was not charged."""
        self._mine.clear()

    async def review(self, row: Row, found: Sequence[tuple[Any, ...]]) -> None:
        """Count what ran when its worker died; only in one's turn.

        This worker lives: what others noted of it, while it was cut off from the database, is
        forgotten.

        Args:
            row: The budget's row.
            found: The answer to `tables.NOTES`.
        """
        if row.running or row.deaths:
            await self._import(row)
            found = await self._database.query(tables.NOTES, self._arguments)
        self._notes = {message: Note(*values) for message, *values in found}
        worker = self._arguments["worker"]
        self._over = {one for one in self._mine & set(self._notes) if self._is_of(one, worker)}
        self._mine = set(self._over)
        died = [one for one, note in self._notes.items() if note.worker and one not in self._over]
        if not died and not self._over:
            return
        statements, arguments = self.owed()
        await self._database.each(*statements, *([_DIED, _OLD] if died else []), args=arguments)
        self.paid()
        for message in died:
            together, deaths, died_of = self._notes[message]
            deaths += together == 1
            self._notes[message] = Note(together, deaths, None)
            shown = fields(worker=died_of, message_id=message, together=together, deaths=deaths)
            log.warning("worker died while it ran", extra=shown)

    def _is_of(self, message: str, worker: object) -> bool:
        """Whether a note is this worker's, or was when others counted it."""
        return self._notes[message].worker in (None, worker)

    async def _import(self, row: Row) -> None:
        for message in {*row.running, *row.deaths}:
            if message.isascii() and len(message) <= 64:
                deaths = row.deaths.get(message, 0) + (message in row.running)
                noted = {**self._arguments, "message": message, "deaths": deaths}
                await self._database.execute(_IMPORT, noted)
        await self._database.execute(_IMPORTED, self._arguments)

    def ended(self, messages: Sequence[str]) -> None:
        """Note that messages killed no worker: to be written before the turn is given back.

        On a lost connection the notes stay: see `withdraw`.
        """
        self._over |= set(messages) & (self._mine | set(self._notes))

    def owed(self) -> tuple[list[str], Mapping[str, object]]:
        """Return what is to be run before the turn is given back, if anything; its arguments."""
        over = {**self._arguments, "over": tuple(self._over)}
        return ([_FORGET], over) if self._over else ([], self._arguments)

    def paid(self) -> None:
        """Note that those statements were run."""
        self._mine -= self._over
        for message in self._over:
            self._notes.pop(message, None)
        self._over.clear()

    async def withdraw(self) -> None:
        """Take back notes whose turn is lost, unless they were counted already.

        Out of reach of the database they stay, and the next `review` takes them back.
        """
        if not self._mine:
            return
        arguments = {**self._arguments, "noted": tuple(self._mine)}
        try:
            async with asyncio.timeout(WITHDRAW_SECONDS):
                if await self._database.execute(_WITHDRAW, arguments):
                    self._mine.clear()
        except (MySQLError, DatabaseError, TimeoutError):
            return
