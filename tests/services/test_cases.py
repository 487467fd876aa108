"""The rule's cases, each through the real path: publish, broker, consume, database."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from aioworker.settling.outcome import Kind
from support import site
from tests.conftest import (
    TASK,
    Lanes,
    current_versions,
    make_producer,
    make_worker,
    rows,
)

if TYPE_CHECKING:
    import asyncio

    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

    from aioworker.mysql.database import Database
    from support.servers import Servers

CASES = json.loads((Path(__file__).parent.parent / "data/current_version_cases.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
async def test_a_published_add_on_gets_its_right_version(
    case: dict[str, Any],
    pair: Servers,
    shop: Connection[Cursor],
    lanes: Lanes,
    database: Database,
    stop: asyncio.Event,
) -> None:
    """The case's note says what is odd about it."""
    addon = case["addon"][0]
    site.insert_addon(shop, case["addon"], case["versions"])
    untouched = rows(shop, "SELECT modified, status, inactive FROM addons")

    async with make_producer(pair) as producer:
        await producer.publish(TASK, [addon])
    worker = make_worker(pair, database)

    assert await worker.run(stop)
    assert current_versions(shop) == {addon: case["expect"]}
    assert rows(shop, "SELECT modified, status, inactive FROM addons") == untouched
    assert worker.consumer.settled == {Kind.ACK: 1}
