"""What `init` makes, once: the budget's tables and the queues; or shows, with `--print`."""

from __future__ import annotations

import json
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from aioworker import broker, repo, tables, topology
from aioworker.console import say, tell

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aioworker.settings import Settings
    from aioworker.task import AnyTask


async def init(settings: Settings, tasks: Sequence[AnyTask]) -> None:
    """Make the budget's tables, declare the tasks' queues and wait until they are safe.

    Raises:
        DatabaseError: The database cannot be used, or a table differs.
        BrokerError: RabbitMQ cannot be used, or a queue differs.
    """
    timeout = settings.connect_timeout
    async with AsyncExitStack() as stack:
        database = None
        if settings.budget == "shared":
            database = await stack.enter_async_context(settings.database())
        connection = await stack.enter_async_context(
            broker.connection(settings.amqp_url, timeout, "aioworker init")
        )
        for task in tasks:
            queues = topology.Queues.of(task.name)
            declared = await topology.declare(connection, queues, settings.queue_type, timeout)
            for name in queues.arguments(settings.queue_type):
                say(f"queue {name}: {'declared' if name in declared else 'was there'}")
        if database is not None:
            made = await tables.create(database, [task.name for task in tasks])
            for name in tables.NAMES:
                say(f"table {name}: {'made' if name in made else 'was there'}")
        # Also when they were there: another init may have made them a moment ago.
        tell(f"waiting {topology.SAFE_AFTER_SECONDS:g} s until the queues are safe")
        await topology.wait_until_safe(
            connection, [topology.Queues.of(task.name) for task in tasks], timeout
        )


def setup_text(settings: Settings, tasks: Sequence[AnyTask]) -> str:
    """Return what `init` declares, and the least that the worker's users need, as commands."""
    amqp, mysql = settings.amqp_url[0], settings.mysql_url
    queues = {
        name: arguments
        for task in tasks
        for name, arguments in topology.Queues.of(task.name).arguments(settings.queue_type).items()
    }
    main_job = any(task.name == repo.TASK for task in tasks)
    permit = f"rabbitmqctl set_permissions -p '{amqp.vhost}' '{amqp.user}'"
    needed = [*repo.PRIVILEGES] if main_job else []
    made: list[str] = []
    if settings.budget == "shared":
        needed += tables.PRIVILEGES
        rows = [tables.FIRST_ROW % {"task": f"'{task.name}'"} for task in tasks]
        made = [
            "# MySQL: the tables that init makes; its user needs CREATE beside what follows",
            *(f"{statement};" for statement in (tables.BUDGET, tables.WORKER, *rows)),
            "",
        ]
    grants = [
        f"GRANT {privilege} ON `{mysql.database}`.`{table}` TO '{mysql.user}'@'%';"
        for privilege, table in needed
    ]
    lines = [
        *made,
        "# RabbitMQ: the queues that init declares, durable, on the default exchange",
        *(f"queue {name} {json.dumps(arguments)}" for name, arguments in queues.items()),
        "",
        "# RabbitMQ: the least that the user of init needs",
        rf"{permit} '^aioworker\.' '^(aioworker\.|amq\.default$)' '^aioworker\.'",
        "",
        "# RabbitMQ: the least that the user of consume, publish-all and publish needs",
        rf"{permit} '' '^amq\.default$' '^aioworker\.'",
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
