"""A model of the budget: workers that a test moves step by step, and what must hold after each.

The budget, the connections and the server are the real ones. A worker's life is cut into steps,
and stands between two of them until it is told to go on: so it may be killed anywhere, and others
do what they like meanwhile. Nobody sleeps: a worker that has to wait stands, too, and time passes
by moving every moment of the budget's rows into the past, and the event loop's clock forward.

The `World` knows the true time, in microseconds of the server's clock plus what has passed so, and
keeps its own record of charges, first writes, rates and pauses. What contradicts it is a
`ViolationError`.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from pymysql.err import MySQLError, OperationalError

from aioworker.budget import pace, run_time, shared, tables
from aioworker.budget.other_server import OtherServer
from aioworker.budget.pace import budget_key
from aioworker.budget.run_time import Change
from aioworker.budget.shared import Shared, SharedBudget
from aioworker.commands import history
from aioworker.errors import DatabaseError
from aioworker.limits import End, RateLimit
from aioworker.mysql.database import Answer, Database
from aioworker.tasks.context import Context
from tests.conftest import make_database

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    import pytest
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

    from support.servers import Servers

Step = tuple[Any, ...]

NAME = "writes"
KEY = budget_key(NAME)
LEFT, RIGHT = "shop.left", "shop.right"
TASKS = {"a1": LEFT, "a2": LEFT, "b": RIGHT}
RATES = {LEFT: "1/h", RIGHT: None, KEY: "2/h"}  # by the code
SECOND = 1_000_000
MINUTE, HOUR = 60 * SECOND, 3600 * SECOND
NEVER = 2**62
LONG_AGO = -NEVER
# No timeout of a statement comes before the end of an example, however much time passes in it.
TIMEOUT_SECONDS = 30 * 86_400.0
LOOKS = 4  # until a row that two servers wrote is one's own
REACH = 9  # a worker's steps from one look to the next
AUDITED = 365 * 86_400  # seconds of true time, and more
GOES = 20  # a worker's steps for one start, and more

TABLES = (
    "CREATE TABLE model_write (id INT PRIMARY KEY AUTO_INCREMENT, worker VARCHAR(20), at BIGINT)",
    "CREATE TABLE model_passed (us BIGINT)",
)
EMPTY = (
    *(f"DELETE FROM {name}" for name in ("model_write", "model_passed", "aioworker_worker")),
    *(f"DELETE FROM aioworker_{name}" for name in ("budget", "run", "start", "change")),
    "INSERT INTO model_passed VALUES (0)",
)
_NOW = "TIMESTAMPDIFF(MICROSECOND, '2000-01-01', {}) + (SELECT us FROM model_passed)".format
_WRITE = f"INSERT INTO model_write (worker, at) SELECT %s, {_NOW('SYSDATE(6)')}"
_ROWS = f"SELECT task, starts, {_NOW('last_charge')}, holder, shares FROM aioworker_budget"
_STARTS = (
    "SELECT task, COUNT(*), MIN(number), MAX(number), COUNT(first_write) FROM aioworker_start"
    " GROUP BY task"
)
_MOMENTS = (
    *("last_start", "last_charge", "last_write", "set_at", "set_until", "set_until_of"),
    *("paused_at", "paused_until", "paused_until_of"),
)
_SHIFTS = [
    f"UPDATE {table} SET "
    + ", ".join(f"{moment} = {moment} - INTERVAL {{0}} MICROSECOND" for moment in moments)
    for table, moments in (
        ("aioworker_budget", _MOMENTS),
        ("aioworker_start", ("charged", "first_write")),
    )
]
_PAUSE_NOW = (
    "SELECT task FROM aioworker_budget WHERE task = '{}' FOR UPDATE NOWAIT",
    "UPDATE aioworker_budget SET paused = TRUE WHERE task = '{}'",
)
_ALIVE = (
    "REPLACE INTO aioworker_worker (id, host, pid, task, version, session, state, reason, since,"
    " seen, shares) VALUES ('{0}', '{0}', 1, '{1}', '1', 0, 'waiting', '', SYSDATE(6),"
    " SYSDATE(6) + INTERVAL 1 YEAR, {2})"
)


class ViolationError(AssertionError):
    """Something was promised, and does not hold."""


class _CrashedError(BaseException):
    """The worker is no more."""


class Session(Database):
    """A worker's connection, by which it may die.

    Attributes:
        dead: Whether the worker has died: nothing is sent any more.
        in_charge: After how many statements of a charge something comes between, and what.
        in_commit: What comes in place of the next COMMIT, if anything.
    """

    dead = False
    in_charge: tuple[int, Callable[[], None]] | None = None
    in_commit: Callable[[], Awaitable[None]] | None = None

    @property
    def link(self) -> Any:
        """What aiomysql has; None if it is not open."""
        return self._connection

    async def ready(self) -> None:
        """See that the connection stands, if anybody is there."""
        if self.dead:
            raise DatabaseError("crashed")
        await super().ready()

    async def _kill(self, lock: str) -> None:
        if not self.dead:
            await super()._kill(lock)

    async def each(self, *statements: str, args: object = None) -> list[Answer]:
        """Send statements of ours, a charge perhaps in two parts."""
        if self.in_charge is None or not any("starts + 1" in one for one in statements):
            return await super().each(*statements, args=args)
        (number, happens), self.in_charge = self.in_charge, None
        answers = []
        async with self._use() as connection, connection.cursor() as cursor:
            for place, statement in enumerate(statements):
                if place == number:
                    happens()
                await cursor.execute(statement, args)
                answers.append(Answer(cursor.rowcount, list(await cursor.fetchall() or ())))
            if number >= len(statements):
                happens()
        return answers

    async def _commit(self, connection: Any) -> None:
        if self.in_commit is not None:
            happens, self.in_commit = self.in_commit, None
            await happens()
        await super()._commit(connection)


class Worker:
    """A worker in the middle of its work.

    Args:
        world: Where it lives.
        name: Its place; who takes that after a crash has another `key`.
        number: Which one in that place it is.
        shares: The budget that its code has its task share; None for none.

    Attributes:
        at: The step that it stands before.
        stage: The same, or what it waits for in that step.
        lost: Whether it has lost its turn, by its `lock` or by its `connection`; empty if not.
        began: Whether its last step began a start, as it believes.
        starts: How many it has begun.
        due: The gaps that its run goes by, by the rows' keys; empty outside of a charged run.
        wrote: Whether that run has written.
        seen: Whether it counts for alive, as its row says.
    """

    def __init__(self, world: World, name: str, number: int, shares: str | None) -> None:
        self.world, self.name, self.task, self.shares = world, name, TASKS[name], shares
        self.number, self.key = number, f"{name}:{number}"
        self.at = self.stage = "look"
        self.lost = ""
        self.began = False
        self.starts = 0
        self.due: dict[str, int] = {}
        self.wrote = self.seen = False
        self.database = make_database(world.pair, Session, TIMEOUT_SECONDS)
        both = None if shares is None else Shared(shares, RateLimit.parse(str(RATES[KEY])))
        rate = RATES[self.task]
        own = None if rate is None else RateLimit.parse(rate)
        self.budget = SharedBudget(self.database, self.task, own, self.key, shared=both)
        self._may_go = asyncio.Event()
        self._stands = asyncio.Event()
        self.life = asyncio.create_task(self._live())

    @property
    def session(self) -> Session:
        """Its connection."""
        assert isinstance(self.database, Session)
        return self.database

    async def go(self) -> None:
        """Go on to the next step; whatever ends its life otherwise than by a crash is raised."""
        self.began = False
        await self._stands.wait()
        self._stands.clear()
        self._may_go.set()
        await self._stands.wait()
        if self.life.done():
            self.life.result()

    async def stand(self, step: str) -> None:
        """Stand before a step until it may go on."""
        self.at = step
        self.stage = self.stage if step == "wait" else step
        self._stands.set()
        await self._may_go.wait()
        self._may_go.clear()

    async def end(self) -> None:
        """Cut it off in the middle of what it does."""
        self.life.cancel()
        await asyncio.wait([self.life])
        self.database.close()

    async def _live(self) -> None:
        try:
            while True:
                await self.stand("look")
                try:
                    await self._start()
                except (DatabaseError, MySQLError):
                    continue  # the next look has another connection
        except _CrashedError:
            return
        finally:
            self._stands.set()

    async def _start(self) -> None:
        if await self.budget.check() is not None:
            return
        await self.stand("turn")
        async with self.budget.turn() as wait:
            if wait is not None:
                return
            await self.stand("charge")
            if await self.budget.charge(["message"]) is not None:
                return
            self.began = True
            self.starts += 1
            for _ in range(3):
                await self.stand("write")
                await self._write()
            await self.stand("give back")
            await self.budget.ended(["message"], End("ack", 1))

    async def _write(self) -> None:
        """Write as a task does that goes on after any error."""
        try:
            async with Context(self.database, self.task).transaction() as cursor:
                await cursor.execute(_WRITE, (self.key,))
                await self.stand("commit")
        except (DatabaseError, MySQLError):
            return


class Seen(NamedTuple):
    """What a row says.

    Args:
        starts: How many were charged to it.
        charged: When the last one was, in true time; None for never.
        holder: By whom.
        shares: What its task shares.
    """

    starts: int
    charged: int | None
    holder: str | None
    shares: str | None


class Level:
    """What the model knows of one row.

    Args:
        gap: The interval by the code, 0 for none.

    Attributes:
        charged: When a start was last charged.
        wrote: When a run last made its first write.
        writes: How many have.
    """

    def __init__(self, gap: int) -> None:
        self.charged = self.wrote = LONG_AGO
        self.writes = 0
        self._code = self._lasting = gap
        self._passing: tuple[int, int, int] | None = None  # and between which moments it ends
        self._paused_until = LONG_AGO

    def gap(self, now: int) -> int:
        """Return the interval in force, the shorter one while another takes its place."""
        if self._passing is None:
            return self._lasting
        gap, earliest, latest = self._passing
        return min([gap] * (now < latest) + [self._lasting] * (now >= earliest))

    def set_rate(self, gap: int | None, began: int, now: int, lasts: int | None) -> None:
        """An operator sets a rate, between two moments; None is the code's."""
        gap = self._code if gap is None else gap
        if lasts is None:
            self._lasting, self._passing = gap, None
        else:
            self._passing = (gap, began + lasts, now + lasts)

    def pause(self, began: int, lasts: int | None) -> None:
        """An operator pauses; a longer pause stays."""
        until = NEVER if lasts is None else began + lasts
        self._paused_until = max(self._paused_until, until)

    def resume(self) -> None:
        """An operator resumes."""
        self._paused_until = LONG_AGO

    def paused(self, now: int) -> bool:
        """Whether no start may begin."""
        return now < self._paused_until

    def step(self, by: int) -> None:
        """Have the database's clock step: what is to end by it ends as much earlier."""
        if self._paused_until != NEVER:
            self._paused_until -= by
        if self._passing is not None:
            gap, earliest, latest = self._passing
            self._passing = (gap, earliest - by, latest - by)


class World:
    """Workers, their operator, the time, and what must hold.

    Args:
        pair: The servers.
        shop: A connection to the database, in which `TABLES` are; each statement of it is a
            transaction.
        patch: Replaces clocks and sleeps; undone by whoever gave it.
    """

    def __init__(
        self,
        pair: Servers,
        shop: Connection[Cursor],
        patch: pytest.MonkeyPatch,
    ) -> None:
        self.pair, self._shop = pair, shop
        self.workers: dict[str, Worker] = {}
        self.levels = {
            key: Level(0 if rate is None else RateLimit.parse(rate).gap_us)
            for key, rate in RATES.items()
        }
        self._passed = 0
        self._forward: list[tuple[int, int]] = []  # steps of the database's clock, and when
        self._running: dict[str, set[str]] = {}  # which rows a run that is on was charged to
        self._written = 0
        self.kept: dict[str, bool] = {}
        self._operator = make_database(pair)
        self._patch(patch)

    def _patch(self, patch: pytest.MonkeyPatch) -> None:
        self._loop = asyncio.get_running_loop()
        real_time, self._sleep = self._loop.time, asyncio.sleep
        patch.setattr(self._loop, "time", lambda: real_time() + self._passed / SECOND)
        patch.setattr(asyncio, "sleep", self.sleep)
        patch.setattr(pace, "OtherServer", lambda: OtherServer(self._loop.time))
        # No contender waits in the server: the test says who is next.
        patch.setattr(shared, "QUEUE_SECONDS", 0)
        # The server's clock was looked at before: 20 ms for each new connection.
        patch.setattr(shared, "_SYSDATE_MOVES", "SELECT 1")

    async def play(self, steps: Iterable[Step]) -> None:
        """Take all steps; then see that nothing blocks for ever."""
        self._say(*EMPTY)
        await tables.add_rows(self._operator, [LEFT, RIGHT, KEY])
        self._say(f"UPDATE aioworker_budget SET shares = '{NAME}' WHERE task <> '{KEY}'")
        for name in TASKS:
            self._employ(name, 1, NAME)
        try:
            for step, *arguments in steps:
                await getattr(self, step)(*arguments)
            await self._all_can_start()
        finally:
            for worker in self.workers.values():
                worker.session.dead = True
                await worker.end()
            for key in RATES:
                self.kept[key] = (await history._audit(self._operator, key, AUDITED)).kept
            self._operator.close()

    # The steps.

    async def go(self, name: str, times: int = 1) -> None:
        """A worker goes on to its next step, or over several."""
        for _ in range(times):
            await self._go(name)

    async def _go(self, name: str) -> None:
        worker = self.workers[name]
        before, began = self._rows(), self.now()
        self._is_seen(worker)
        await worker.go()
        self._judge(worker, before, began)
        if worker.life.done():
            self._employ(name, worker.number + 1, worker.shares)

    async def to(self, name: str, step: str) -> None:
        """A worker goes on until it stands before a step."""
        worker = self.workers[name]
        for _ in range(GOES):
            if worker.at == step:
                return
            await self.go(name)
        raise LookupError(f"{name} never came to {step!r}")

    async def reach(self, name: str, step: str) -> None:
        """A worker goes on until it stands before a step, if it comes to it soon."""
        for _ in range(REACH):
            if self.workers[name].at != step:
                await self._go(name)

    async def crash(self, name: str) -> None:
        """A worker dies between two statements; another one takes its place."""
        worker = self.workers[name]
        self._die(worker)
        await worker.end()
        self._employ(name, worker.number + 1, worker.shares)

    async def crash_in_charge(self, name: str, number: int) -> None:
        """A worker dies when the server has run so many statements of its charge, or all."""
        worker = self.workers[name]

        def dies() -> None:
            self._die(worker)
            raise _CrashedError

        await self._in_charge(worker, number, dies)

    async def pause_in_charge(self, name: str, number: int, key: str) -> None:
        """An operator pauses when the server has run so many statements of a charge.

        If the row is locked, that waits for the charge.
        """
        waits = False

        def pauses() -> None:
            nonlocal waits
            began = self.now()
            try:
                self._say(*(statement.format(key) for statement in _PAUSE_NOW))
            except OperationalError:
                waits = True
            else:
                self.levels[key].pause(began, None)

        await self._in_charge(self.workers[name], number, pauses)
        if waits:
            await self.pause(key)

    async def crash_in_commit(self, name: str, done: bool) -> None:
        """A worker dies right before its COMMIT, or right behind it."""
        worker = self.workers[name]
        if worker.at != "commit":
            return

        async def dies() -> None:
            if done:
                await worker.session.link.commit()
            self._die(worker)
            raise _CrashedError

        worker.session.in_commit = dies
        await self.go(name)
        worker.session.in_commit = None  # its turn was lost: it never came so far

    async def cut(self, name: str) -> None:
        """A worker's session is killed, which it will see when it next uses it."""
        worker = self.workers[name]
        self._kill(worker)
        self._loses(worker, "connection")

    async def lose(self, name: str, key: str) -> None:
        """A worker's session loses a lock: by a task's own statement, or a proxy."""
        worker = self.workers[name]
        if worker.at in ("look", "turn") or worker.lost == "connection":
            return
        held = {worker.task} | ({KEY} if worker.shares else set())
        if key in held:
            schema = await self._operator.schema()
            await worker.session.link.query(
                f"SELECT RELEASE_LOCK('{tables.lock_name(schema, key)}')"
            )
            self._loses(worker, "lock")

    async def elapse(self, us: int) -> None:
        """Time passes."""
        self._elapse(us)

    async def nearly(self, key: str, us: int) -> None:
        """Time passes until a start is due by a row, and so much more; less below 0."""
        level, now = self.levels[key], self.now()
        if (missing := max(level.charged, level.wrote) + level.gap(now) - now + us) > 0:
            self._elapse(missing)

    async def step_clock(self, us: int) -> None:
        """The database's clock steps forward; back below 0."""
        if us > 0:
            self._forward.append((self.now(), us))
        for level in self.levels.values():
            level.step(us)
        self._say(*(shift.format(us) for shift in _SHIFTS))

    async def pause(self, key: str, lasts: int | None = None) -> None:
        """An operator pauses."""
        began = self.now()
        await run_time.pause(self._operator, key, _change(lasts))
        self.levels[key].pause(began, lasts)

    async def resume(self, key: str) -> None:
        """An operator resumes."""
        await run_time.resume(self._operator, key, _change(None))
        self.levels[key].resume()

    async def rate(self, key: str, gap: int | None, lasts: int | None = None) -> None:
        """An operator sets a rate."""
        began = self.now()
        await run_time.set_rate(self._operator, key, gap, _change(lasts))
        self.levels[key].set_rate(gap, began, self.now(), lasts)

    async def deploy(self, name: str, shares: str | None) -> None:
        """A worker ends, and one of new code takes its place."""
        worker = self.workers[name]
        self._die(worker)
        await worker.end()
        self._employ(name, worker.number + 1, shares)

    async def unseen(self, name: str) -> None:
        """A worker is frozen for so long that it counts for dead, until it goes on."""
        self._is_gone(self.workers[name])

    async def elsewhere(self, key: str) -> None:
        """Another server writes the row, and may have started something just now.

        Not while a run is on here: what two servers do at once is not promised.
        """
        if any(worker.due for worker in self.workers.values()):
            return
        self._say(f"UPDATE aioworker_budget SET server = 'elsewhere' WHERE task = '{key}'")
        self.levels[key].charged = self.levels[key].wrote = self.now()

    # How they are done.

    def _say(self, *statements: str) -> None:
        with self._shop.cursor() as cursor:
            for statement in statements:
                cursor.execute(statement)

    def _ask(self, statement: str, *args: object) -> list[tuple[Any, ...]]:
        with self._shop.cursor() as cursor:
            cursor.execute(statement, args or None)
            return list(cursor.fetchall())

    def now(self) -> int:
        """Return the true time."""
        [[now]] = self._ask(f"SELECT {_NOW('SYSDATE(6)')}")
        return int(now)

    async def sleep(self, seconds: float) -> None:
        """Stand in for `asyncio.sleep`: a worker stands; if it goes on, time passes."""
        mine = [one for one in self.workers.values() if one.life is asyncio.current_task()]
        if not mine or seconds <= 0:
            await self._sleep(seconds)
            return
        until = self._loop.time() + seconds
        await mine[0].stand("wait")
        self._elapse(max(round((until - self._loop.time()) * SECOND), 0))

    def _elapse(self, us: int) -> None:
        self._passed += us
        passes = f"UPDATE model_passed SET us = {self._passed}"
        self._say(*(shift.format(us) for shift in _SHIFTS), passes)

    def _employ(self, name: str, number: int, shares: str | None) -> None:
        self.workers[name] = worker = Worker(self, name, number, shares)
        self._is_seen(worker)

    def _is_seen(self, worker: Worker) -> None:
        if worker.seen:
            return
        worker.seen = True
        shares = "NULL" if worker.shares is None else f"'{worker.shares}'"
        self._say(_ALIVE.format(worker.key, worker.task, shares))

    def _is_gone(self, worker: Worker) -> None:
        worker.seen = False
        self._say(f"DELETE FROM aioworker_worker WHERE id = '{worker.key}'")

    def _die(self, worker: Worker) -> None:
        """End a worker's session, and whatever else it might do."""
        worker.session.dead = True
        self._kill(worker)
        self._running.pop(worker.key, None)
        self._is_gone(worker)

    def _kill(self, worker: Worker) -> None:
        if worker.session.link is None:
            return
        session = worker.session.link.thread_id()
        try:
            self._say(f"KILL {session}")
        except OperationalError:
            return  # it had ended
        gone = f"SELECT COUNT(*) FROM information_schema.processlist WHERE id = {session}"
        while self._ask(gone) != [(0,)]:
            time.sleep(0.001)

    def _loses(self, worker: Worker, what: str) -> None:
        if worker.at not in ("look", "turn"):
            worker.lost = what
            self._running.pop(worker.key, None)

    async def _in_charge(self, worker: Worker, number: int, happens: Callable[[], None]) -> None:
        if worker.stage != "charge":
            return
        worker.session.in_charge = (number, happens)
        await self.go(worker.name)
        if worker.at == "wait" and worker.stage == "charge" and not worker.life.done():
            await self.go(worker.name)
        worker.session.in_charge = None

    # What must hold.

    def _judge(self, worker: Worker, before: dict[str, Seen], began: int) -> None:
        """Judge a worker's step, the only thing that has happened since it began."""
        after, now = self._rows(), self.now()
        charged = {key for key in after if after[key].starts != before[key].starts}
        if not worker.life.done():
            runs = worker.began and worker.budget.limited
            _hold(runs is bool(charged), "who runs was charged, and who was charged runs")
        if charged:
            self._judge_charge(worker, charged, after, began, now)
        self._judge_writes(worker)
        self._judge_shares(worker, before, after)
        counted = {task: numbers for task, *numbers in self._ask(_STARTS)}
        expected = {
            task: [row.starts, 1, row.starts, self.levels[task].writes]
            for task, row in after.items()
            if row.starts and task != KEY
        }
        _hold(counted == expected, f"each charge has its row: {expected}, got: {counted}")
        if worker.at == "look" or worker.life.done():
            self._running.pop(worker.key, None)
            worker.lost, worker.due, worker.wrote = "", {}, False

    def _judge_charge(
        self, worker: Worker, charged: set[str], after: dict[str, Seen], began: int, now: int
    ) -> None:
        _hold(not worker.lost, "who has lost its turn starts nothing")
        moments = {key: after[key].charged or 0 for key in charged}
        at = max(moments.values())
        _hold(set(moments.values()) == {at}, f"all rows are charged at one moment: {moments}")
        _hold(after[worker.task].shares == worker.shares, "a start goes by what its row shares")
        shares = worker.shares is not None
        needed = {worker.task} | ({KEY} if shares and self.levels[KEY].gap(at) else set())
        _hold(needed <= charged <= {worker.task, KEY}, f"all rows are charged, got: {charged}")
        for key in (worker.task, KEY) if shares else (worker.task,):
            _hold(not self.levels[key].paused(at), f"no start while {key} is paused")
        for other, keys in self._running.items():
            _hold(not keys & charged, f"no run beside that of {other}")
        for key in sorted(charged):
            level, at = self.levels[key], moments[key]
            _hold(began <= at <= now, "a charge is noted at its moment")
            _hold(after[key].holder == worker.key, "the row names who was charged")
            self._hold_apart(f"charges of {key}", level.charged, at, level.gap(at))
            level.charged = at
            worker.due[key] = level.gap(at)
        self._running[worker.key] = charged

    def _judge_writes(self, worker: Worker) -> None:
        written = self._ask("SELECT id, worker, at FROM model_write WHERE id > %s", self._written)
        for number, who, at in written:
            self._written = number
            _hold(who == worker.key, "who stands still commits nothing")
            _hold(worker.lost != "connection", "a run that lost its connection commits nothing")
            if worker.wrote or not worker.budget.limited:
                continue
            _hold(not worker.lost, "a run that lost its turn commits no first write")
            _hold(bool(worker.due), "only a run writes")
            worker.wrote = True
            self.levels[worker.task].writes += 1
            for key, gap in worker.due.items():
                self._hold_apart(f"first writes of {key}", self.levels[key].wrote, at, gap)
                self.levels[key].wrote = at

    def _judge_shares(
        self, worker: Worker, before: dict[str, Seen], after: dict[str, Seen]
    ) -> None:
        old, new = before[worker.task].shares, after[worker.task].shares
        if old != new:
            by = "shares IS NULL" if old is None else f"shares = '{old}'"
            found = self._ask(
                f"SELECT id FROM aioworker_worker WHERE task = '{worker.task}' AND {by}",
            )
            _hold(not found, f"nobody alive goes by the old code, got: {found}")

    def _hold_apart(self, what: str, last: int, at: int, gap: int) -> None:
        early = sum(us for when, us in self._forward if last <= when <= at)
        apart = at - last + early
        _hold(apart >= gap, f"{what} are {gap / SECOND} s apart, got: {apart / SECOND}")

    def _rows(self) -> dict[str, Seen]:
        return {key: Seen(*row) for key, *row in self._ask(_ROWS)}

    async def _all_can_start(self) -> None:
        """Let everybody give back, and see that each then starts, given time."""
        for key in RATES:
            if self.levels[key].paused(NEVER - 1):
                await self.resume(key)
        for name in TASKS:
            await self.to(name, "look")
        started = set()
        for name, task in TASKS.items():
            number = self.workers[name].starts
            for place in range(GOES):
                # A row of another server, or of another time, is seen by a look, and waited for.
                self._elapse(12 * HOUR if place < LOOKS else 0)
                await self.go(name)
                if self.workers[name].starts > number and self.workers[name].at == "look":
                    started.add(task)
                    break
            else:
                others = self._rows()[task].shares != self.workers[name].shares
                _hold(others, f"{name} can start")
        _hold(started == set(TASKS.values()), f"all tasks can start, got: {started}")


def _hold(holds: bool, what: str) -> None:
    if not holds:
        raise ViolationError(f"expected: {what}")


def _change(lasts: int | None) -> Change:
    return Change("dba", "changed", None, None if lasts is None else lasts / SECOND)
