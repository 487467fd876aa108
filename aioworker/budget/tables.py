"""aioworker's own tables, in the database that is being protected: read and explained.

`aioworker init` makes them, and nothing else does; `schema` has their columns. Their times are
UTC, by that database's clock. `docs/operations.md` tells what an operator may read and set by
plain SQL.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from aioworker.budget.order import FRESH_SECONDS, Want
from aioworker.errors import DatabaseError
from aioworker.mysql import errors
from aioworker.mysql.errors import ER, MySQLError
from aioworker.words import command, moment

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from aioworker.mysql.database import Answer, Database

# Which server wrote a row: another one has another clock.
SERVER = "CONCAT(@@hostname, ':', @@port, ':', @@server_id)"

# A row that init makes lets the first start begin at once: its last one was long ago.
LONG_AGO = "2000-01-01"
FIRST_ROW = f"""INSERT INTO aioworker_budget (task, last_start, server)
VALUES (%(task)s, '{LONG_AGO}', {SERVER}) ON DUPLICATE KEY UPDATE starts = starts"""

# `last_start` is the later of charge and first write. Where it is not, an older worker or an
# operator wrote it: then it stands for both.
_OURS = "last_start <=> GREATEST(last_charge, last_write)"
# An operator may have written what no calendar has, such as 0: it is as long ago, or as far ahead,
# as can be reckoned with.
_BOUNDED = (
    "GREATEST(LEAST({}, TIMESTAMP'9000-01-01 00:00:00'), TIMESTAMP'2000-01-01 00:00:00')".format
)
_STARTED = _BOUNDED("last_start")
CHARGED = _BOUNDED(f"IF({_OURS}, last_charge, last_start)")
WROTE = _BOUNDED(f"IF({_OURS}, last_write, last_start)")

# When what is set at run time ends; NULL for never. What plain SQL, or a command of an earlier
# version, set since then has no end: it changed the moment that the end belongs to.
PAUSE_END = "IF(paused_until_of = paused_at, paused_until, NULL)"
RATE_END = "IF(set_until_of = set_at, set_until, NULL)"
PAUSE_OVER = f"COALESCE(paused AND {PAUSE_END} <= SYSDATE(6), FALSE)"
RATE_OVER = f"COALESCE({RATE_END} <= SYSDATE(6), FALSE)"
# The interval set at run time, as it is now.
GAP_US = f"IF({RATE_OVER}, gap_after_us, gap_us)"
_PAUSED_UNTIL = f"IF(paused AND {PAUSE_END} > SYSDATE(6), paused_until, NULL)"
_SET_UNTIL = f"IF({RATE_END} > SYSDATE(6), set_until, NULL)"

# Some users may write all the same, into what another server overwrites. MariaDB is about to
# answer with words.
_ONLY_READS = "CONCAT(@@read_only) NOT IN ('0', 'OFF') OR @@innodb_read_only"

# The rows that a start is charged to: the task's own, and that of the budget that it shares, if it
# does: else %(shared)s is NULL.
ROWS = "task IN (%(task)s, %(shared)s)"
IS_SHARED = "task <=> %(shared)s"
_LOCK = f"IF({IS_SHARED}, %(shared_lock)s, %(lock)s)"
MINE = f"IS_USED_LOCK({_LOCK}) = CONNECTION_ID()"
# How many locks were held: the last one taken goes first.
RELEASE = """SELECT IF(%(shared_lock)s IS NULL, 0, RELEASE_LOCK(COALESCE(%(shared_lock)s, '-')))
    + RELEASE_LOCK(%(lock)s)"""
# A turn is the task's lock, then that of the budget that it shares; without that one, none.
_TAKE = ("SELECT COALESCE(GET_LOCK(%(lock)s, %(patience)s), 0), NULL",)
_TAKE_BOTH = (
    "SET @aioworker_held = COALESCE(GET_LOCK(%(lock)s, %(patience)s), 0)",
    """SET @aioworker_held = @aioworker_held
    + IF(@aioworker_held, COALESCE(GET_LOCK(%(shared_lock)s, %(patience)s), 0), 0)""",
    "SELECT @aioworker_held, IF(@aioworker_held = 1, RELEASE_LOCK(%(lock)s), NULL)",
)

_FIND = f"""SELECT task, paused AND NOT {PAUSE_OVER}, {GAP_US},
    TIMESTAMPDIFF(MICROSECOND, {_STARTED}, SYSDATE(6)),
    {_STARTED}, server = {SERVER}, server, {SERVER},
    COALESCE(IS_USED_LOCK({_LOCK}), 0), CONNECTION_ID(),
    starts, holder, paused_by, paused_at, paused_why, {_PAUSED_UNTIL},
    set_by, set_at, set_why, {_SET_UNTIL}, {PAUSE_OVER} OR {RATE_OVER},
    TIMESTAMPDIFF(MICROSECOND, {CHARGED}, SYSDATE(6)),
    TIMESTAMPDIFF(MICROSECOND, {WROTE}, SYSDATE(6)),
    bulk_next, runs_now IS NOT NULL, shares, urgent_starts, running, deaths, SYSDATE(6),
    {_ONLY_READS}
FROM aioworker_budget LEFT JOIN (
    SELECT DISTINCT task AS runs_now FROM aioworker_run WHERE worker IS NOT NULL
) AS run ON runs_now = task
WHERE {ROWS} ORDER BY {IS_SHARED}"""

# What the tasks have waiting that share a budget.
_WANTS = f"""SELECT task, COALESCE(wants_urgent > SYSDATE(6) - INTERVAL {FRESH_SECONDS} SECOND, 0),
    COALESCE(wants_bulk > SYSDATE(6) - INTERVAL {FRESH_SECONDS} SECOND, 0),
    TIMESTAMPDIFF(MICROSECOND, {CHARGED}, SYSDATE(6))
FROM aioworker_budget WHERE CONCAT('budget:', shares) = %(shared)s"""
_WANT = """UPDATE aioworker_budget
SET wants_urgent = IF(%(urgent)s, SYSDATE(6), NULL), wants_bulk = IF(%(bulk)s, SYSDATE(6), NULL)
WHERE task = %(task)s"""

NOTES = """SELECT message, together, most, deaths, worker FROM aioworker_run
WHERE task = %(task)s"""

ALIVE_SECONDS = 90  # a worker not seen for so long counts for nothing
LATE_SECONDS = 40  # longer than one that lives takes to be seen again
_HOLDER = f"""SELECT host, pid, seen > SYSDATE(6) - INTERVAL {ALIVE_SECONDS} SECOND
FROM aioworker_worker WHERE session = %s ORDER BY seen DESC LIMIT 1"""
_TASKS = "SELECT task FROM aioworker_budget WHERE task NOT LIKE 'budget:%' ORDER BY task"
_BUDGETS = "SELECT SUBSTR(task, 8) FROM aioworker_budget WHERE task LIKE 'budget:%' ORDER BY task"
# Who is alive and goes by what the row says; a worker of an earlier version names no budget.
_SHARES_AS_BEFORE = f"""SELECT host, pid, IF(seen < SYSDATE(6) - INTERVAL {LATE_SECONDS} SECOND,
    seen + INTERVAL {ALIVE_SECONDS} SECOND, NULL)
FROM aioworker_worker
WHERE task = %(task)s AND shares <=> %(before)s
AND seen > SYSDATE(6) - INTERVAL {ALIVE_SECONDS} SECOND ORDER BY seen DESC LIMIT 1"""
_SHARING = "SELECT task FROM aioworker_budget WHERE shares = %s ORDER BY task"
_SHARE = """UPDATE aioworker_budget SET shares = %(shares)s
WHERE task = %(task)s AND shares <=> %(before)s"""
_RATES = f"""SELECT DISTINCT COALESCE(rate, 'none') FROM aioworker_worker
WHERE task = %s AND seen > SYSDATE(6) - INTERVAL {ALIVE_SECONDS} SECOND"""
NEED_INIT = frozenset({ER.NO_SUCH_TABLE, ER.BAD_FIELD_ERROR})
# What an operator writes may be beyond any calendar.
LONGEST_GAP_US = 366 * 86_400 * 1_000_000


class Row(NamedTuple):
    """A row of the budget, as the server answers.

    Args:
        task: Its key: the task's name, or `budget:NAME`.
        paused: Whether an operator stopped all starts.
        gap_us: The interval set at run time, in microseconds; None where none is set.
        age_us: Microseconds since the last start; below 0 after a step of the clock back.
        last_start: When that was, UTC.
        same_server: Whether this server wrote the row.
        server: Which one wrote it.
        here: Which one this is.
        turn: The session that holds the turn, 0 for nobody.
        session: This session.
        starts: Starts charged ever.
        holder: The worker of the last start.
        paused_by: Who paused it.
        paused_at: When.
        paused_why: Why.
        paused_until: When the pause that holds ends, UTC; None for never.
        set_by: Who set or reset `gap_us` last.
        set_at: When.
        set_why: Why.
        set_until: When the rate set at run time ends, UTC; None for never.
        over: Whether an end has come, and nobody has cleared what was set until then.
        charge_age_us: Microseconds since the last charge.
        write_age_us: Microseconds since a run's last first write.
        bulk_next: Whether the next start begins with the bulk lane: the last one held messages
            of the urgent lane alone.
        runs: Whether a run is on, or its worker died in it and nobody has had the turn since.
        shares: The budget that the task shares with others, by its name; None for none.
        urgent_starts: How many starts in a row held nothing of a bulk lane.
        running: The message of such a run, as a worker of an earlier version noted it.
        deaths: How often a message's worker died while it ran, by its key; likewise.
        now: What time it was there, UTC, with its zone.
    """

    task: str
    paused: bool
    gap_us: int | None
    age_us: int
    last_start: datetime
    same_server: bool
    server: str
    here: str
    turn: int
    session: int
    starts: int
    holder: str | None
    paused_by: str | None
    paused_at: datetime | None
    paused_why: str | None
    paused_until: datetime | None
    set_by: str | None
    set_at: datetime | None
    set_why: str | None
    set_until: datetime | None
    over: bool
    charge_age_us: int
    write_age_us: int
    bulk_next: bool
    runs: bool
    shares: str | None
    urgent_starts: int
    running: list[str]
    deaths: dict[str, int]
    now: datetime

    def seconds_until(self, end: datetime | None) -> float | None:
        """Return how long it is until a moment of this row; None for none."""
        return None if end is None else (end.replace(tzinfo=UTC) - self.now).total_seconds()

    @property
    def charged_at(self) -> datetime:
        """When the last start was charged, UTC."""
        return self.now - timedelta(microseconds=self.charge_age_us)

    @property
    def pause(self) -> str:
        """Who paused the task, when and why; empty if nobody did."""
        if not self.paused:
            return ""
        by = f" by {self.paused_by}" if self.paused_by else ""
        since = f" since {moment(self.paused_at)}" if self.paused_at else ""
        until = f" until {moment(self.paused_until)}" if self.paused_until else ""
        why = f": {self.paused_why}" if self.paused_why else ""
        return " ".join(f"paused{by}{since}{until}{why}".split())


_FLAGS = [
    Row._fields.index(name) for name in ("paused", "same_server", "over", "bulk_next", "runs")
]
_GAP = Row._fields.index("gap_us")
_MOMENTS = [
    Row._fields.index(name) for name in ("paused_at", "paused_until", "set_at", "set_until")
]


async def refuse_reader(database: Database) -> None:
    """Refuse a server that only reads: a table changed there ends its replication.

    Raises:
        DatabaseError: It is one.
    """
    with explaining(database):
        [[only_reads]] = await database.query(f"SELECT {_ONLY_READS}")
    _leave(database, only_reads)


async def add_rows(database: Database, tasks: Sequence[str]) -> None:
    """Make the tasks' rows that are not there: each lets its task start at once.

    Raises:
        DatabaseError: The user may not.
    """
    with explaining(database):
        for task in tasks:
            await database.execute(FIRST_ROW, {"task": task})


@contextmanager
def explaining(database: Database) -> Iterator[None]:
    """Turn what goes wrong inside into one `DatabaseError`; a table to be made has its cure.

    Raises:
        DatabaseError: Anything of the database failed.
    """
    with database.explaining():
        try:
            yield
        except MySQLError as error:
            words = f"{errors.describe(error).partition(';')[0]} at {database.address.shown}"
            if errors.code(error) == ER.NO_SUCH_TABLE:
                cure = f"run `{command('init')}`, or set AIOWORKER_BUDGET=worker"
                if "aioworker_budget" not in words:  # the oldest of them
                    cure = f"the tables are {older()}"
                raise DatabaseError(f"{words}: {cure}") from error
            if errors.code(error) == ER.BAD_FIELD_ERROR:
                raise DatabaseError(f"{words}: the table is {older()}") from error
            raise


def older() -> str:
    """Return what to say of a table that lacks a column."""
    return f"of an earlier version: run `{command('init')}`, which keeps what is in it"


def needs_init(error: DatabaseError) -> bool:
    """Whether an error is that a table is not there, or of an earlier version."""
    cause = error.__cause__
    return isinstance(cause, MySQLError) and errors.code(cause) in NEED_INIT


def lock_name(schema: str, task: str, purpose: str = "aioworker") -> str:
    """Return the name of a task's lock: its own for each database of one server.

    Named locks are the whole server's, blind to case, and end at 64 characters on MySQL.

    Args:
        schema: The database that the task works on, by `Database.schema`.
        task: The task's name.
        purpose: What the lock is for, up to 16 characters.
    """
    owner = f"{schema}\0{task}"
    digest = hashlib.sha256(owner.encode()).hexdigest()[:16]
    return f"{purpose}:{task[: 45 - len(purpose)]}:{digest}"


class Keys(NamedTuple):
    """Which rows a start is charged to.

    Args:
        task: The task's own.
        shared: That of the budget that it shares with other tasks; None if it shares none.
    """

    task: str
    shared: str | None = None

    @property
    def number(self) -> int:
        """How many rows those are."""
        return 1 if self.shared is None else 2

    @property
    def asked(self) -> tuple[str, ...]:
        """What is read of them."""
        return (_FIND,) if self.shared is None else (_FIND, _WANTS)


def arguments(schema: str, keys: Keys) -> dict[str, object]:
    """Return what statements about these rows are given: keys, locks, and how many they are."""
    shared = None if keys.shared is None else lock_name(schema, keys.shared)
    locks = {"lock": lock_name(schema, keys.task), "shared_lock": shared}
    return {**keys._asdict(), **locks, "rows": keys.number}


async def read(database: Database, task: str) -> Row:
    """Return a row.

    Raises:
        DatabaseError: There is none, and only `aioworker init` makes one; or this server only
            reads.
    """
    [row] = (await read_all(database, Keys(task))).rows
    return row


class Found(NamedTuple):
    """What a budget's rows say.

    Args:
        rows: Those that a start is charged to, the task's own first.
        wants: What the tasks have waiting that share the budget; empty without one.
        held: How many of the turn's locks could be had, of which all or none are held.
        notes: The answer to `NOTES`.
    """

    rows: list[Row]
    wants: list[Want]
    held: int = 0
    notes: Sequence[tuple[Any, ...]] = ()


async def read_all(database: Database, keys: Keys) -> Found:
    """Return what the rows say that a start is charged to.

    Raises:
        DatabaseError: One is not there, and only `aioworker init` makes it; or this server only
            reads.
    """
    given = arguments(await database.schema(), keys)
    found, *wants = await database.each(*keys.asked, args=given)
    return Found(_there(_rows(database, found.rows), keys), _wants(wants))


async def take(database: Database, keys: Keys, patience: int, *, both: bool) -> Found:
    """Ask for the task's turn, and read the rows and the notes once that is answered.

    Args:
        database: The connection that is to hold it.
        keys: The rows' keys.
        patience: Seconds that the server lets it wait for each lock that somebody else has.
        both: Whether the turn is that of the shared budget, too.

    Raises:
        DatabaseError: A row is not there, or this server only reads.
    """
    given = {**arguments(await database.schema(), keys), "patience": patience}
    taking = _TAKE_BOTH if both else _TAKE
    answers = await database.each(*taking, *keys.asked, NOTES, args=given)
    took, found, *wants, notes = answers[len(taking) - 1 :]
    [[held, _released]] = took.rows
    return Found(_there(_rows(database, found.rows), keys), _wants(wants), held, notes.rows)


async def want(database: Database, task: str, *, urgent: bool, bulk: bool) -> None:
    """Have a task's row say what waits in its lanes."""
    await database.execute(_WANT, {"task": task, "urgent": urgent, "bulk": bulk})


async def tasks(database: Database) -> list[str]:
    """Return the names of all tasks that have a row, in order."""
    return [name for [name] in await database.query(_TASKS)]


async def budgets(database: Database) -> list[str]:
    """Return the names of all budgets that tasks share, in order."""
    return [name for [name] in await database.query(_BUDGETS)]


async def sharing(database: Database, name: str) -> list[str]:
    """Return the names of the tasks that share a budget, in order."""
    return [task for [task] in await database.query(_SHARING, (name,))]


async def who_shares(database: Database, row: Row) -> str | None:
    """Return in words which live worker goes by what a task's row says it shares; None for none."""
    found = await database.query(_SHARES_AS_BEFORE, {"task": row.task, "before": row.shares})
    if not found:
        return None
    [(host, pid, gone_at)] = found
    theirs = "no budget" if row.shares is None else f"budget {row.shares}"
    late = "" if gone_at is None else f"; unless it is seen again, until {moment(gone_at)}"
    return f"waiting for the end of {host}:{pid}, by whose code {row.task} shares {theirs}{late}"


async def share(database: Database, row: Row, shares: str | None) -> None:
    """Have a task share another budget from now on, unless somebody was first.

    Args:
        database: Where the rows are.
        row: The task's row.
        shares: The budget's name; None for none.
    """
    given = {"task": row.task, "before": row.shares, "shares": shares}
    await database.execute(_SHARE, given)


async def rates(database: Database, task: str) -> set[str]:
    """Return the rate limits that the workers of a task have of their own, `none` for none."""
    return {rate for [rate] in await database.query(_RATES, (task,))}


async def find_row(database: Database, task: str) -> Row | None:
    """Return a row, None if there is none.

    Raises:
        DatabaseError: This server only reads.
    """
    given = arguments(await database.schema(), Keys(task))
    [answer] = await database.each(_FIND, args=given)
    return next(iter(_rows(database, answer.rows)), None)


def _there(rows: list[Row], keys: Keys) -> list[Row]:
    """Return the rows, of which none is missing."""
    for key in keys:
        if key is not None and key not in {row.task for row in rows}:
            kind, _, name = key.rpartition(":")
            raise DatabaseError(
                f"{kind or 'task'} {name!r} has no row in aioworker_budget: run `{command('init')}`"
            )
    return rows


def _rows(database: Database, found: list[tuple[Any, ...]]) -> list[Row]:
    return [_row(database, list(values)) for values in found]


def _wants(answers: Sequence[Answer]) -> list[Want]:
    found = [row for answer in answers for row in answer.rows]
    return [Want(task, bool(urgent), bool(bulk), age) for task, urgent, bulk, age in found]


def _row(database: Database, values: list[Any]) -> Row:
    _leave(database, values.pop())
    for flag in _FLAGS:
        values[flag] = bool(values[flag])
    if values[_GAP] is not None:
        values[_GAP] = min(values[_GAP], LONGEST_GAP_US)
    for place in _MOMENTS:
        if not isinstance(values[place], datetime):
            values[place] = None  # such as 0: text, as it is in no calendar
    values[-3:] = _messages(values[-3]), _deaths(values[-2]), values[-1].replace(tzinfo=UTC)
    return Row(*values)


def _leave(database: Database, only_reads: object) -> None:
    """Leave a server that only reads: its address may lead to another one now."""
    if only_reads:
        database.close()
        raise DatabaseError(
            f"cannot use MySQL at {database.address.shown}: {errors.ONLY_READS}", unreachable=True
        )


# Notes are read with care: anybody may have written something else over them.


def _messages(text: str | None) -> list[str]:
    found = _noted(text)
    return [one for one in found if isinstance(one, str)] if isinstance(found, list) else []


def _deaths(text: str | None) -> dict[str, int]:
    found = _noted(text)
    if not isinstance(found, dict):
        return {}
    return {message: deaths for message, deaths in found.items() if type(deaths) is int}


def _noted(text: str | None) -> Any:
    try:
        return json.loads(text or "null")
    except ValueError:
        return None


class Holder(NamedTuple):
    """Who holds a task's turn.

    Args:
        name: `host:pid` of a worker; `session N` of whom no worker's row tells.
        alive: Whether it is a worker that was seen lately.
    """

    name: str
    alive: bool


async def holder(database: Database, session: int) -> Holder | None:
    """Return whose session holds a turn, None for nobody.

    Sessions are counted anew when the server starts: the one seen last is meant.
    """
    if not session:
        return None
    found = await database.query(_HOLDER, (session,))
    if not found:
        return Holder(f"session {session}", alive=False)
    host, pid, alive = found[0]
    return Holder(f"{host}:{pid}", bool(alive))
