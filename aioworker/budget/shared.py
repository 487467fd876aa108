"""The budget: what all workers of a task may start together, and the turn to do so.

It is a row of the protected database, on that database's clock, charged at the moment a
start begins, whether or not the run succeeds. The task's named lock is the turn: who holds
it takes, charges, runs and settles, on the one connection that also writes, so that the
lock outlives no writing statement. The run's first write waits for its moment and stamps the
row too: a process frozen between the charge and its first write would otherwise wake up and
write just before the next start. A start is charged an interval after the last charge, and so
early that its first write, by what runs usually take to it, falls an interval after the last
first write: so neither the length of a run nor the time before its first write slows the rate.

Promised, on the database's clock: charges are never less than an interval apart, over all
workers, through kills, freezes and lost connections; nor are the first writes of two runs
through `Context`. A step of that clock forward, or a replica promoted with a slightly older
row, may give one early start; a step back, or another server, delays by at most one
interval. Not promised: the distance of the later transactions of a run that was frozen or
outlasts the interval, and what a task writes on a connection of its own.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from aioworker.budget import run_time, tables
from aioworker.budget.deaths import CAN_NOTE, NOTE, Deaths
from aioworker.budget.first_write import SERVER_SECONDS, Due, FirstWrite, Habits, server_waits
from aioworker.budget.other_server import OtherServer
from aioworker.budget.tables import Row, holder
from aioworker.clock import Clock
from aioworker.errors import DatabaseError, TurnLostError
from aioworker.limits import (
    POLL_SECONDS,
    InForce,
    Limiter,
    NoLimit,
    RateLimit,
    Wait,
    in_force,
    lead_seconds,
    next_start,
)
from aioworker.logs import Seldom, fields
from aioworker.mysql.errors import MySQLError
from aioworker.mysql.session import idle_seconds
from aioworker.reasons import Reason, ReasonKind

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from datetime import datetime

    from aioworker.mysql.database import Database

log = logging.getLogger(__name__)

SHORTEST_POLL_SECONDS = 0.2
QUEUE_SECONDS = 1  # how long the server lets a contender wait for the turn
TURN_SECONDS = 0.05  # until the next try
LONGEST_JITTER_SECONDS = 1.0
REST_SECONDS = 10  # of a session that holds the turn and only waits, between two uses

_ADOPT = f"""UPDATE aioworker_budget SET last_start = SYSDATE(6), server = {tables.SERVER}
WHERE task = %(task)s AND (last_start > SYSDATE(6) OR server <> {tables.SERVER})"""
_GAP = "INTERVAL COALESCE(gap_us, %(gap)s) MICROSECOND"
_DUE = f"""GREATEST({tables.CHARGED} + {_GAP},
    {tables.WROTE} + {_GAP} - INTERVAL %(usual_us)s MICROSECOND)"""
_UNTIL_DUE = server_waits(f"(SELECT {_DUE} FROM aioworker_budget WHERE task = %(task)s)")
# Assigned from left to right, each by what stands to its left.
_CHARGE = f"""UPDATE aioworker_budget
SET last_write = {tables.WROTE}, last_charge = SYSDATE(6), last_start = last_charge,
    starts = starts + 1, holder = %(worker)s, bulk_next = %(bulk_next)s
WHERE task = %(task)s AND NOT paused AND server = {tables.SERVER}
AND IS_USED_LOCK(%(lock)s) = CONNECTION_ID()
AND last_start <= SYSDATE(6) AND {_DUE} <= SYSDATE(6)"""
# SYSDATE() stands still like NOW() on a server that is started so; the budget needs it to move.
_SYSDATE_MOVES = "SELECT TIMESTAMPDIFF(MICROSECOND, NOW(6), SYSDATE(6)) FROM (SELECT SLEEP(0.02)) s"


class SharedBudget:
    """The budget of all workers, in the task's row.

    Args:
        database: The database that is protected; the turn's lock lives on its connection.
        task: The task's name.
        rate: How often it may start where the row says nothing; None is no limit.
        worker: This worker's name.
        clock: Goes by the database's time; None makes one.
        gather_seconds: How long before a start is due messages are gathered for it, at most.

    Attributes:
        bulk_next: As for `Budget`.
    """

    def __init__(
        self,
        database: Database,
        task: str,
        rate: RateLimit | None,
        worker: str,
        clock: Clock | None = None,
        gather_seconds: float = 0.0,
    ) -> None:
        self.bulk_next = False
        self._gather_seconds = gather_seconds
        self._resting = False
        self._clock = clock or Clock(task)
        self._database = database
        self._own = rate or NoLimit.NONE
        self._task = task
        self._limiter: Limiter | None = None
        self._seldom = Seldom()
        self._other_server = OtherServer()
        self._gap_us: int | None = None
        own = in_force(self._own)
        self._shown = own.rate
        self._due_at = 0.0
        self._habits = Habits()
        self._write_due = Due(0.0, self._clock.now(), 0.0)
        self._checked_session = 0
        self._arguments: dict[str, object] = {"task": task, "worker": worker, "gap": own.gap_us}
        self._deaths = Deaths(database, self._arguments)

    @property
    def limited(self) -> bool:
        """Whether starts are counted at all, as of the last look."""
        return self._gap_us is not None

    @property
    def interval(self) -> float:
        """Seconds between two starts, as of the last look; 0 without a limit."""
        return (self._gap_us or 0) / 1e6

    @property
    def due_at(self) -> float:
        """When the next start is due, by the event loop's clock, as of the last look."""
        return self._due_at

    def now(self) -> datetime:
        """Return the time of day, UTC, by the database's clock as of the last look."""
        return self._clock.now()

    async def check(self, contenders: int = 0) -> Wait | None:
        """Return why no start may begin now; None where one is due within a quarter second.

        Follows the rate of the row, and says when that changed.

        Args:
            contenders: How many other workers wait for the same turn: they come apart by a jitter.

        Raises:
            DatabaseError: The row cannot be read.
        """
        with tables.explaining(self._database):
            row = await self._read()
        return await self._judge(row, contenders)

    async def _judge(self, row: Row, contenders: int = 0) -> Wait | None:
        """Follow the row, and return why no start may begin by it."""
        if row.over:
            with tables.explaining(self._database):
                await run_time.clear_ended(self._database, self._task)
                row = await self._read()
        if self._other_server.see(row) or (row.same_server and row.age_us < 0):
            if self._seldom.allows("adopted"):
                log.warning(
                    "budget adopted: the row is another server's, or the clock was set back",
                    extra=fields(task=self._task, last_start=row.last_start),
                )
            with tables.explaining(self._database):
                await self._database.execute(_ADOPT, self._arguments)
                row = await self._read()
            self._other_server.took_over(row)
        if (force := await self._follow(row)).paused:
            return Wait(Reason(ReasonKind.PAUSED, force.pause), self._poll())
        if self._gap_us is None or self._limiter is None:
            return None
        if (two := self._other_server.reason) is not None:
            return Wait(Reason(ReasonKind.TWO_SERVERS, two), POLL_SECONDS)
        now = asyncio.get_running_loop().time()
        write_in_us = self._gap_us - row.write_age_us
        moment = row.now + timedelta(microseconds=write_in_us)
        self._write_due = Due(now + write_in_us / 1e6, moment, now)
        due_in_us = max(self._gap_us - row.charge_age_us, write_in_us - self._usual_us)
        seconds = max(due_in_us / 1e6, self._limiter.due_in())
        self._due_at = now + seconds
        ahead = seconds - lead_seconds(self._gather_seconds, self.interval)
        if ahead <= 0:
            return None
        reason = next_start(row.now + timedelta(seconds=seconds))
        return Wait(reason, min(ahead + _jitter(contenders, self._gap_us), POLL_SECONDS))

    @property
    def _usual_us(self) -> int:
        """What a run usually takes from its charge to its first write, in microseconds.

        A little more: who comes late to its first write slows the rate, who waits does not.
        """
        usual = self._habits.from_charge.seconds + SERVER_SECONDS
        return int(min(usual, self._database.timeout) * 1e6)

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[Wait | None]:
        """Hold the turn; the value is why not, None where it is held and a start is due.

        Anything that goes wrong inside closes the connection, and the turn with it.

        Raises:
            DatabaseError: The lock cannot be asked for.
        """
        if not self.limited:
            yield None
            return
        patience = QUEUE_SECONDS if self._database.timeout > 2 * QUEUE_SECONDS else 0
        with tables.explaining(self._database):
            began = time.monotonic()
            held, row, notes = await tables.take(self._database, self._task, patience)
            await self._seen(row, time.monotonic() - began)
        if not held:
            with tables.explaining(self._database):
                who = await holder(self._database, self._task, row.turn)
            name = who.name if who else "another worker"
            unowned = who is not None and not who.alive
            kind = ReasonKind.TURN_UNOWNED if unowned else ReasonKind.TURN
            yield Wait(Reason(kind, f"turn: held by {name}"), TURN_SECONDS)
            return
        try:
            with self._database.without_reconnect():
                with tables.explaining(self._database):
                    await self._deaths.review(row, notes)
                self._resting = False
                yield await self._judge(row)
                await self._give_back()
        except BaseException:
            self._database.close()
            raise
        finally:
            self._database.expect(None)
            await self._deaths.withdraw()

    def deaths(self, message: str) -> int:
        """Return how often a worker died while a message ran, as the last turn read it.

        Without a limit there is no turn, and nothing is noted.
        """
        return self._deaths.of(message)

    def together(self, message: str) -> int | None:
        """Return with how many a message may run, since more of them died; None for any number."""
        return self._deaths.together(message)

    async def rest(self, *, resting: bool) -> None:
        """Only wait from now on, in the turn, or do so no longer.

        If this host is lost meanwhile, the server ends the session, and the turn with it, after
        `REST_SECONDS`; it has to be used again before. A run may leave it idle for longer.

        Raises:
            DatabaseError: The connection is lost.
        """
        if resting is self._resting:
            return
        seconds = REST_SECONDS if resting else idle_seconds(self._database.timeout)
        with tables.explaining(self._database):
            await self._database.execute(f"SET SESSION wait_timeout = {seconds}")
        self._resting = resting

    @asynccontextmanager
    async def reading(self, message: str) -> AsyncIterator[None]:
        """Inside, in the turn, a message is read that may kill its worker: it is noted so long.

        Raises:
            DatabaseError: It cannot be noted.
        """
        with tables.explaining(self._database):
            await self._deaths.begin_reading(message)
        try:
            yield
        finally:
            await self._deaths.withdraw()

    async def charge(self, messages: Sequence[str], *, bulk_next: bool = False) -> Wait | None:
        """Begin a start at the moment it is due; return why not, None where it began.

        Only inside the turn. One that is cut off may have been charged: it counts as spent.

        Args:
            messages: What runs, by their keys: noted until `ended`.
            bulk_next: As for `Budget`.

        Raises:
            DatabaseError: The row cannot be written.
        """
        if self._limiter is None or self._gap_us is None:
            self.bulk_next = bulk_next
            return None
        now = asyncio.get_running_loop().time
        seconds = self._due_at - SERVER_SECONDS - now()
        if seconds > 0:
            await asyncio.sleep(seconds)
        sent_at = now()
        with tables.explaining(self._database):
            charging = {
                **self._arguments,
                **self._deaths.note(messages),
                "usual_us": self._usual_us,
                "bulk_next": bulk_next,
            }
            *_waits, charged, _noted = await self._database.each(
                *_UNTIL_DUE, _CHARGE, NOTE, args=charging
            )
        if not charged.matched:
            return await self._refused(messages)
        began_at = max(sent_at, self._due_at)
        await self._limiter.charge(began_at)
        self._database.expect(
            FirstWrite(self._database, self._arguments, self._write_due, self._habits, began_at)
        )
        return None

    async def _refused(self, messages: Sequence[str]) -> Wait:
        """Return why the row let no start begin.

        Raises:
            TurnLostError: Somebody else may hold the turn.
        """
        self._deaths.void(messages)
        with tables.explaining(self._database):
            row = await self._read()
        if row.turn != row.session:
            raise TurnLostError(f"the turn of {self._task} was lost before its start")
        wait = await self._judge(row)
        changed = Reason(ReasonKind.BUDGET, "budget: its row was changed meanwhile")
        return wait or Wait(changed, TURN_SECONDS)

    async def ended(self, messages: Sequence[str]) -> None:
        """Note that messages are settled, or given back, and their worker lives."""
        self._database.expect(None)
        self._deaths.ended(messages)

    async def _give_back(self) -> None:
        """Release the turn, with what is owed to the row; a lost connection has given it back.

        Raises:
            TurnLostError: Somebody else may have held it.
        """
        if not self._database.is_open:
            return
        statements, arguments = self._deaths.owed()
        try:
            await self.rest(resting=False)
            *_forgotten, released = await self._database.each(
                *statements, "SELECT RELEASE_LOCK(%(lock)s)", args=arguments
            )
        except (DatabaseError, MySQLError, TimeoutError):
            self._database.close()  # whoever needs it next says what is wrong
            return
        if released.rows != [(1,)]:
            raise TurnLostError(f"the turn of {self._task} was lost while it ran")
        self._deaths.paid()

    async def _read(self) -> Row:
        """Return the row."""
        began = time.monotonic()
        row = await tables.read(self._database, self._task)
        await self._seen(row, time.monotonic() - began)
        return row

    async def _seen(self, row: Row, took: float) -> None:
        """Go by the row's clock; the first time on a connection, see that this server will do.

        Raises:
            DatabaseError: The clock stands still there in a statement.
        """
        self._clock.set(row.now, took)
        if row.session == self._checked_session:
            return
        self._arguments["lock"] = tables.lock_name(await self._database.schema(), self._task)
        await self._database.each(*CAN_NOTE)
        [[moved]] = await self._database.query(_SYSDATE_MOVES)
        if not moved:
            raise DatabaseError(
                f"{self._database.address.shown} runs with sysdate-is-now, which stops the"
                " budget's clock: start it without, or set AIOWORKER_BUDGET=worker"
            )
        self._checked_session = row.session

    async def _follow(self, row: Row) -> InForce:
        """Take over the row's rate, and return what is in force; log what is new."""
        force = in_force(self._own, row=row)
        self._gap_us = force.gap_us
        if self._gap_us is not None:  # else no charge writes into the row
            self.bulk_next = row.bulk_next
            interval = self._gap_us / 1e6
            if self._limiter is None:
                self._limiter = Limiter(interval)
            elif self._limiter.interval != interval:
                await self._limiter.change(interval)
        limit = "paused" if row.paused else force.rate
        if limit != self._shown:
            by, why = row.set_by, row.set_why
            if "paused" in (limit, self._shown):
                by, why = row.paused_by, row.paused_why
            log.warning(
                "rate limit changed",
                extra=fields(
                    task=self._task,
                    old=self._shown,
                    new=limit,
                    by=by or "unknown",
                    why=why or "not said",
                ),
            )
            self._shown = limit
        return force

    def _poll(self) -> float:
        """Return the seconds after which a change of the row is looked for."""
        if self._gap_us is None:
            return POLL_SECONDS
        return min(POLL_SECONDS, max(self._gap_us / 1e6, SHORTEST_POLL_SECONDS))


def _jitter(contenders: int, gap_us: int) -> float:
    """Return seconds by which contenders come apart: up to a tenth of the interval."""
    return random.uniform(0, min(gap_us / 1e7, LONGEST_JITTER_SECONDS)) if contenders else 0.0
