"""What `init` makes, once: the budget's tables and the queues; or shows, with `--print`."""

from __future__ import annotations

import asyncio
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any

from aioworker import repo
from aioworker.addresses import BrokerAddress, DatabaseAddress
from aioworker.budget import fresh, grants, schema, tables
from aioworker.budget.pace import budget_key
from aioworker.errors import AioworkerError, BrokerError, DatabaseError, UsageError
from aioworker.rabbitmq.connection import Connection, connected
from aioworker.rabbitmq.queues import (
    SAFE_AFTER_SECONDS,
    Queues,
    compare,
    declare,
    wait_until_safe,
)
from aioworker.settings import Settings
from aioworker.tasks.task import AnyTask
from aioworker.words import command, count

_LACKING = "# MySQL: what users lack that work already"
# Seconds for each use of the database: the time of a task, 1 s perhaps, is none to wait for a lock.
DATABASE_SECONDS = 60.0
_PUBLISH = r"^amq\.default$"  # the right to write to the default exchange
_REACHES = "it reaches every queue of the virtual host"


POLICIES = (
    "a policy such as delivery-limit, max-length, message-ttl or expires takes messages away from"
    " these queues, unseen by aioworker: `rabbitmqctl list_policies` shows it, docs/operations.md"
    " what it does"
)


async def init(
    settings: Settings,
    tasks: Sequence[AnyTask],
    say: Callable[[str], None],
    note: Callable[[str], None],
    *,
    forget: bool = False,
) -> None:
    """Make the budget's tables, declare the tasks' queues and wait until they are safe.

    What is there is compared first: if a queue differs, nothing is changed; if a table may not
    be made, or changed, no queue is declared.

    Args:
        settings: The settings.
        tasks: Whose queues are declared.
        say: Prints what became of each table and queue, at once: what comes next may fail.
        note: Prints what a silence is for.
        forget: Whether to forget what is in the tables, unless a worker is alive there.

    Raises:
        DatabaseError: The database cannot be used, or others hold a lock on a table, or work.
        BrokerError: RabbitMQ cannot be used, or a queue differs.
    """
    timeout = settings.connect_timeout
    queues = _arguments(settings, tasks)
    async with AsyncExitStack() as stack:
        database = None
        if settings.budget == "shared":
            database = await stack.enter_async_context(settings.database(DATABASE_SECONDS))
        connection = await stack.enter_async_context(
            connected(settings.nodes(), timeout, "aioworker init")
        )
        found = await compare(connection, queues, timeout)
        if database is not None:
            await tables.refuse_reader(database)
            if forget:  # before anything is changed
                await fresh.refuse_workers(database)
            with tables.explaining(database):
                for table in schema.NAMES:
                    became = await schema.settle(database, table, note)
                    say(f"table {table}: {became}")
                for grant in await grants.lacking(database):
                    say(f"lacking: {grant}")
        await _declare(connection, queues, found, timeout, say)
        if database is not None:  # last: a row lets its task start
            if forget:
                say(await fresh.forget(database, _keys(tasks)))
            else:
                await tables.add_rows(database, _keys(tasks))
        # Also when they were there: another init may have made them a moment ago.
        note(POLICIES)
        note(f"waiting {SAFE_AFTER_SECONDS:g} s until the queues are safe")
        await wait_until_safe(connection, queues, timeout)


def refuse_forgetting(settings: Settings, names: Sequence[str]) -> None:
    """See that there is something to forget, and that it is not one task's alone.

    Raises:
        UsageError: There is not, or it is.
    """
    if settings.budget != "shared":
        raise UsageError(
            "AIOWORKER_BUDGET=worker: each worker keeps its own budget, and there is nothing to"
            f" forget; run `{command('init')}`"
        )
    if names:
        raise UsageError(
            "expected --fresh without a task, since it forgets what is known of all tasks of the"
            f" database, got: {' '.join(names)}"
        )


def _keys(tasks: Sequence[AnyTask]) -> list[str]:
    """Return the keys of the budget's rows: of each task, and of each budget that they share."""
    shared = [task.options.budget for task in tasks]
    names = dict.fromkeys(one.name for one in shared if one is not None)
    return [*(task.name for task in tasks), *map(budget_key, names)]


def _arguments(settings: Settings, tasks: Sequence[AnyTask]) -> dict[str, dict[str, Any]]:
    """Return the arguments of each queue of all tasks."""
    found: dict[str, dict[str, Any]] = {}
    for task in tasks:
        queues = Queues.of(task.name, settings.queue_prefix)
        found |= queues.arguments(settings.queue_type)
    return found


async def _declare(
    connection: Connection,
    queues: Mapping[str, dict[str, Any]],
    found: Mapping[str, int | None],
    timeout: float,
    say: Callable[[str], None],
) -> None:
    """Declare the queues that are not there.

    Args:
        connection: To RabbitMQ.
        queues: The arguments of each.
        found: How many messages RabbitMQ counts in each, None for a queue that is not there.
        timeout: Seconds for each.
        say: Prints what became of each.

    Raises:
        BrokerError: A queue cannot be declared; a note names those that were.
    """
    declared: list[str] = []
    try:
        for name, waiting in found.items():
            if waiting is None:
                await declare(connection, name, queues[name], timeout)
                declared.append(name)
                say(f"queue {name}: declared")
            else:
                say(f"queue {name}: was there, RabbitMQ counts {count(waiting, 'message')}")
    except (BrokerError, asyncio.CancelledError) as error:
        if declared:
            error.add_note(f"declared before that: {', '.join(declared)}")
        raise


async def plan(settings: Settings, tasks: Sequence[AnyTask], *, forget: bool = False) -> str:
    """Return what `init` does, and the least that the worker's users need, as commands.

    It needs no server. What `init` would change in tables that are there, the database tells.

    Args:
        settings: The settings.
        tasks: Whose queues and rows are made.
        forget: As for `init`.
    """
    amqp, mysql = settings.amqp_url[0], settings.mysql_url
    queues = _arguments(settings, tasks)
    ours = rf"^{settings.queue_prefix}\."
    main_job = any(task.name == repo.TASK for task in tasks)
    others = any(task.name != repo.TASK for task in tasks)
    needed = [*repo.PRIVILEGES] if main_job else []
    made: list[str] = []
    if settings.budget == "shared":
        needed += grants.PRIVILEGES
        made = [*_creating(tasks), *await _changing(settings)]
        made += _forgetting(tasks) if forget else []
    lines = [
        *made,
        "# RabbitMQ: the queues that init declares, durable, on the default exchange",
        *(f"queue {name} {json.dumps(arguments)}" for name, arguments in queues.items()),
    ]
    for who, *rights in (
        ("init needs", ours, _PUBLISH, ours),
        ("consume and dead needs", "", _PUBLISH, ours),
        (f"publish, publish-all and Producer needs; {_REACHES}", "", _PUBLISH, ""),
        ("status needs", "", "", ours),
    ):
        lines += ["", f"# RabbitMQ: the least that the user of {who}", _permit(amqp, *rights)]
    lines += [
        "",
        "# MySQL: the least that the user of consume and publish-all needs",
        *_granting(mysql, needed),
        *(["# and what the tasks themselves read and write"] if others else []),
    ]
    if settings.mysql_read_url is not None:
        reads = [one for one in repo.PRIVILEGES if one[0] == "SELECT"] if main_job else []
        lines += [
            "",
            "# MySQL: the least that the user of AIOWORKER_MYSQL_READ_URL needs",
            *_granting(settings.mysql_read_url, reads),
            *(["# and what the tasks' keys and needed read"] if others else []),
        ]
    if main_job:
        lines += [
            "",
            "# MySQL: the statements of publish-all and consume; %s are ids and page sizes",
            *(f"{statement};" for statement in (repo.PAGE, repo.STALE, repo.WRITE)),
        ]
    return "\n".join(lines)


def _granting(address: DatabaseAddress, needed: Sequence[tuple[str, str]]) -> list[str]:
    """Return the statements that give an address's user privileges on tables."""
    return [
        f"GRANT {privilege} ON {grants.qualified(address.database, table)}"
        f" TO {grants.text(address.user)}@'%';"
        for privilege, table in needed
    ]


def _creating(tasks: Sequence[AnyTask]) -> list[str]:
    """Return the statements that make what is not there."""
    rows = [tables.FIRST_ROW % {"task": grants.text(key)} for key in _keys(tasks)]
    return [
        "# MySQL: the tables that init makes; its user needs CREATE beside what follows",
        *(f"{statement};" for statement in (*schema.STATEMENTS.values(), *rows)),
        "",
    ]


def _forgetting(tasks: Sequence[AnyTask]) -> list[str]:
    """Return the statements that forget what is in the tables."""
    statements = fresh.statements([grants.text(key) for key in _keys(tasks)])
    return [
        "# MySQL: how init --fresh forgets, of all tasks of the database, unless a worker is alive",
        *(f"{statement};" for statement in statements),
        "",
    ]


async def _changing(settings: Settings) -> list[str]:
    """Return the statements that change what is there, or why nobody can tell."""
    try:
        async with settings.database(check=False, locks=False) as database:
            with tables.explaining(database):
                changes = await schema.changes(database)
                lacking = await grants.lacking(database)
    except AioworkerError as error:
        return [f"# MySQL: what init would change in tables that are there is unknown: {error}", ""]
    lines = []
    if changes:
        lines = [
            "# MySQL: the tables that init changes, while workers run; its user needs ALTER",
            *(f"{statement};" for statement in changes.values()),
            "",
        ]
    if lacking:
        lines += [_LACKING, *lacking, ""]
    return lines


async def refuse_older_tables(settings: Settings) -> None:
    """See that no table waits for `init`; a database that is away says nothing against it.

    Raises:
        DatabaseError: One does.
    """
    if settings.budget != "shared":
        return
    try:
        async with settings.database(locks=False) as database:
            with tables.explaining(database):
                older = await schema.older(database)
    except DatabaseError:
        return
    if older:
        raise DatabaseError(older)


def _permit(amqp: BrokerAddress, configure: str, write: str, read: str) -> str:
    """Return the command that gives a user these rights and no others, for a shell."""
    rights = (amqp.user, configure, write, read)
    return shlex.join(["rabbitmqctl", "set_permissions", "-p", amqp.vhost, *rights])
