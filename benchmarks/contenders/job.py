"""The main job as many would write it: one `UPDATE … JOIN` a chunk."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiomysql
import pymysql

from benchmarks.contenders import begin, tick

STATEMENT = os.environ["JOB_STATEMENT"]
_at = urlsplit(os.environ["AIOWORKER_MYSQL_URL"])
_WHERE: dict[str, Any] = {
    "host": _at.hostname,
    "port": _at.port,
    "user": _at.username,
    "password": _at.password or "",
    "db": _at.path[1:],
    "autocommit": True,
}
_own = threading.local()
_pool: list[aiomysql.Connection] = []


def chunks() -> Iterator[list[int]]:
    """Yield what is to be published."""
    yield from json.loads(Path(os.environ["JOB_CHUNKS"]).read_text())


def refresh(ids: list[int]) -> None:
    """Write what is stale among some add-ons, by a connection that the thread keeps."""
    begin()
    if not hasattr(_own, "connection"):
        _own.connection = pymysql.connect(**_WHERE)
    with _own.connection.cursor() as cursor:
        cursor.execute(STATEMENT % ", ".join(map(str, ids)))
    tick()


async def refresh_soon(ids: list[int]) -> None:
    """Do the same by a connection that the process keeps."""
    begin()
    connection = _pool.pop() if _pool else await aiomysql.connect(**_WHERE)
    async with connection.cursor() as cursor:
        await cursor.execute(STATEMENT % ", ".join(map(str, ids)))
    _pool.append(connection)
    tick()
