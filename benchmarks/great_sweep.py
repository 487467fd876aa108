"""How long the ids of a large table take to be read, at its beginning and at its end."""

from __future__ import annotations

import statistics
import time

from aioworker import repo
from aioworker.addresses import DatabaseAddress
from aioworker.mysql.database import Database


async def read_ends(mysql_url: str, size: int, count: int, rounds: int) -> tuple[float, float]:
    """Return the seconds, medians, in which the first and the last ids are read.

    Args:
        mysql_url: The database, its add-ons' ids from 1 to *size*.
        size: How many there are.
        count: How many are read at either end.
        rounds: How often, in turn.
    """
    database = Database(DatabaseAddress.parse(mysql_url), connect_timeout=10, timeout=60)
    seconds: dict[int, list[float]] = {0: [], size - count: []}
    for _ in range(rounds):
        for after, several in seconds.items():
            began, read = time.perf_counter(), 0
            async for page in repo.swept_ids(database, after):
                read += len(page)
                if read >= count:
                    break
            several.append(time.perf_counter() - began)
    database.close()
    first, last = (statistics.median(several) for several in seconds.values())
    return first, last
