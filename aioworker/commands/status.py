"""What `aioworker status` shows: queues, budget, workers, and why a task waits now.

It asks the database, which also tells which tasks are there, and RabbitMQ, and tells of either
when the other is away.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from typing import NamedTuple

from aioworker.budget import history, tables
from aioworker.budget.pace import budget_key
from aioworker.budget.tables import Row, find_row, holder
from aioworker.clock import own_time
from aioworker.commands import which_tasks
from aioworker.commands.controls import rate_in_force, shown
from aioworker.commands.publish import count_all
from aioworker.errors import BrokerError, DatabaseError, QueueMissingError, TaskError, UsageError
from aioworker.limits import InForce, Interval, Source
from aioworker.mysql.database import TOLD_SECONDS, Database
from aioworker.rabbitmq.connection import Connection, connected
from aioworker.rabbitmq.dead_letters import DeadLetters, count_letters
from aioworker.rabbitmq.errors import forbids
from aioworker.rabbitmq.publisher import Publisher
from aioworker.rabbitmq.queues import Queues, count_surely
from aioworker.reasons import Reason, ReasonKind
from aioworker.settings import Settings
from aioworker.status.presence import kind_of
from aioworker.status.read import Worker, workers
from aioworker.status.waiting import Lane, Waiting
from aioworker.tasks.task import AnyTask
from aioworker.words import as_json, command, duration

_EMPTY = Reason(ReasonKind.EMPTY, "nothing queued")
# In its place, where RabbitMQ does not answer: what a worker saw last may have changed since.
_UNSURE = Reason(ReasonKind.UNKNOWN, "RabbitMQ cannot be asked whether messages wait")


@dataclass(frozen=True, slots=True)
class Queued:
    """Messages in each queue; None where a queue is missing."""

    urgent: int | None
    bulk: int | None
    retry: int | None
    dead: int | None


@dataclass(frozen=True, slots=True)
class Oldest:
    """How old the oldest message is at most, by the last one that a worker took; in seconds.

    None where a lane is empty, or no worker that is alive has taken anything from it.

    Args:
        urgent_seconds: In the urgent lane, but for messages that came back.
        bulk_seconds: In the bulk lane, likewise.
        came_back_seconds: Of the messages that workers have put back, in the retry queue too.
    """

    urgent_seconds: float | None = None
    bulk_seconds: float | None = None
    came_back_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Limit:
    """The rate limit in force and the starts under it; times are UTC.

    Args:
        scope: `shared` or `worker`, whose starts are counted.
        rate: The rate limit, such as `2/m`; `none` is no limit, `unknown` each worker's own.
        source: Where it comes from: `run time`; `setting`, this machine's; `task`, the task's
            own; `workers`, what they say of themselves; or `unknown`: no worker runs, or they
            differ, and the task's module is not read here.
        interval_seconds: Between two starts; None without a limit, or where it is unknown.
        paused: Whether no start may begin.
        pause: Why, in words; empty if one may.
        paused_by: Who paused it last, or ended a pause.
        paused_at: When.
        paused_why: Why.
        paused_until: When the pause ends; None for never.
        paused_until_seconds: Seconds until then.
        set_by: Who set the rate at run time last, or took it back.
        set_at: When.
        set_why: Why.
        set_until: When that ends; None for never.
        set_until_seconds: Seconds until then.
        rates_differ: Whether the workers' own rates do.
        starts: Starts charged ever.
        last_start: When the last one was charged; None before the first.
        last_worker: By whom.
        next_start: When the next one may begin, by the last charge; None when that has passed, or
            none may begin at all. A worker may wait longer: its first write is due later.
        next_start_seconds: Seconds until then.
        turn: Who holds the turn; None for nobody.
        shares: The budget that it shares with other tasks, by its name; None for none.
        shares_pause: Who paused that budget, when and why; empty if nobody did.
    """

    scope: str
    rate: str
    source: str
    interval_seconds: float | None
    paused: bool
    rates_differ: bool
    pause: str = ""
    paused_by: str | None = None
    paused_at: datetime | None = None
    paused_why: str | None = None
    paused_until: datetime | None = None
    paused_until_seconds: float | None = None
    set_by: str | None = None
    set_at: datetime | None = None
    set_why: str | None = None
    set_until: datetime | None = None
    set_until_seconds: float | None = None
    starts: int | None = None
    last_start: datetime | None = None
    last_worker: str | None = None
    next_start: datetime | None = None
    next_start_seconds: float | None = None
    turn: str | None = None
    shares: str | None = None
    shares_pause: str = ""


@dataclass(frozen=True, slots=True)
class Status:
    """All that is known of a task at one moment.

    Args:
        task: The task's name.
        at: The moment, UTC, by the database's clock, or this machine's if that cannot be asked.
        clock_ahead_seconds: How far this machine's clock is ahead of the database's; None when
            that cannot be asked.
        waits: Why it waits now, or that it runs.
        waits_kind: The same in a word, for programs.
        queued: What is in its queues; None when RabbitMQ cannot be asked.
        held: Messages in workers' hands besides, by their own last word; None when one of them
            does not tell, or the database cannot be asked.
        oldest: How old the oldest that is queued is at most; None when that cannot be asked.
        backlog_seconds: How long it takes at this rate, with a start for each message in the lanes
            and one for what workers hold; None when nobody can tell.
        budget: Its rate limit; None when the database cannot be asked.
        workers: Who works on it; None when the database cannot be asked.
        stale: How many ids or rows of a sweep need writing; None unless that was asked.
        broker_error: Why RabbitMQ, or one of the task's queues, cannot be asked; None when all can.
        database_error: Why the database cannot be asked; None when it can.
        stale_error: Why nobody can tell what needs writing; None when it is told, or was not asked.
    """

    task: str
    at: datetime
    clock_ahead_seconds: float | None
    waits: str
    waits_kind: ReasonKind
    queued: Queued | None
    held: int | None
    oldest: Oldest | None
    backlog_seconds: float | None
    budget: Limit | None
    workers: list[Worker] | None
    stale: int | None
    broker_error: str | None
    database_error: str | None
    stale_error: str | None

    @property
    def complete(self) -> bool:
        """Whether all could be asked."""
        return self.broker_error is self.database_error is self.stale_error is None

    def as_json(self) -> str:
        """Return it as one JSON object in one line; times are ISO 8601."""
        return as_json(asdict(self))


@dataclass(frozen=True, slots=True)
class SharedStatus:
    """All that is known of a budget that tasks share.

    Args:
        budget: Its name.
        at: The moment, UTC, by the database's clock.
        tasks: Those whose workers share it.
        limit: Its rate limit, and the starts under it.
    """

    budget: str
    at: datetime
    tasks: list[str]
    limit: Limit

    def as_json(self) -> str:
        """Return it as one JSON object in one line; times are ISO 8601."""
        return as_json(asdict(self))


class Stored(NamedTuple):
    """What the database tells of a task; nothing where it cannot be asked.

    Args:
        row: Its row; None where there is none.
        turn: Who holds the turn; None for nobody.
        workers: Its workers, as their rows have them.
        ahead: Seconds by which this machine's clock is ahead of the database's.
        shared: The row of the budget that it shares; None without one.
    """

    row: Row | None = None
    turn: str | None = None
    workers: list[Worker] | None = None
    ahead: float | None = None
    shared: Row | None = None

    @property
    def shared_pause(self) -> str:
        """Who paused the budget that it shares; empty if nobody did, or it shares none."""
        pause = "" if self.shared is None else self.shared.pause
        return f"{shown(self.shared.task)}: {pause}" if self.shared and pause else ""

    @property
    def rates(self) -> set[str]:
        """The rates that its workers have of their own."""
        return {one.rate or "none" for one in self.alive}

    @property
    def told(self) -> list[Waiting]:
        """What those tell of the messages that wait."""
        return [one.waiting for one in self.alive if one.waiting is not None]

    @property
    def held(self) -> int | None:
        """How many messages they hold; None where one of them does not tell."""
        if self.workers is None or len(self.told) < len(self.alive):
            return None
        return sum(one.held for one in self.told)

    def age(self, since: datetime | None) -> float | None:
        """Return how long ago a moment was, in seconds; None for none."""
        if since is None or self.row is None:
            return None
        # By two clocks: the publisher's may be ahead.
        return max((self.row.now - since).total_seconds(), 0.0)

    @property
    def alive(self) -> list[Worker]:
        """Its workers that were seen lately."""
        return [one for one in self.workers or [] if one.alive]


# The tasks that are meant, what the database has of each, and why nothing is known of it.
_Database = tuple[list[str], dict[str, Stored], DatabaseError | None]
# What RabbitMQ tells of each task, or why not; and why it tells nothing of the others.
_Broker = tuple[dict[str, Queued | BrokerError], BrokerError | None]


async def look(
    settings: Settings,
    names: Sequence[str],
    before: Sequence[str] = (),
    counted: Sequence[AnyTask] = (),
) -> list[Status]:
    """Ask both servers about the tasks that are meant.

    Args:
        settings: The settings.
        names: The tasks' names; none for all.
        before: Those of the last look, for a database that is away now.
        counted: The tasks whose stale rows are counted: all that they sweep is read.

    Raises:
        UnknownTaskError: A name is unknown.
        AioworkerError: No task is there, or nobody can tell which are.
    """
    # First: it may take minutes, and the rest is to tell of one moment.
    stale = {task.name: await _stale(settings, task) for task in counted}
    asking = asyncio.create_task(_ask_database(settings, names, before))
    try:
        answers, unreachable = await _ask_broker(settings, asking)
        tasks, stored, database_error = await asking
    finally:
        asking.cancel()
    found = []
    for name in tasks:
        of_task = stored.get(name, Stored())
        force = rate_in_force(settings, name, of_task.row, of_task.rates)
        limit = database_error or _limit(settings.budget, force, of_task)
        budget = None if isinstance(limit, DatabaseError) else limit
        queues = Queues.of(name, settings.queue_prefix)
        answer = unreachable or answers[name]
        broker_error = answer if isinstance(answer, BrokerError) else None
        queued = answer if isinstance(answer, Queued) else None
        pause = force.pause or of_task.shared_pause
        waits = why(name, queues, answer, limit, pause, of_task)
        rows, stale_error = stale.get(name, (None, None))
        found.append(
            Status(
                task=name,
                at=of_task.row.now if of_task.row else own_time(),
                clock_ahead_seconds=of_task.ahead,
                waits=waits.words,
                waits_kind=waits.kind,
                queued=queued,
                held=of_task.held,
                oldest=None if queued is None or of_task.row is None else oldest(queued, of_task),
                backlog_seconds=_backlog_seconds(queued, of_task.held, budget),
                budget=budget,
                workers=of_task.workers if broker_error is None else _unsure(of_task.workers),
                stale=rows,
                broker_error=None if broker_error is None else str(broker_error),
                database_error=None if database_error is None else str(database_error),
                stale_error=stale_error,
            )
        )
    return found


async def _stale(settings: Settings, task: AnyTask) -> tuple[int | None, str | None]:
    """Return how much of a task's sweep needs writing, or why nobody can tell."""
    try:
        return (await count_all(settings, task, after=0, only_needed=True)).ids, None
    except (DatabaseError, TaskError) as error:
        return None, str(error)


def _unsure(workers: list[Worker] | None) -> list[Worker] | None:
    """Return workers by whose words nobody can take the queues to be empty now."""
    return workers and [
        replace(one, kind=_UNSURE.kind, reason=_UNSURE.words)
        if one.kind is ReasonKind.EMPTY
        else one
        for one in workers
    ]


def oldest(queued: Queued, stored: Stored) -> Oldest:
    """Return how old the oldest messages are at most, by what the workers tell that are alive."""
    urgent, urgent_back = _since([one.urgent for one in stored.told], queued.urgent)
    bulk, bulk_back = _since([one.bulk for one in stored.told], queued.bulk, queued.retry)
    back = [one for one in (urgent_back, bulk_back) if one is not None]
    return Oldest(*(stored.age(one) for one in (urgent, bulk, min(back, default=None))))


def _since(
    lanes: Sequence[Lane], messages: int | None, retries: int | None = 0
) -> tuple[datetime | None, datetime | None]:
    """Return since when messages of a lane wait at most, and those of them that came back.

    Args:
        lanes: What each worker tells of it.
        messages: How many wait there.
        retries: How many wait to come back to it.
    """
    # Each has seen all before its own last one taken, whoever took it.
    since = max((one.since for one in lanes if one.since is not None), default=None)
    back = [
        one.back
        for one in lanes
        if one.back and one.until and not (since is not None and since >= one.until)
    ]
    return since if messages else None, min(back, default=None) if messages or retries else None


def _backlog_seconds(queued: Queued | None, held: int | None, limit: Limit | None) -> float | None:
    # How much of a budget's rate other tasks take, nobody knows.
    reckoned = limit is not None and not limit.paused and limit.shares is None
    interval = limit.interval_seconds if limit and reckoned else None
    if queued is None or interval is None:
        return None
    return ((queued.urgent or 0) + (queued.bulk or 0) + bool(held)) * interval


async def _ask_broker(settings: Settings, database: Awaitable[_Database]) -> _Broker:
    """Connect while *database* finds out which tasks are meant; then ask for their queues."""
    nodes, timeout, own = settings.nodes(), settings.connect_timeout, "aioworker status"
    users = {node.user for node in nodes}
    try:
        async with (
            connected(nodes, timeout, own) as connection,
            Publisher(nodes, timeout, own) as publisher,
        ):
            tasks, _stored, _error = await database

            def of(task: str) -> DeadLetters:
                queues = Queues.of(task, settings.queue_prefix)
                return DeadLetters(queues, users, connection, publisher, timeout)

            # At once: of many queues that do not answer, each takes as long as the timeout.
            answers = await asyncio.gather(*(_queued(connection, of(t), timeout) for t in tasks))
            errors = [one for one in answers if isinstance(one, BrokerError) and one.unreachable]
            if errors and len(errors) == len(answers):
                raise errors[0]  # to be told with the node
            return dict(zip(tasks, answers, strict=True)), None
    except BrokerError as error:
        return {}, error


async def _queued(
    connection: Connection, look: DeadLetters, timeout: float
) -> Queued | BrokerError:
    """Return what is in a task's queues, or why one of them cannot be asked."""
    names = (look.queues.urgent, look.queues.bulk, look.queues.retry)
    try:
        numbers = [await count_surely(connection, name, timeout) for name in names]
        return Queued(*[*numbers, await count_letters(look)])
    except BrokerError as error:
        return error


async def _ask_database(
    settings: Settings, names: Sequence[str], before: Sequence[str]
) -> _Database:
    """Return the tasks that are meant, and what the database tells of each."""
    if settings.budget != "shared":
        return list(names), {}, None
    try:
        async with settings.database(locks=False) as database:
            tasks = await which_tasks.of_table(database, names)
            with tables.explaining(database):
                return tasks, {name: await _stored(database, name) for name in tasks}, None
    except DatabaseError as error:
        return which_tasks.untold(settings, names or before, error), {}, error


async def _stored(database: Database, name: str) -> Stored:
    row = await find_row(database, name)
    ahead = None if row is None else (own_time() - row.now).total_seconds()
    turn = await holder(database, row.turn if row else 0)
    shares = None if row is None or row.shares is None else budget_key(row.shares)
    shared = None if shares is None else await find_row(database, shares)
    return Stored(row, turn and turn.name, await workers(database, name), ahead, shared)


async def look_at_budget(settings: Settings, name: str) -> SharedStatus:
    """Ask the database about a budget that tasks share.

    Raises:
        UnknownTaskError: There is none of that name.
        DatabaseError: It cannot be asked.
        UsageError: The budget is each worker's own.
    """
    if settings.budget != "shared":
        raise UsageError("AIOWORKER_BUDGET=worker: no budget is shared")
    async with settings.database(locks=False) as database:
        key = await which_tasks.of_budgets(database, name)
        with tables.explaining(database):
            stored = await _stored(database, key)
            tasks = await tables.sharing(database, name)
            row = await tables.read(database, key)
            last = await database.query(history.LAST_GAP, {"key": key, "set_at": row.set_at})
    force = rate_in_force(settings, key, row, set())
    if force.source is Source.UNKNOWN and last and last[0][0]:  # only the tasks' code names it
        force = force._replace(limit=Interval(last[0][0]), source=Source.WORKERS)
    return SharedStatus(name, row.now, tasks, _limit(settings.budget, force, stored))


def _limit(scope: str, force: InForce, stored: Stored) -> Limit:
    """Return the rate limit in force, and the starts under it."""
    row, interval, differ = stored.row, force.interval, len(stored.rates) > 1
    limit = Limit(scope, force.rate, force.source, interval, force.paused, differ, force.pause)
    if row is None:
        return limit
    ahead = 0.0 if interval is None else interval - row.charge_age_us / 1e6
    waiting = ahead > 0 and not force.paused and not stored.shared_pause
    return replace(
        limit,
        paused_by=row.paused_by,
        paused_at=row.paused_at,
        paused_why=row.paused_why,
        paused_until=row.paused_until,
        paused_until_seconds=row.seconds_until(row.paused_until),
        set_by=row.set_by,
        set_at=row.set_at,
        set_why=row.set_why,
        set_until=row.set_until,
        set_until_seconds=row.seconds_until(row.set_until),
        starts=row.starts,
        last_start=row.charged_at if row.starts else None,
        last_worker=row.holder,
        next_start=row.charged_at + timedelta(seconds=interval or 0) if waiting else None,
        next_start_seconds=ahead if waiting else None,
        turn=stored.turn,
        shares=row.shares,
        shares_pause=stored.shared_pause,
    )


def why(
    task: str,
    queues: Queues,
    queued: Queued | BrokerError,
    limit: Limit | DatabaseError,
    pause: str,
    stored: Stored,
) -> Reason:
    """Return why a task waits now, the first reason that holds.

    Args:
        task: The task.
        queues: Its queues.
        queued: What is in them, or why they cannot be asked.
        limit: Its rate limit, or why the database cannot be asked.
        pause: Why no start may begin at all; empty if one may.
        stored: What the database tells.
    """
    row = stored.row
    alive = [one for one in stored.workers or [] if one.alive or one.name == stored.turn]
    if isinstance(queued, BrokerError):
        return _why_unasked(queued, alive)
    if isinstance(limit, DatabaseError):
        away = "database unreachable: " if limit.unreachable else ""
        return Reason(kind_of(limit), f"{away}{limit}")
    for name, messages in asdict(queued).items():
        if messages is None:
            gone = QueueMissingError.of(getattr(queues, name), "" if row is None else task)
            return Reason(kind_of(gone), str(gone))
    if pause:
        return Reason(ReasonKind.PAUSED, pause)
    if not queued.urgent and not queued.bulk:
        held = (one.why for one in alive if one.stalled or _gathers(one, limit))
        return next(held, _EMPTY)
    return _why_workers_wait(task, limit, alive, row)


def _why_unasked(error: BrokerError, alive: list[Worker]) -> Reason:
    """Return why RabbitMQ cannot be asked: a worker knows since when it is away."""
    if forbids(error):
        return Reason(ReasonKind.BROKER_REFUSES, str(error))
    away = Reason(ReasonKind.BROKER_UNREACHABLE, f"broker unreachable: {error}")
    return next((one.why for one in alive if one.kind is away.kind), away)


def _why_workers_wait(task: str, limit: Limit, alive: list[Worker], row: Row | None) -> Reason:
    if limit.scope != "shared":
        return Reason(ReasonKind.BUDGET, "each worker for its own budget")
    if not alive:
        words = f"no worker is running: start one with `{command('consume')}`"
        return Reason(ReasonKind.NO_WORKER, words)
    # Where starts are limited, only who has the turn can run: another one was killed in it.
    limited = limit.rate != "none"
    for one in alive:
        # A run that began a moment after its worker wrote that it waits is in the budget's row.
        charged = row is not None and (row.runs or row.running) and row.holder == one.name
        if (one.runs or charged) and (not limited or one.name == limit.turn):
            doing = one.reason if one.runs else task
            words = f"running: {doing}{_until_first_write(limit, row)}"
            return Reason(ReasonKind.RUNNING, words)
    for one in alive:
        if one.fails or _gathers(one, limit):
            return one.why
    return _why_not_begun(limit, min(alive, key=lambda one: one.seen_seconds), row)


def _why_not_begun(limit: Limit, last: Worker, row: Row | None) -> Reason:
    """Return why no start is under way, though workers are well.

    Args:
        limit: The rate limit.
        last: The worker that was seen last.
        row: The task's row.
    """
    if row is not None and row.shares is not None and last.kind is not ReasonKind.RUNNING:
        return last.why  # which of two limits is waited for, it knows
    if limit.next_start_seconds is not None:
        words = f"budget: next start in {duration(limit.next_start_seconds)}"
        return Reason(ReasonKind.BUDGET, words)
    if limit.turn is not None:
        return Reason(ReasonKind.TURN, f"turn: held by {limit.turn}")
    if last.kind.timed and _may_wait_for_first_write(limit, row):
        return last.why
    # Whoever waits has not seen that yet: its row tells what it waited for before.
    seen = duration(max(last.seen_seconds, 0))
    words = f"a start is due and not begun; {last.name} was last seen {seen} ago"
    return Reason(ReasonKind.DUE, words)


def _gathers(worker: Worker, limit: Limit) -> bool:
    """Whether a worker holds messages for the next start."""
    return worker.kind is ReasonKind.GATHERING and worker.name == limit.turn


def _may_wait_for_first_write(limit: Limit, row: Row | None) -> bool:
    """Whether a start now might write too soon after the last first write.

    How much sooner than its write a run is to start, each worker measures for itself.
    """
    if row is None or limit.interval_seconds is None:
        return True
    return row.write_age_us / 1e6 < limit.interval_seconds


def _until_first_write(limit: Limit, row: Row | None) -> str:
    """Return when a run that has written nothing may, where that is worth a word."""
    if row is None or limit.interval_seconds is None or row.write_age_us < row.charge_age_us:
        return ""
    ahead = limit.interval_seconds - row.write_age_us / 1e6
    return f"; its first write is due in {duration(ahead)}" if ahead >= TOLD_SECONDS else ""
