"""What workers say of themselves, read back from their rows."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from aioworker.budget.tables import ALIVE_SECONDS
from aioworker.mysql import errors
from aioworker.mysql.errors import ER, MySQLError
from aioworker.reasons import Reason, ReasonKind, State
from aioworker.status.waiting import Waiting

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aioworker.mysql.database import Database

_WORKERS = """SELECT host, pid, version, rate, session, state, {kind}, reason, since, seen,
    TIMESTAMPDIFF(MICROSECOND, seen, SYSDATE(6)) / 1e6, {lanes}
FROM aioworker_worker WHERE task = %s ORDER BY host, pid"""
_KIND, _LANES = 6, -1  # where they stand in an answer
# What later versions added: while the table waits for `init`, those of earlier ones write into it.
_KNOWN = ({"kind": "kind", "lanes": "lanes"}, {"kind": "kind", "lanes": "NULL"})
_FIRST = {"kind": "NULL", "lanes": "NULL"}


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker as its row has it; times are UTC.

    Args:
        host: Its machine.
        pid: Its process.
        version: Of aioworker.
        rate: Its own rate limit; None is none.
        session: Its connection to the database.
        state: `starting`, `running`, `waiting` or `stalled`.
        kind: What for, in a word; `unknown` of a worker of an earlier version, which gives none,
            or of a later one, which may give another.
        reason: The same in words.
        since: Since when.
        seen: When it last said so.
        seen_seconds: How long ago that was.
        waiting: What it knows of the messages that wait; None of a worker of an earlier version.
    """

    host: str
    pid: int
    version: str
    rate: str | None
    session: int
    state: str
    kind: ReasonKind
    reason: str
    since: datetime
    seen: datetime
    seen_seconds: float
    waiting: Waiting | None = None

    @property
    def name(self) -> str:
        """Its name in logs and dead letters."""
        return f"{self.host}:{self.pid}"

    @property
    def alive(self) -> bool:
        """Whether it was seen lately; a worker that runs has no time to say so."""
        return self.seen_seconds < ALIVE_SECONDS

    @property
    def why(self) -> Reason:
        """What for: the kind and the words."""
        return Reason(self.kind, self.reason)

    @property
    def runs(self) -> bool:
        """Whether a start of it is under way."""
        return self.state == State.RUNNING

    @property
    def stalled(self) -> bool:
        """Whether it stands still, so that somebody is needed."""
        return self.state == State.STALLED

    @property
    def fails(self) -> bool:
        """Whether it waits because something went wrong."""
        return self.stalled or (self.state == State.WAITING and not self.kind.steady)


async def workers(database: Database, task: str) -> list[Worker]:
    """Return the workers of a task as their rows have them, those long gone too.

    Raises:
        MySQLError: The rows cannot be read.
    """
    for columns in _KNOWN:
        try:
            return await _read(database, task, columns)
        except MySQLError as error:
            if errors.code(error) != ER.BAD_FIELD_ERROR:
                raise
    return await _read(database, task, _FIRST)


async def _read(database: Database, task: str, columns: Mapping[str, str]) -> list[Worker]:
    rows = await database.query(_WORKERS.format(**columns), (task,))
    return [_worker(list(row)) for row in rows]


def _worker(values: list[Any]) -> Worker:
    values[_KIND] = ReasonKind.of(values[_KIND])
    values[_LANES] = Waiting.read(values[_LANES])
    return Worker(*values)
