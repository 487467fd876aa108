"""Whether the workers of this machine do their work, for Docker and monitors.

It is read from their rows in the database, without a round trip to RabbitMQ. A worker that
waits for a server is healthy: to start it anew would not help.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from aioworker import presence, status, tables
from aioworker.console import duration
from aioworker.errors import UnhealthyError, UsageError

if TYPE_CHECKING:
    from aioworker.settings import Settings
    from aioworker.task import AnyTask


async def check(settings: Settings, task: AnyTask) -> str:
    """Return in one line what this machine's workers of a task do.

    Raises:
        UnhealthyError: None of them was seen lately, or one stands still.
        DatabaseError: Their rows cannot be read.
        UsageError: The workers keep no rows.
    """
    if settings.budget != "shared":
        raise UsageError("AIOWORKER_BUDGET=worker: workers keep no row that tells how they are")
    host = socket.gethostname()[: presence.HOST_LENGTH]
    async with settings.database() as database:
        with tables.explaining(database):
            found = [one for one in await status.workers(database, task.name) if one.host == host]
    alive = [one for one in found if one.alive]
    if not alive:
        seen = min((one.seen_seconds for one in found), default=None)
        when = "" if seen is None else f"; the last was seen {duration(seen)} ago"
        raise UnhealthyError(f"no worker of {task.name} is alive on {host}{when}")
    for one in alive:
        if one.state == "stalled":
            raise UnhealthyError(f"{one.name} stalled: {one.reason}")
    return "; ".join(f"{one.name} {one.state}: {one.reason}" for one in alive)
