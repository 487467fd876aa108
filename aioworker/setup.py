"""What `init` makes, once: the budget's tables and the queues; or shows, with `--print`."""

from __future__ import annotations

import asyncio
import json
import shlex
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from aioworker import broker, repo, schema, tables, topology
from aioworker.console import count, say, tell
from aioworker.errors import BrokerError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from aio_pika.abc import AbstractConnection

    from aioworker.addresses import BrokerAddress
    from aioworker.settings import Settings
    from aioworker.task import AnyTask

POLICIES = (
    "a policy such as delivery-limit, max-length, message-ttl or expires takes messages away from"
    " these queues, unseen by aioworker: `rabbitmqctl list_policies` shows it, docs/operations.md"
    " what it does"
)
_PUBLISH = r"^amq\.default$"  # the right to write to the default exchange


async def init(settings: Settings, tasks: Sequence[AnyTask]) -> None:
    """Make the budget's tables, declare the tasks' queues and wait until they are safe.

    What is there is compared first: if a queue differs, nothing is changed; if a table may not
    be made, or changed, no queue is declared.

    Raises:
        DatabaseError: The database cannot be used, or others hold a lock on a table.
        BrokerError: RabbitMQ cannot be used, or a queue differs.
    """
    timeout = settings.connect_timeout
    queues = _arguments(settings, tasks)
    async with AsyncExitStack() as stack:
        database = None
        if settings.budget == "shared":
            database = await stack.enter_async_context(settings.database())
        connection = await stack.enter_async_context(
            broker.connection(settings.nodes(), timeout, "aioworker init")
        )
        found = await topology.compare(connection, queues, timeout)
        if database is not None:
            for name in schema.NAMES:
                with tables.explaining(database):
                    say(f"table {name}: {await schema.settle(database, name)}")
        await _declare(connection, queues, found, timeout)
        if database is not None:  # last: a row lets its task start
            await tables.add_rows(database, [task.name for task in tasks])
        tell(POLICIES)
        # Also when they were there: another init may have made them a moment ago.
        tell(f"waiting {topology.SAFE_AFTER_SECONDS:g} s until the queues are safe")
        await topology.wait_until_safe(connection, queues, timeout)


def _arguments(settings: Settings, tasks: Sequence[AnyTask]) -> dict[str, dict[str, Any]]:
    """Return the arguments of each queue of all tasks."""
    found: dict[str, dict[str, Any]] = {}
    for task in tasks:
        queues = topology.Queues.of(task.name, settings.queue_prefix)
        found |= queues.arguments(settings.queue_type)
    return found


async def _declare(
    connection: AbstractConnection,
    queues: Mapping[str, dict[str, Any]],
    found: Mapping[str, int | None],
    timeout: float,
) -> None:
    """Declare the queues that are not there, and say what became of each.

    Args:
        connection: To RabbitMQ.
        queues: The arguments of each.
        found: How many messages wait in each, None for a queue that is not there.
        timeout: Seconds for each.

    Raises:
        BrokerError: A queue cannot be declared; a note names those that were.
    """
    declared: list[str] = []
    try:
        for name, waiting in found.items():
            if waiting is not None:
                say(f"queue {name}: was there, {count(waiting, 'message')}")
                continue
            await topology.declare(connection, name, queues[name], timeout)
            declared.append(name)
            say(f"queue {name}: declared")
    except (BrokerError, asyncio.CancelledError) as error:
        if declared:
            error.add_note(f"declared before that: {', '.join(declared)}")
        raise


def setup_text(settings: Settings, tasks: Sequence[AnyTask]) -> str:
    """Return what `init` declares, and the least that the worker's users need, as commands."""
    amqp, mysql = settings.amqp_url[0], settings.mysql_url
    queues = _arguments(settings, tasks)
    ours = rf"{settings.queue_prefix}\."
    main_job = any(task.name == repo.TASK for task in tasks)
    needed = [*repo.PRIVILEGES] if main_job else []
    made: list[str] = []
    if settings.budget == "shared":
        needed += tables.PRIVILEGES
        rows = [tables.FIRST_ROW % {"task": _sql_text(task.name)} for task in tasks]
        made = [
            "# MySQL: the tables that init makes; its user needs CREATE beside what follows",
            *(f"{statement};" for statement in (schema.BUDGET, schema.WORKER, *rows)),
            "",
        ]
    database = "`{}`".format(mysql.database.replace("`", "``"))
    grants = [
        f"GRANT {privilege} ON {database}.`{table}` TO {_sql_text(mysql.user)}@'%';"
        for privilege, table in needed
    ]
    lines = [
        *made,
        "# RabbitMQ: the queues that init declares, durable, on the default exchange",
        *(f"queue {name} {json.dumps(arguments)}" for name, arguments in queues.items()),
        "",
        "# RabbitMQ: the least that the user of init needs",
        _permit(amqp, f"^{ours}", _PUBLISH, f"^{ours}"),
        "",
        "# RabbitMQ: the least that the user of consume and dead needs",
        _permit(amqp, "", _PUBLISH, f"^{ours}"),
        "",
        "# RabbitMQ: the least that the user of publish, publish-all and Producer needs; it reaches"
        " every queue of the virtual host",
        _permit(amqp, "", _PUBLISH, ""),
        "",
        "# RabbitMQ: the least that the user of status needs",
        _permit(amqp, "", "", f"^{ours}"),
        "",
        "# MySQL: the least that the user of consume and publish-all needs",
        *grants,
    ]
    if main_job:
        lines += [
            "",
            "# MySQL: the statements of publish-all and consume; %s are ids and page sizes",
            *(f"{statement};" for statement in (repo.PAGE, repo.STALE, repo.WRITE)),
        ]
    else:
        lines += ["# and what the tasks themselves read and write"]
    return "\n".join(lines)


def _permit(amqp: BrokerAddress, configure: str, write: str, read: str) -> str:
    """Return the command that gives a user these rights and no others, for a shell."""
    rights = (amqp.user, configure, write, read)
    return shlex.join(["rabbitmqctl", "set_permissions", "-p", amqp.vhost, *rights])


def _sql_text(value: str) -> str:
    """Return a text as a statement has it."""
    doubled = value.replace("\\", "\\\\").replace("'", "''")
    return f"'{doubled}'"
