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
import math
import random
import time
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

from aioworker.budget import history, run_time, tables
from aioworker.budget.deaths import CAN_NOTE, NOTE, Deaths
from aioworker.budget.first_write import SERVER_SECONDS, Due, FirstWrite, Habits, server_waits
from aioworker.budget.order import FRESH_SECONDS, Order, place_seconds
from aioworker.budget.pace import Pace, budget_key
from aioworker.budget.tables import Found, Row, holder
from aioworker.clock import Clock
from aioworker.errors import DatabaseError, TurnLostError
from aioworker.limits import (
    LEAD_SECONDS,
    POLL_SECONDS,
    End,
    RateLimit,
    Wait,
    lead_seconds,
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
LOOK_SECONDS = 1.0  # after which a run looks for a pause before its next transaction
REST_SECONDS = 10  # of a session that holds the turn and only waits, between two uses

_ADOPT = f"""UPDATE aioworker_budget SET last_start = SYSDATE(6), server = {tables.SERVER}
WHERE {tables.ROWS} AND (last_start > SYSDATE(6) OR server <> {tables.SERVER})"""
# The task's own row may have no limit, where that of the budget that it shares has one.
_GAP_US = f"""LEAST(COALESCE({tables.GAP_US}, IF({tables.IS_SHARED}, %(shared_gap)s, %(gap)s), 0),
    {tables.LONGEST_GAP_US})"""
_GAP = f"INTERVAL {_GAP_US} MICROSECOND"
_DUE = f"""GREATEST({tables.CHARGED} + {_GAP},
    {tables.WROTE} + {_GAP} - INTERVAL %(usual_us)s MICROSECOND)"""
_UNTIL_DUE = server_waits(f"(SELECT MAX({_DUE}) FROM aioworker_budget WHERE {tables.ROWS})")
# Whether all rows let a start begin, and when; they are locked as they are read, in the order of
# their keys. An interval that is longer than the one last seen has another first write due. If the
# turn does not include the budget that the task shares, that one still has to have no limit.
_MAY = f"""SET @aioworker_charged = NOT EXISTS (SELECT 1 FROM aioworker_budget
    WHERE task = %(beside)s AND (paused OR COALESCE({tables.GAP_US}, %(shared_gap)s, 0) > 0))
AND %(rows)s = (SELECT COUNT(*) FROM aioworker_budget
WHERE {tables.ROWS} AND NOT paused AND server = {tables.SERVER} AND {tables.MINE}
AND ({tables.IS_SHARED} OR shares <=> %(shares)s)
AND {_GAP_US} <= IF({tables.IS_SHARED}, %(shared_seen)s, %(seen)s)
AND last_start <= SYSDATE(6) AND {_DUE} <= SYSDATE(6) FOR UPDATE),
@aioworker_now = SYSDATE(6)"""
# Assigned from left to right, each by what stands to its left.
_CHARGE = f"""UPDATE aioworker_budget
SET last_write = {tables.WROTE}, last_charge = @aioworker_now, last_start = last_charge,
    starts = starts + 1, holder = %(worker)s, bulk_next = %(bulk_next)s,
    urgent_starts = IF(%(bulk_next)s, urgent_starts + 1, 0)
WHERE {tables.ROWS} AND @aioworker_charged"""
# In one packet and one transaction; without a charge nothing else is noted.
_CHARGING = ("START TRANSACTION", _MAY, _CHARGE, NOTE, history.CHARGED, "COMMIT")
# On no row, as what else is noted: a privilege that is lacking is seen with no message in hand.
_CAN_CHARGE = "UPDATE aioworker_budget SET starts = starts WHERE FALSE"
_CHANGED = Reason(ReasonKind.BUDGET, "budget: its row was changed meanwhile")
# SYSDATE() stands still like NOW() on a server that is started so; the budget needs it to move.
_SYSDATE_MOVES = "SELECT TIMESTAMPDIFF(MICROSECOND, NOW(6), SYSDATE(6)) FROM (SELECT SLEEP(0.02)) s"


class Shared(NamedTuple):
    """A budget that several tasks share, beside their own limits.

    Args:
        name: Its name.
        rate: How often all of them together may start, where its row says nothing; None is no
            limit.
    """

    name: str
    rate: RateLimit | None


class SharedBudget:
    """The budget of all workers, in the task's row, and in that of a budget that it shares.

    Args:
        database: The database that is protected; the turn's locks live on its connection.
        task: The task's name.
        rate: How often it may start where the row says nothing; None is no limit.
        worker: This worker's name.
        clock: Goes by the database's time; None makes one.
        gather_seconds: How long before a start is due messages are gathered for it, at most.
        shared: What it shares with other tasks; None for nothing.

    Attributes:
        bulk_next: As for `TaskBudget`.
    """

    def __init__(
        self,
        database: Database,
        task: str,
        rate: RateLimit | None,
        worker: str,
        clock: Clock | None = None,
        gather_seconds: float = 0.0,
        shared: Shared | None = None,
    ) -> None:
        self.bulk_next = False
        self._gather_seconds = gather_seconds
        self._resting = False
        self._clock = clock or Clock(task)
        self._database = database
        self._task = task
        self._shares = None if shared is None else shared.name
        self._own = Pace(task, rate)
        self._shared = None if shared is None else Pace(budget_key(shared.name), shared.rate)
        self._paces = [self._own, *([] if self._shared is None else [self._shared])]
        self._keys = tables.Keys(*(pace.key for pace in self._paces))
        self._seldom = Seldom()
        self._due_at = 0.0
        self._habits = Habits()
        self._write_due = Due(0.0, self._clock.now(), 0.0)
        self._checked_session = 0
        self._arguments: dict[str, object] = {
            "task": task,
            "shares": self._shares,
            "worker": worker,
            "gap": self._own.own.gap_us,
            "shared_gap": None if self._shared is None else self._shared.own.gap_us,
        }
        self._deaths = Deaths(database, self._arguments)
        self._order = Order.of([], 0)
        self._waits_for_own = False
        self._keys_held: tables.Keys | None = None  # of the turn
        self._wanted = (False, False)  # as the row says it
        self._wanted_at = -math.inf
        self._started = False  # in the turn that is held
        self._end: End | None = None  # of that start, which is not noted yet
        self._charges = 0
        self._looked_at = -math.inf  # when the rows were read, or charged, by the monotonic clock

    @property
    def limited(self) -> bool:
        """Whether starts are counted at all, as of the last look."""
        return any(pace.gap_us is not None for pace in self._paces)

    @property
    def interval(self) -> float:
        """Seconds between two starts, as of the last look; 0 without a limit."""
        return max(pace.interval for pace in self._paces)

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
            found = await self._read()
        return await self._judge(found, contenders)

    async def _judge(self, found: Found, contenders: int = 0) -> Wait | None:
        """Follow the rows, and return why no start may begin by them."""
        found = await self._settled(found)
        rows = found.rows
        for pace, row in zip(self._paces, rows, strict=True):
            await pace.follow(row)
        if (other := await self._share(rows[0])) is not None:
            return other
        for pace in self._paces:
            if pace.force.paused:
                return Wait(pace.paused(pace.force.pause), self._poll())
        if not self.limited:
            return None  # no charge writes into a row
        if self._keys_held is not None and (self._keys_held.number > 1) is not self.shares:
            return Wait(_CHANGED, TURN_SECONDS)  # it is not the turn that a start needs now
        self._order = Order.of(found.wants, rows[-1].urgent_starts)
        self.bulk_next = self._order.bulk if self.shares else rows[0].bulk_next
        for pace in self._paces:
            if (two := pace.other_server.reason) is not None:
                return Wait(Reason(ReasonKind.TWO_SERVERS, two), POLL_SECONDS)
        return self._until_due(rows, contenders)

    async def _share(self, row: Row) -> Wait | None:
        """Go by what this code shares; return the wait for a worker by whose code it is another.

        A worker by whose code it was another cannot charge a start any more.
        """
        if row.shares == self._shares:
            return None
        with tables.explaining(self._database):
            why = await tables.who_shares(self._database, row)
            if why is not None:
                return Wait(Reason(ReasonKind.OTHER_BUDGET, why), POLL_SECONDS)
            await tables.share(self._database, row, self._shares)
        return None

    def _until_due(self, rows: Sequence[Row], contenders: int) -> Wait | None:
        """Return the wait until the turn is to be taken, None where it is."""
        looks = [
            pace.look(row, self._usual_us) for pace, row in zip(self._paces, rows, strict=True)
        ]
        now, moment = asyncio.get_running_loop().time(), rows[0].now
        # By the moment at which each row was read: a busy server takes its time between them.
        writes_at = max(
            row.now + timedelta(microseconds=look.write_in_us)
            for look, row in zip(looks, rows, strict=True)
        )
        write_in_us = max(look.write_in_us for look in looks)
        self._write_due = Due(now + write_in_us / 1e6, writes_at, now)
        seconds = [look.seconds for look in looks]
        self._due_at = now + max(*seconds, 0.0)
        # The turn that tasks share is taken by its own interval, and only for a task whose own
        # limit is due by then: one that waits for that blocks nobody.
        place = max(n for n, pace in enumerate(self._paces) if pace.gap_us is not None)
        pace, due = self._paces[place], seconds[place]
        # Who has the turn keeps it, whatever comes into other lanes.
        shares = self.shares and self._keys_held is None
        before = self._order.before(self._task) if shares else []
        ahead = due - lead_seconds(self._gather_seconds, pace.interval)
        if before:  # they might gather for a shorter time
            ahead = due - LEAD_SECONDS + place_seconds(pace.interval) * len(before)
        self._waits_for_own = seconds[0] > max(due, LEAD_SECONDS)
        if self._waits_for_own:
            pace, before, ahead = self._own, [], seconds[0] - LEAD_SECONDS
        if ahead <= 0:
            return None
        reason = pace.reason(moment, max(*seconds, 0.0))
        if before:
            reason = reason._replace(words=f"{reason}, of {before[0]} first")
        jitter = _jitter(contenders, pace.gap_us or 0)
        return Wait(reason, min(ahead + jitter, POLL_SECONDS))

    @property
    def shares(self) -> bool:
        """Whether other tasks share it, so that what waits in the lanes decides who is next."""
        return self._shared is not None and self._shared.gap_us is not None

    async def want(self, *, urgent: bool, bulk: bool) -> None:
        """Say what waits in the task's lanes, where that decides which task starts next.

        A task that waits for its own limit wants nothing yet.

        Raises:
            DatabaseError: The row cannot be written.
        """
        if not self.shares:
            return
        said = (urgent and not self._waits_for_own, bulk and not self._waits_for_own)
        now = time.monotonic()
        fresh = now - self._wanted_at < FRESH_SECONDS / 2 or not any(said)
        if said == self._wanted and fresh:
            return
        with tables.explaining(self._database):
            await tables.want(self._database, self._task, urgent=said[0], bulk=said[1])
        self._wanted, self._wanted_at = said, now

    async def _settled(self, found: Found) -> Found:
        """Return the rows, once what is over is cleared, and what another server wrote is ours."""
        if any(row.over for row in found.rows):
            with tables.explaining(self._database):
                for pace in self._paces:
                    await run_time.clear_ended(self._database, pace.key)
                found = await self._read()
        pairs = list(zip(self._paces, found.rows, strict=True))
        theirs = [
            pace
            for pace, row in pairs
            if pace.other_server.see(row) or (row.same_server and row.age_us < 0)
        ]
        if not theirs:
            return found
        if self._seldom.allows("adopted"):
            log.warning(
                "budget adopted: the row is another server's, or the clock was set back",
                extra=fields(task=self._task, last_start=found.rows[0].last_start),
            )
        with tables.explaining(self._database):
            await self._database.execute(_ADOPT, self._keys._asdict())
            found = await self._read()
        for pace, row in zip(self._paces, found.rows, strict=True):
            if pace in theirs:
                pace.other_server.took_over(row)
        return found

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
        # A budget that has no limit is nobody's to wait for.
        keys = self._keys if self.shares else tables.Keys(self._task)
        found = await self._take(keys)
        if found.held < keys.number:
            yield await self._taken(self._paces[found.held], found.rows[found.held])
            return
        try:
            with self._database.without_reconnect():
                with tables.explaining(self._database):
                    await self._deaths.review(found.rows[0], found.notes)
                self._resting, self._keys_held = False, keys
                yield await self._judge(found)
                await self._give_back()
        except BaseException:
            self._database.close()
            raise
        finally:
            self._keys_held, self._started, self._end = None, False, None
            self._database.expect(None)
            await self._deaths.withdraw()

    async def _take(self, keys: tables.Keys) -> Found:
        """Ask for the turn, and read the rows; an error gives back what could be had of it."""
        patience = QUEUE_SECONDS if self._database.timeout > 4 * QUEUE_SECONDS else 0
        try:
            with tables.explaining(self._database):
                began = time.monotonic()
                found = await tables.take(self._database, self._keys, patience, both=self.shares)
                await self._seen(found.rows[0], time.monotonic() - began)
                self._arguments |= tables.arguments(await self._database.schema(), keys)
        except BaseException:
            self._database.close()
            raise
        return found

    async def _taken(self, pace: Pace, row: Row) -> Wait:
        """Return the wait for a turn that somebody else holds."""
        with tables.explaining(self._database):
            who = await holder(self._database, row.turn)
        name = who.name if who else "another worker"
        unowned = who is not None and not who.alive
        kind = ReasonKind.TURN_UNOWNED if unowned else ReasonKind.TURN
        return Wait(Reason(kind, f"{pace.words}turn: held by {name}"), TURN_SECONDS)

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

    async def charge(
        self, messages: Sequence[str], *, ids: int | None = None, bulk_next: bool = False
    ) -> Wait | None:
        """Begin a start at the moment it is due; return why not, None where it began.

        Only inside the turn. One that is cut off may have been charged: it counts as spent.

        Args:
            messages: What runs, by their keys: noted until `ended`.
            ids: As for `TaskBudget`.
            bulk_next: As for `TaskBudget`.

        Raises:
            DatabaseError: The row cannot be written.
        """
        if not self.limited:
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
                "seen": self._own.gap_us or 0,
                "shared_seen": (self._shared and self._shared.gap_us) or 0,
                "beside": None if self._keys_held == self._keys else self._keys.shared,
                "bulk_next": bulk_next,
                "ids": ids,
            }
            answers = await self._database.each(*_UNTIL_DUE, *_CHARGING, args=charging)
        if not answers[len(_UNTIL_DUE) + _CHARGING.index(_CHARGE)].matched:
            return await self._refused(messages)
        self._charges += 1
        self._started = True
        self._looked_at = time.monotonic()
        began_at = max(sent_at, self._due_at)
        for pace in self._paces:
            if pace.gap_us is not None and pace.limiter is not None:
                await pace.limiter.charge(began_at)
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
            found = await self._read()
        number = 1 if self._keys_held is None else self._keys_held.number
        if any(row.turn != row.session for row in found.rows[:number]):
            raise TurnLostError(f"the turn of {self._task} was lost before its start")
        return await self._judge(found) or Wait(_CHANGED, TURN_SECONDS)

    async def stops_run(self) -> Reason | None:
        """Return why the run that is on may begin no further transaction: a pause.

        The rows are read if that was not done for `LOOK_SECONDS`.

        Raises:
            DatabaseError: They cannot be read.
        """
        if time.monotonic() - self._looked_at < LOOK_SECONDS:
            return None
        with tables.explaining(self._database):
            found = await self._read()
        for pace, row in zip(self._paces, found.rows, strict=True):
            if row.paused:
                return pace.paused(row.pause)
        return None

    async def ended(self, messages: Sequence[str], end: End | None = None) -> None:
        """Note that messages are settled, or given back, and their worker lives."""
        self._database.expect(None)
        self._deaths.ended(messages)
        if self._started:
            self._end = end or self._end

    async def _give_back(self) -> None:
        """Release the turn, with what is owed to the row; a lost connection has given it back.

        Raises:
            TurnLostError: Somebody else may have held it.
        """
        if not self._database.is_open:
            return
        statements, arguments = self._owed()
        try:
            await self.rest(resting=False)
            *_owed, released = await self._database.each(
                *statements, tables.RELEASE, args=arguments
            )
        except (DatabaseError, MySQLError, TimeoutError):
            self._database.close()  # whoever needs it next says what is wrong
            return
        if released.rows != [(self._arguments["rows"],)]:
            raise TurnLostError(f"the turn of {self._task} was lost while it ran")
        self._deaths.paid()

    def _owed(self) -> tuple[list[str], dict[str, object]]:
        """Return what is to be run before the turn is given back, and its arguments."""
        statements, arguments = self._deaths.owed()
        if self._end is not None:
            statements.append(history.ENDED)
            arguments |= self._end._asdict()
            if self._charges % history.CLEAN_EVERY == 1:
                statements += history.CLEAN
        if len(statements) > 1:
            statements = ["START TRANSACTION", *statements, "COMMIT"]
        return statements, arguments

    async def _read(self) -> Found:
        """Return what the rows say."""
        began = time.monotonic()
        found = await tables.read_all(self._database, self._keys)
        await self._seen(found.rows[0], time.monotonic() - began)
        return found

    async def _seen(self, row: Row, took: float) -> None:
        """Go by the row's clock; the first time on a connection, see that this server will do.

        Raises:
            DatabaseError: The clock stands still there in a statement.
        """
        self._clock.set(row.now, took)
        self._looked_at = time.monotonic()
        if row.session == self._checked_session:
            return
        self._arguments |= tables.arguments(await self._database.schema(), self._keys)
        await self._database.each(_CAN_CHARGE, *CAN_NOTE, *history.CAN_NOTE)
        [[moved]] = await self._database.query(_SYSDATE_MOVES)
        if not moved:
            raise DatabaseError(
                f"{self._database.address.shown} runs with sysdate-is-now, which stops the"
                " budget's clock: start it without, or set AIOWORKER_BUDGET=worker"
            )
        self._checked_session = row.session

    def _poll(self) -> float:
        """Return the seconds after which a change of the row is looked for."""
        if not self.limited:
            return POLL_SECONDS
        return min(POLL_SECONDS, max(self.interval, SHORTEST_POLL_SECONDS))


def _jitter(contenders: int, gap_us: int) -> float:
    """Return seconds by which contenders come apart: up to a tenth of the interval."""
    return random.uniform(0, min(gap_us / 1e7, LONGEST_JITTER_SECONDS)) if contenders else 0.0
