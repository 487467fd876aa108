"""Another writer of the same tables: what it feels of a job beside it."""

from __future__ import annotations

import random
import statistics
import threading
import time
from typing import TYPE_CHECKING

import pymysql

from support import servers

if TYPE_CHECKING:
    from collections.abc import Callable

PER_SECOND = 200
DEADLOCK = 1213


def felt_beside(mysql_url: str, addons: int, job: Callable[[], object]) -> dict[str, float]:
    """Insert and update 200 times a second while *job* runs; return what that took.

    Returns:
        p50 and p99 in milliseconds, and the number of deadlocks.
    """
    ended = threading.Event()
    milliseconds: list[float] = []
    deadlocks = 0

    def write() -> None:
        nonlocal deadlocks
        dice = random.Random(7)
        connection = servers.connect(mysql_url)
        connection.autocommit(True)
        with connection.cursor() as cursor:
            due = time.perf_counter()
            while not ended.is_set():
                due += 1 / PER_SECOND
                began = due
                ahead = due - time.perf_counter()
                if ahead > 0:
                    time.sleep(ahead)
                    # This process waking up late is not the database's doing.
                    began = time.perf_counter()
                addon = dice.randrange(1, addons)
                statement = (
                    "INSERT INTO versions (addon_id, version, created, modified)"
                    f" VALUES ({addon}, '0', '2001-01-01', '2001-01-01')",
                    f"UPDATE addons SET average_daily_users = {addon} WHERE id = {addon}",
                    "UPDATE files JOIN versions ON versions.id = files.version_id"
                    f" SET files.status = 4 WHERE versions.addon_id = {addon}",
                )[dice.randrange(3)]
                try:
                    cursor.execute(statement)
                except pymysql.err.OperationalError as error:
                    if error.args[0] != DEADLOCK:
                        raise
                    deadlocks += 1
                # From when it was due: one long wait makes those behind it late too.
                milliseconds.append((time.perf_counter() - began) * 1000)
        connection.close()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        job()
    finally:
        ended.set()
        writer.join()
    cuts = statistics.quantiles(milliseconds, n=100)
    return {"p50": cuts[49], "p99": cuts[98], "deadlocks": deadlocks}
