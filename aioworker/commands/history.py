"""What `audit` and `history` show: whether the rate was kept, and what started and was changed.

Both read `aioworker_start` and `aioworker_change`, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from operator import attrgetter
from typing import Any

from aioworker.budget import tables
from aioworker.budget.history import KEPT_DAYS
from aioworker.budget.pace import budget_key, budget_name
from aioworker.commands import which_tasks
from aioworker.commands.controls import shown
from aioworker.errors import UsageError
from aioworker.mysql.database import Database
from aioworker.settings import Settings
from aioworker.words import as_json

# In intervals, each distance by the rate that was in force at the later of both. In a window of so
# many microseconds, the start at its end included, as many starts with a limit are allowed as
# intervals begin.
_AUDIT = """SELECT COUNT(*), MIN(charged), MAX(charged), SUM(ended IS NULL),
    COALESCE(MAX(number) - MIN(number) + 1 - COUNT(*), 0),
    MIN(1e0 * TIMESTAMPDIFF(MICROSECOND, charged_before, charged) / gap_us),
    MIN(1e0 * TIMESTAMPDIFF(MICROSECOND, written_before, first_write) / gap_us),
    MAX(in_minute), COALESCE(MAX(excess_in_minute), 0),
    MAX(in_hour), COALESCE(MAX(excess_in_hour), 0)
FROM (
    SELECT number, charged, first_write, ended, gap_us,
        LAG(charged) OVER (ORDER BY charged) AS charged_before,
        MAX(first_write) OVER (
            ORDER BY charged ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
        ) AS written_before,
        COUNT(*) OVER last_minute AS in_minute, COUNT(*) OVER last_hour AS in_hour,
        COUNT(gap_us) OVER last_minute - CEIL(60000000 / MIN(gap_us) OVER last_minute)
            AS excess_in_minute,
        COUNT(gap_us) OVER last_hour - CEIL(3600000000 / MIN(gap_us) OVER last_hour)
            AS excess_in_hour
    FROM (
        SELECT {number} AS number, charged, first_write, ended, NULLIF({gap}, 0) AS gap_us,
            TIMESTAMPDIFF(MICROSECOND, '2000-01-01', charged) AS us
        FROM aioworker_start
        WHERE {whose} = %(key)s AND charged >= SYSDATE(6) - INTERVAL %(seconds)s SECOND
    ) AS starts
    WINDOW last_minute AS (ORDER BY us RANGE BETWEEN 59999999 PRECEDING AND CURRENT ROW),
        last_hour AS (ORDER BY us RANGE BETWEEN 3599999999 PRECEDING AND CURRENT ROW)
) AS found"""
AUDIT = _AUDIT.format(number="number", gap="gap_us", whose="task")
# Of all tasks that share a budget; how many starts are not noted, their own audits tell.
AUDIT_SHARED = _AUDIT.format(number="NULL", gap="shared_gap_us", whose="shared")
_STARTS = f"""SELECT charged, number, worker, messages, ids, gap_us / 1e6, SUBSTR(shared, 8),
    shared_gap_us / 1e6, first_write, ended, changed, outcome
FROM aioworker_start
WHERE task = %(task)s AND charged >= SYSDATE(6) - INTERVAL {KEPT_DAYS} DAY
ORDER BY charged DESC LIMIT %(most)s"""
_CHANGES = f"""SELECT changed, who, what, why
FROM aioworker_change
WHERE task = %(task)s AND changed >= SYSDATE(6) - INTERVAL {KEPT_DAYS} DAY
ORDER BY changed DESC, id DESC LIMIT %(most)s"""


@dataclass(frozen=True, slots=True)
class Audit:
    """How the starts of a task, or of all that share a budget, kept its rate; times are UTC.

    Distances are in intervals of the rate that was in force at the later of two starts.

    Args:
        task: The task's name; None of a budget that tasks share.
        budget: That budget's name; None of a task.
        starts: How many there are.
        since: When the first of them was charged; None without any.
        until: When the last was.
        unfinished: How many have no end: the worker died, or lost the database, or runs still.
        missing: How many others were counted between them, by workers of an earlier version.
        least_charge: The least distance of two charges; None without two, or without a limit.
        least_write: The least distance of two first writes; None likewise.
        most_in_minute: The most starts in any minute.
        excess_in_minute: How many more than the rate allowed there, at the most: 0 or less is none.
        most_in_hour: The most starts in any hour.
        excess_in_hour: As for a minute.
    """

    task: str | None
    budget: str | None
    starts: int
    since: datetime | None = None
    until: datetime | None = None
    unfinished: int = 0
    missing: int = 0
    least_charge: float | None = None
    least_write: float | None = None
    most_in_minute: int = 0
    excess_in_minute: int = 0
    most_in_hour: int = 0
    excess_in_hour: int = 0

    @property
    def kept(self) -> bool:
        """Whether the rate was kept, as far as there are rows."""
        distances = [one for one in (self.least_charge, self.least_write) if one is not None]
        excess = max(self.excess_in_minute, self.excess_in_hour)
        return min(distances, default=1.0) >= 1 and excess <= 0

    def as_json(self) -> str:
        """Return it as one JSON object in one line; times are ISO 8601."""
        return as_json({**asdict(self), "kept": self.kept})


@dataclass(frozen=True, slots=True)
class Start:
    """A start; times are UTC.

    Args:
        task: The task's name.
        at: When it was charged.
        number: As the budget counts it.
        worker: By whom.
        messages: How many ran together.
        ids: How many ids or rows they were to write; None of a task without chunks.
        interval_seconds: Between two starts, by the task's rate in force; None without one.
        budget: The budget that it shared; None for none.
        budget_interval_seconds: By that budget's rate; None likewise.
        first_write: When it first wrote; None if it did not, by `ctx.transaction()`.
        ended: When its messages were settled; None if its worker died, or runs still.
        changed: Rows that it changed, as far as the task counts them.
        outcome: What its messages came to, `mixed` if that differs.
    """

    task: str
    at: datetime
    number: int
    worker: str
    messages: int
    ids: int | None
    interval_seconds: float | None
    budget: str | None
    budget_interval_seconds: float | None
    first_write: datetime | None
    ended: datetime | None
    changed: int | None
    outcome: str | None

    def as_json(self) -> str:
        """Return it as one JSON object in one line; times are ISO 8601."""
        return as_json({"kind": "start", **asdict(self)})


@dataclass(frozen=True, slots=True)
class Change:
    """What an operator changed at run time, or its end; times are UTC.

    Args:
        task: The task's name; `budget NAME` of a budget that tasks share.
        at: When.
        who: Who; `end` where the time was up that was set before.
        what: What, in words.
        why: Why; None if that was not said.
    """

    task: str
    at: datetime
    who: str
    what: str
    why: str | None

    def as_json(self) -> str:
        """Return it as one JSON object in one line; times are ISO 8601."""
        return as_json({"kind": "change", **asdict(self)})


async def audit(
    settings: Settings,
    names: Sequence[str],
    budget: str | None = None,
    seconds: int | None = None,
) -> list[Audit]:
    """Return how the tasks that are meant kept their rates, and the budgets that they share.

    Args:
        settings: The settings.
        names: The tasks' names; none for all that have a budget, and all that are shared.
        budget: The only budget that is meant; None for what *names* says.
        seconds: How far back; None for all that is kept.

    Raises:
        UsageError: There is no shared budget.
        DatabaseError: The rows cannot be read.
    """
    _expect_shared(settings)
    back = KEPT_DAYS * 86_400 if seconds is None else seconds
    async with settings.database(locks=False) as database:
        if budget is not None:
            keys = [await which_tasks.of_budgets(database, budget)]
        elif names:
            keys = await which_tasks.of_table(database, names)
        else:
            keys = await which_tasks.every_row(database)
        with tables.explaining(database):
            return [await _audit(database, key, back) for key in keys]


async def _audit(database: Database, key: str, seconds: int) -> Audit:
    budget = budget_name(key)
    task, statement = (key, AUDIT) if budget is None else (None, AUDIT_SHARED)
    [found] = await database.query(statement, {"key": key, "seconds": seconds})
    starts, since, until, unfinished, missing, charge, write, *windows = found
    if not starts:
        return Audit(task, budget, 0)
    return Audit(
        task,
        budget,
        starts,
        since,
        until,
        int(unfinished),
        int(missing),
        None if charge is None else float(charge),
        None if write is None else float(write),
        *(int(one) for one in windows),
    )


async def last(settings: Settings, names: Sequence[str], most: int) -> list[Start | Change]:
    """Return the last starts and changes of the tasks that are meant, the oldest first.

    Args:
        settings: The settings.
        names: The tasks' names; none for all that have a budget, and the budgets that they share.
            What was changed in a budget that a named task shares is among its changes.
        most: How many.

    Raises:
        UsageError: There is no shared budget.
        DatabaseError: The rows cannot be read.
    """
    _expect_shared(settings)
    found: list[Start | Change] = []
    async with settings.database(locks=False) as database:
        if names:
            keys = await which_tasks.of_table(database, names)
            with tables.explaining(database):
                budgets = {(await tables.read(database, key)).shares for key in keys}
            keys += [budget_key(name) for name in sorted(filter(None, budgets))]
        else:
            keys = await which_tasks.every_row(database)
        with tables.explaining(database):
            for key in keys:
                asked = {"task": key, "most": most}
                found += [Start(key, *_start(row)) for row in await database.query(_STARTS, asked)]
                found += [Change(shown(key), *row) for row in await database.query(_CHANGES, asked)]
    return sorted(found, key=attrgetter("at"))[-most:]


def _start(row: Sequence[Any]) -> list[Any]:
    """Return what a start consists of behind its task's name."""
    values = list(row)
    for place in (5, 7):
        values[place] = None if values[place] is None else float(values[place])
    return values


def _expect_shared(settings: Settings) -> None:
    if settings.budget != "shared":
        raise UsageError("AIOWORKER_BUDGET=worker: starts are noted nowhere")
