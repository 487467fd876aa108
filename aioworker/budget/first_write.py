"""A run's first write: it waits until that is due, and the budget's row is told when it came.

First writes are an interval apart, as charges are. A run is charged so early that its first
write is due when it usually gets there; what is left is waited for before a transaction is
opened, the first one where it can be, and the last of it right before the statement that may
write, by the server's clock.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple

from aioworker.budget.history import WROTE
from aioworker.budget.tables import MINE, ROWS
from aioworker.errors import TurnLostError
from aioworker.reasons import Reason, ReasonKind

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from aioworker.mysql.database import Cursor, Database

# An event loop wakes up a millisecond late or more, at `100/s` a tenth of the rate: the server
# waits out the rest, in the packet of the charge and of the first write.
SERVER_SECONDS = 0.005
LONGEST_SERVER_SECONDS = 0.05  # whatever a clock says
# Two clocks may come apart by this part of the time.
APART = 0.001
# Of what something took at most, each time that it takes less: in whatever rhythm slow runs come
# among quick ones, what they are late costs less than a twentieth of the rate.
KEPT = 15 / 16
NOTED = 16  # of a run's transactions, for each of which a habit is kept

# The time first: to find and lock the row takes a tenth of a millisecond.
_NOW = "SET @aioworker_now = SYSDATE(6)"
_STAMP = f"""UPDATE aioworker_budget
SET last_write = @aioworker_now - INTERVAL %(passed_us)s MICROSECOND,
    last_start = GREATEST(last_charge, last_write)
WHERE {ROWS} AND {MINE}"""


def server_waits(moment: str) -> tuple[str, ...]:
    """Return statements in which the server waits until a moment; NULL is now.

    Args:
        moment: An expression of SQL; less than 50 ms ahead, or it is not waited for.
    """
    # A sleep ends a tenth of a millisecond late, the shorter one less; one of less than 10 µs
    # is none.
    return tuple(
        "DO SLEEP(LEAST(GREATEST(COALESCE("
        f"TIMESTAMPDIFF(MICROSECOND, SYSDATE(6), {moment}) + {more_us}, 0) / 1e6, 0),"
        f" {LONGEST_SERVER_SECONDS}))"
        for more_us in (-80, 10)
    )


class Usual:
    """How long something takes at most, lately.

    Attributes:
        seconds: How long; 0 where it has not been seen.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def took(self, seconds: float) -> None:
        """Note how long it took."""
        self.seconds = max(seconds, KEPT * self.seconds)


class Habits:
    """What the runs of a task usually take to come to the first statement that may write.

    Attributes:
        from_charge: Since they were charged.
        from_openings: Since they opened their first transaction, their second one, and so on:
            what comes behind one that only reads is no time to wait in front of it.
    """

    def __init__(self) -> None:
        self.from_charge = Usual()
        self.from_openings = [Usual() for _ in range(NOTED)]


class Due(NamedTuple):
    """When a write is due.

    Args:
        at: By the event loop's clock, a little late at most.
        moment: By the server's, UTC.
        known_at: When that was known, by the event loop's clock.
    """

    at: float
    moment: datetime
    known_at: float


class FirstWrite:
    """Waits for the first write of one run, which was charged just now, and stamps the row.

    Args:
        database: The connection that holds the turn.
        arguments: Of statements about the rows that it was charged to, and how many those are.
        due: When the write is due.
        habits: What such runs usually take.
        charged_at: When it was charged at the earliest, by the event loop's clock.
    """

    def __init__(
        self,
        database: Database,
        arguments: Mapping[str, object],
        due: Due,
        habits: Habits,
        charged_at: float,
    ) -> None:
        self._database = database
        self._arguments = arguments
        self._due = due
        self._habits = habits
        self._clock = asyncio.get_running_loop().time
        self._waited = 0.0
        self._charged_at = charged_at
        self._opened_at: list[float] = []
        self._ready = False
        self._wrote_at = 0.0

    async def before_opening(self) -> None:
        """Wait as long as whoever opens a transaction now would usually write too early."""
        opened = len(self._opened_at)
        if self._ready or opened == NOTED:
            return
        usual = self._habits.from_openings[opened]
        await self._wait_until(self._due.at - usual.seconds)
        self._opened_at.append(self._spent())

    async def before_writing(self) -> tuple[str, ...]:
        """Wait until the write is due; return what has the server wait out the rest."""
        if not self._ready:
            self._note_habits()
        await self._wait_until(self._due.at)
        now = self._clock()
        if now >= self._due.at + APART * (now - self._due.known_at):
            return ()
        return server_waits(f"'{self._due.moment:%Y-%m-%d %H:%M:%S.%f}'")

    def wrote(self) -> None:
        """Note that the first write was now."""
        self._wrote_at = self._clock()

    async def before_commit(self, cursor: Cursor) -> None:
        """Tell the row when it was: as the last statement, which locks it until the commit.

        Raises:
            TurnLostError: Somebody else may hold the turn.
        """
        passed = (self._clock() - self._wrote_at) * (1 - APART)
        stamped = {**self._arguments, "passed_us": int(passed * 1e6)}
        await cursor.execute(f"{_NOW}; {_STAMP}; {WROTE}", stamped)
        await cursor.nextset()
        mine = cursor.rowcount
        await cursor.nextset()
        if mine != self._arguments["rows"]:
            task = self._arguments["task"]
            raise TurnLostError(f"the turn of {task} was lost before its first write")

    def _note_habits(self) -> None:
        self._ready = True
        now = self._spent()
        self._habits.from_charge.took(now - self._charged_at)
        for usual, opened_at in zip(self._habits.from_openings, self._opened_at, strict=False):
            usual.took(now - opened_at)

    def _spent(self) -> float:
        """Return the seconds of a clock that stands still while this waits."""
        return self._clock() - self._waited

    async def _wait_until(self, moment: float) -> None:
        """Wait but for the last milliseconds; nobody's time runs meanwhile."""
        began = self._clock()
        seconds = moment - SERVER_SECONDS - began
        if seconds <= 0:
            return
        words = f"budget: first write at {self._due.moment:%H:%M:%S} UTC"
        with self._database.waiting(seconds, Reason(ReasonKind.FIRST_WRITE, words)):
            await asyncio.sleep(seconds)
        self._waited += self._clock() - began
