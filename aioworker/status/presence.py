"""What a worker does or waits for, told everywhere from one place.

The same words go to the log, to the service manager and into the worker's row of
`aioworker_worker`: RabbitMQ cannot list a worker that asks for each message.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Callable
from importlib.metadata import version

from aioworker.budget import tables
from aioworker.budget.tables import ALIVE_SECONDS
from aioworker.errors import BrokerError, DatabaseError, TurnLostError
from aioworker.logs import Seldom, fields
from aioworker.mysql import errors
from aioworker.mysql.database import OWN_SECONDS, Database
from aioworker.mysql.errors import ErrorKind, MySQLError
from aioworker.reasons import Reason, ReasonKind, State
from aioworker.status.waiting import Waiting

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 30.0
SOON_SECONDS = 1.0  # a new reason for the same state is written no more often than this
KEPT_SECONDS = 3600  # and its row goes
LEAVE_SECONDS = 2.0  # an end does not wait longer for its row to go
REASON_LENGTH = 500
HOST_LENGTH = 100

_UPDATE = """UPDATE aioworker_worker
SET since = IF(state = %(state)s AND reason = %(reason)s, since, SYSDATE(6)), state = %(state)s,
    kind = %(kind)s, reason = %(reason)s, seen = SYSDATE(6) + INTERVAL %(ahead)s SECOND,
    session = CONNECTION_ID(), lanes = %(lanes)s
WHERE id = %(id)s"""
_INSERT = """INSERT INTO aioworker_worker
(id, host, pid, task, version, rate, shares, session, state, kind, reason, since, seen, lanes)
VALUES (%(id)s, %(host)s, %(pid)s, %(task)s, %(version)s, %(rate)s, %(shares)s, CONNECTION_ID(),
    %(state)s, %(kind)s, %(reason)s, SYSDATE(6), SYSDATE(6), %(lanes)s)"""
_OTHERS = f"""SELECT rate FROM aioworker_worker WHERE task = %(task)s AND id <> %(id)s
AND seen > SYSDATE(6) - INTERVAL {ALIVE_SECONDS} SECOND"""
_SWEEP = f"DELETE FROM aioworker_worker WHERE seen < SYSDATE(6) - INTERVAL {KEPT_SECONDS} SECOND"
_LEAVE = "DELETE FROM aioworker_worker WHERE id = %(id)s"


class Presence:
    """What one worker does, for one task.

    Args:
        task: The task's name.
        host: This machine's name.
        pid: This process's id.
        rate: The worker's own rate limit, as text; None is no limit.
        notify: Called with the words whenever they change.
        database: Where the worker's row is kept; None keeps none.
        run_seconds: How long a run may take.
        shares: The budget that the task shares with others, by its name; None for none.

    Attributes:
        others: How many other workers of the task were alive at the last heartbeat.
        waiting: Returns what is known of the messages that wait, for the row.
    """

    def __init__(  # noqa: PLR0913 - what its row says, built at one place
        self,
        task: str,
        host: str,
        pid: int,
        rate: str | None,
        notify: Callable[[str], None],
        database: Database | None,
        run_seconds: float = 0.0,
        shares: str | None = None,
    ) -> None:
        self.others = 0
        self.waiting: Callable[[], Waiting] = Waiting
        self._task = task
        self._notify = notify
        self._database = database
        self._run_seconds = max(run_seconds - ALIVE_SECONDS / 2, 0.0)
        self._reason = Reason(ReasonKind.STARTING, "")
        self._written: Reason | None = None  # what the row says
        self._written_at = float("-inf")
        self._looked_at = float("-inf")
        self._refused_at = float("-inf")
        self._rates: set[str | None] = {rate}
        self._routine = False
        self._seldom = Seldom()
        self._owed: int | None = None  # the level of a line that may be said later
        self._arguments: dict[str, object] = {
            "id": secrets.token_hex(6),
            "host": host[:HOST_LENGTH],
            "pid": pid,
            "task": task,
            "rate": rate,
            "shares": shares,
            "version": version("aioworker"),
        }

    def report(self, reason: Reason) -> None:
        """Say and log what the worker does, once for each change.

        A warning or an error whose words were logged within a minute is logged when that has
        passed, if it still holds; numbers in them, such as times, make no other words.

        Args:
            reason: Why it waits, or what runs.
        """
        kind, state = reason.kind, reason.kind.state
        if reason != self._reason:
            self._reason, self._owed = reason, kind.level
            self._notify(f"{state}: {reason}")
            if state is State.WAITING:
                # Each start has its own moment: one line for the first of such waits is enough.
                self._owed = logging.DEBUG if kind.routine and self._routine else kind.level
                self._routine = kind.routine
        if self._owed is not None and self._may_be_said(self._owed, f"{state}: {reason}"):
            said = fields(task=self._task, kind=kind, reason=reason.words)
            log.log(self._owed, state, extra=said)
            self._owed = None

    def _may_be_said(self, level: int, words: str) -> bool:
        return level < logging.WARNING or self._seldom.allows(re.sub(r"\d+", "#", words))

    async def keep(self) -> None:
        """Write the row: a new state at once, a new reason within a second, or a heartbeat.

        Where runs and waits that are well take turns, that is no new state: one that lasts
        for less than a second helps nobody. A run that may outlast what counts as alive is.

        A row that may not be written is said; the work goes on, and is not held up by the next
        try before the next heartbeat.

        Raises:
            DatabaseError: The server is away, or the table needs `init`.
        """
        if self._database is None:
            return
        now, written = self._reason, self._written
        due = HEARTBEAT_SECONDS if now == written else SOON_SECONDS
        same = written is not None and now.kind.state is written.kind.state
        known = same or (written is not None and _is_well(now) and _is_well(written))
        outlasts = now.kind is ReasonKind.RUNNING and not same and self._run_seconds > 0
        if known and not outlasts and time.monotonic() - self._written_at < due:
            return
        if time.monotonic() - self._refused_at < HEARTBEAT_SECONDS:
            return
        try:
            with tables.explaining(self._database):
                async with asyncio.timeout(OWN_SECONDS):
                    await self._write(self._database)
        except DatabaseError as error:
            if error.unreachable or tables.needs_init(error):
                raise
            self._refused_at = time.monotonic()
            self._tell_unwritten(error)

    @property
    def keeps_row(self) -> bool:
        """Whether it has a row in the database."""
        return self._database is not None

    async def prove(self, database: Database) -> None:
        """Write the row, to see that the database takes writes; without one, that it answers.

        Args:
            database: The connection to write by; the worker's own, or another one.

        Raises:
            MySQLError: It takes none.
            DatabaseError: It is away.
            TimeoutError: It does not answer.
        """
        if self._database is not None:
            try:
                await self._write(database)
            except MySQLError as error:
                if errors.kind(error) is not ErrorKind.EVERY_MESSAGE:
                    raise
                if errors.code(error) not in tables.NEED_INIT:
                    self._tell_unwritten(database.explain(error))
            else:
                if database is not self._database:
                    self._written = None  # it names a session that ends now
                return
        await database.ready()

    async def keep_if_possible(self) -> None:
        """Write the row if the database lets it: another wait goes on meanwhile."""
        try:
            await self.keep()
        except DatabaseError as error:
            self._tell_unwritten(error)

    def _tell_unwritten(self, error: DatabaseError) -> None:
        words = "worker's row not written"
        if self._may_be_said(logging.WARNING, words):
            log.warning(words, extra=fields(task=self._task, reason=str(error)))

    async def _write(self, database: Database) -> None:
        reason = self._reason
        arguments = {
            **self._arguments,
            "state": reason.kind.state,
            "kind": reason.kind,
            "reason": reason.words[:REASON_LENGTH],
            "lanes": str(self.waiting()),
            # A run may outlast what counts as alive, and nothing is written meanwhile.
            "ahead": self._run_seconds if reason.kind is ReasonKind.RUNNING else 0,
        }
        if not await database.execute(_UPDATE, arguments):
            await database.execute(_INSERT, arguments)
        self._written, self._written_at = reason, time.monotonic()
        if self._written_at - self._looked_at >= HEARTBEAT_SECONDS:
            self._looked_at = self._written_at
            await self._look_around(database)

    async def leave(self) -> None:
        """Take the row away: this worker ends.

        Raises:
            DatabaseError: It cannot be; it goes with the old ones.
        """
        if self._database is not None and self._written_at > 0:
            with tables.explaining(self._database):
                async with asyncio.timeout(LEAVE_SECONDS):
                    await self._database.execute(_LEAVE, self._arguments)

    async def _look_around(self, database: Database) -> None:
        """Count the other workers, and say when their rates differ; drop old rows."""
        found = await database.query(_OTHERS, self._arguments)
        self.others = len(found)
        rates = {self._arguments["rate"], *(row[0] for row in found)}
        if rates != self._rates and len(rates) > 1:
            words = ", ".join(sorted(str(rate or "none") for rate in rates))
            log.warning(
                "workers differ in their own rate limit",
                extra=fields(task=self._task, rates=words),
            )
        self._rates = rates
        await database.execute(_SWEEP)


def _is_well(reason: Reason) -> bool:
    """Whether a worker runs, or waits as it does before each start."""
    return reason.kind is ReasonKind.RUNNING or reason.kind.routine


def kind_of(error: BrokerError | DatabaseError) -> ReasonKind:
    """Return the kind of reason that an error of a server is, or what else ended the work."""
    if isinstance(error, BrokerError):
        return ReasonKind.BROKER_UNREACHABLE if error.unreachable else ReasonKind.BROKER_REFUSES
    if isinstance(error, TurnLostError):
        return ReasonKind.TURN_LOST
    if error.unreachable:
        return ReasonKind.DATABASE_UNREACHABLE
    cause = error.__cause__
    if cause is not None and errors.kind(cause) is ErrorKind.CONTENTION:
        return ReasonKind.CONTENTION
    return ReasonKind.DATABASE_REFUSES
