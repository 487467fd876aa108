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
    from collections.abc import Sequence
    from typing import Any

    from aioworker.budget.tables import Row
    from aioworker.mysql.database import Database

log = logging.getLogger(__name__)

MOST_DEATHS = 5  # of its workers while it ran alone: then a message is a dead letter
KEPT_DAYS = 7  # of a message that never came back: somebody took it away
WITHDRAW_SECONDS = 2.0
KEY_LENGTH = 64

_MINE = "IS_USED_LOCK(%(lock)s) = CONNECTION_ID()"  # nobody else writes while the turn is held
_NOTE = """INSERT INTO aioworker_run (task, message, together, worker, since)
SELECT %(task)s, message, %(together)s, %(worker)s, SYSDATE(6)
FROM JSON_TABLE(%(messages)s, '$[*]' COLUMNS (message VARCHAR(64) PATH '$')) AS noted
WHERE {}
ON DUPLICATE KEY UPDATE together = %(together)s, worker = %(worker)s, since = SYSDATE(6)"""
# Behind the charge, in its transaction: only if that has let them run.
NOTE = _NOTE.format("@aioworker_charged")
_NOTE_NOW = _NOTE.format(_MINE)
_DIED = f"""UPDATE aioworker_run
SET deaths = deaths + (together = 1), most = GREATEST(together DIV 2, 1), worker = NULL
WHERE task = %(task)s AND worker IS NOT NULL AND {_MINE}"""
_OLD = f"""DELETE FROM aioworker_run
WHERE task = %(task)s AND since < SYSDATE(6) - INTERVAL {KEPT_DAYS} DAY AND {_MINE}"""
_FORGET = f"""DELETE FROM aioworker_run
WHERE task = %(task)s AND message IN %(over)s AND {_MINE}"""
# What stays of a message is what its worker's deaths have told.
_WITHDRAW = (
    """UPDATE aioworker_run SET worker = NULL
WHERE task = %(task)s AND worker = %(worker)s AND message IN %(noted)s""",
    """DELETE FROM aioworker_run
WHERE task = %(task)s AND worker IS NULL AND most IS NULL AND message IN %(noted)s""",
)
_LIVES = f"""UPDATE aioworker_run SET deaths = deaths - 1
WHERE task = %(task)s AND together = 1 AND deaths > 0 AND message IN %(counted)s AND {_MINE}"""
# What a worker of an earlier version noted, in the budget's row.
_IMPORT = """INSERT INTO aioworker_run (task, message, together, most, deaths, since)
VALUES (%(task)s, %(message)s, 1, 1, %(deaths)s, SYSDATE(6))
ON DUPLICATE KEY UPDATE together = 1, most = 1, deaths = deaths + %(deaths)s"""
_IMPORTED = "UPDATE aioworker_budget SET running = NULL, deaths = NULL WHERE task = %(task)s"
# On no row: that each privilege is there is seen before a start is charged, and not behind it.
CAN_NOTE = (
    "INSERT INTO aioworker_run (task, message, together, since)"
    " SELECT task, message, together, since FROM aioworker_run WHERE FALSE",
    "UPDATE aioworker_run SET worker = NULL WHERE FALSE",
    "DELETE FROM aioworker_run WHERE FALSE",
)


class Note(NamedTuple):
    """A message's note.

    Args:
        together: How many messages run, or ran last, itself among them.
        most: With how many it may run, since a worker died; None for any number.
        deaths: How often its worker died while it ran alone.
        worker: Whose run it is that is on; None if there is none, or that worker has died.
    """

    together: int
    most: int | None
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
        # What this worker noted and has not taken back, and how many deaths it had then.
        self._mine: dict[str, int] = {}
        self._over: set[str] = set()  # what has ended, and is noted still

    def of(self, message: str) -> int:
        """Return how often a worker died while this message ran, as of the last `review`."""
        return self._notes[message].deaths if message in self._notes else 0

    def together(self, message: str) -> int | None:
        """Return with how many it may run, since a worker died; None for any number."""
        return self._notes[message].most if message in self._notes else None

    def note(self, messages: Sequence[str]) -> dict[str, object]:
        """Return the arguments of `NOTE` for a charge that lets messages run."""
        self._mine |= {message: self.of(message) for message in messages}
        return {"messages": json.dumps(list(messages)), "together": len(messages)}

    def void(self, messages: Sequence[str]) -> None:
        """Forget notes that were not written: their start was not charged."""
        for message in messages:
            self._mine.pop(message, None)

    async def begin_reading(self, message: str) -> None:
        """Note a message that is read before it runs, until `withdraw`; only in one's turn."""
        noting = {**self._arguments, **self.note([message])}
        await self._database.each(_NOTE_NOW, args=noting)

    async def review(self, row: Row, found: Sequence[tuple[Any, ...]]) -> None:
        """Count what ran when its worker died; only in one's turn.

        This worker lives: what others counted of it, while it was cut off from the database, is
        taken back.

        Args:
            row: The budget's row.
            found: The answer to `tables.NOTES`.
        """
        if row.running or row.deaths:
            await self._import(row)
            found = await self._database.query(tables.NOTES, self._arguments)
        self._notes = {message: Note(*values) for message, *values in found}
        worker = self._arguments["worker"]
        mine = {one for one in self._mine if one in self._notes}
        mine = {one for one in mine if self._notes[one].worker in (None, worker)}
        self._over &= mine
        noted = {one for one in mine - self._over if self._notes[one].worker}
        # A note that never arrived was counted by nobody.
        counted = {
            one for one in mine - self._over - noted if self._notes[one].deaths > self._mine[one]
        }
        died = [one for one, note in self._notes.items() if note.worker and one not in mine]
        await self._write(noted, counted, died)
        self._mine.clear()
        for message in died:
            note = self._notes[message]
            deaths = note.deaths + (note.together == 1)
            shown = {"worker": note.worker, "message_id": message, "together": note.together}
            log.warning("worker died while it ran", extra=fields(**shown, deaths=deaths))
            most = max(note.together // 2, 1)
            self._notes[message] = note._replace(most=most, deaths=deaths, worker=None)
        for message in counted:
            note = self._notes[message]
            self._notes[message] = note._replace(deaths=max(note.deaths - 1, 0))
        self.paid()

    async def _write(self, noted: set[str], counted: set[str], died: Sequence[str]) -> None:
        """Write what a review has found: own notes, own ones that others counted, deaths."""
        statements, arguments = self.owed()
        statements += [*(_WITHDRAW if noted else ()), *((_LIVES,) if counted else ())]
        statements += [_DIED, _OLD] if died else []
        if statements:
            given = {**arguments, "noted": tuple(noted), "counted": tuple(counted)}
            await self._database.each(*statements, args=given)

    async def _import(self, row: Row) -> None:
        async with self._database.transaction() as cursor:
            for message in {*row.running, *row.deaths}:
                if message.isascii() and len(message) <= KEY_LENGTH:
                    deaths = row.deaths.get(message, 0) + (message in row.running)
                    deaths = min(max(deaths, 0), MOST_DEATHS)
                    noted = {**self._arguments, "message": message, "deaths": deaths}
                    await cursor.execute(_IMPORT, noted)
            await cursor.execute(_IMPORTED, self._arguments)

    def ended(self, messages: Sequence[str]) -> None:
        """Note that messages killed no worker: to be written before the turn is given back.

        On a lost connection the notes stay: see `withdraw`.
        """
        self._over |= set(messages) & (self._mine.keys() | self._notes.keys())

    def owed(self) -> tuple[list[str], dict[str, object]]:
        """Return what is to be run before the turn is given back, if anything; its arguments."""
        over = {**self._arguments, "over": tuple(self._over)}
        return ([_FORGET], over) if self._over else ([], over)

    def paid(self) -> None:
        """Note that those statements were run."""
        for message in self._over:
            self._mine.pop(message, None)
            self._notes.pop(message, None)
        self._over.clear()

    async def withdraw(self) -> None:
        """Take back notes whose run is over, or whose turn is lost; what was counted stays.

        Out of reach of the database they stay, and the next `review` takes them back.
        """
        if not self._mine:
            return
        arguments = {**self._arguments, "noted": tuple(self._mine)}
        try:
            async with asyncio.timeout(WITHDRAW_SECONDS):
                back, *_rest = await self._database.each(*_WITHDRAW, args=arguments)
                if back.matched == len(self._mine):  # else others have counted some
                    self._mine.clear()
        except (MySQLError, DatabaseError, TimeoutError):
            return
