"""Whether the workers of this machine do their work, for Docker and monitors.

It is read from their rows in the database, without a round trip to RabbitMQ. A worker that
waits for a server is healthy: to start it anew would not help.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence

from aioworker.budget import schema, tables
from aioworker.commands import which_tasks
from aioworker.errors import UnhealthyError, UsageError
from aioworker.mysql.database import Database
from aioworker.settings import Settings
from aioworker.status import presence, read
from aioworker.status.read import Worker
from aioworker.words import duration


async def check(settings: Settings, names: Sequence[str]) -> str:
    """Return what this machine's workers of the tasks that are meant do, a line a task.

    Raises:
        UnhealthyError: None of a task's was seen lately, or one stands still; all are named.
        DatabaseError: Their rows cannot be read.
        UsageError: The workers keep no rows.
    """
    if settings.budget != "shared":
        raise UsageError("AIOWORKER_BUDGET=worker: workers keep no row that tells how they are")
    async with settings.database() as database:
        tasks = await which_tasks.of_table(database, names)
        with tables.explaining(database):
            found = {name: await _here(database, name) for name in tasks}
            problems = {name: _problem(name, workers) for name, workers in found.items()}
            sick = {name: problem for name, problem in problems.items() if problem is not None}
            # Workers of this version write no row into it. Those of an earlier one, not restarted
            # yet, are well.
            older = await schema.older(database) if sick else ""
    labels = {name: f"{name}: " if len(found) > 1 else "" for name in found}
    if sick:
        words = [labels[name] + problem for name, problem in sick.items()]
        raise UnhealthyError("; ".join([*words, *filter(None, [older])]))
    lines = [labels[name] + _doing(workers) for name, workers in found.items()]
    return "\n".join(" ".join(line.split()) for line in lines)


async def _here(database: Database, name: str) -> list[Worker]:
    host = _host()
    return [one for one in await read.workers(database, name) if one.host == host]


def _host() -> str:
    return socket.gethostname()[: presence.HOST_LENGTH]


def _problem(name: str, workers: list[Worker]) -> str | None:
    """Return what is wrong with a task's workers on this machine, None if all is well."""
    alive = [one for one in workers if one.alive]
    if not alive:
        seen = min((one.seen_seconds for one in workers), default=None)
        when = "" if seen is None else f"; the last was seen {duration(seen)} ago"
        return f"no worker of {name} is alive on {_host()}{when}"
    for one in alive:
        if one.stalled:
            return f"{one.name} stalled: {one.reason}"
    return None


def _doing(workers: list[Worker]) -> str:
    return "; ".join(f"{one.name} {one.state}: {one.reason}" for one in workers if one.alive)
