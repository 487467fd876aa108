"""Chunks as they arrive: known and unknown ids, doubled, empty, again, at once, and bad ones."""

from __future__ import annotations

import asyncio
import json
import logging
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import aio_pika
import pamqp.encode
import pytest

from aioworker import repo
from aioworker.mysql.database import Database
from aioworker.settling.outcome import Kind
from tests.conftest import (
    QUEUES,
    Lanes,
    current_versions,
    execute,
    make_database,
    make_worker,
    simple_addons,
)

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

    from support.servers import Servers


@dataclass(frozen=True)
class Raw:
    """A header's value as it is on the wire, type and all."""

    data: bytes


def chunk(ids: object) -> bytes:
    return json.dumps([[ids], {}, None]).encode()


def events(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """Return the fields of the lines about settled deliveries."""
    return [
        record.fields  # type: ignore[attr-defined]
        for record in caplog.records
        if record.message in {"chunk done", "message refused", "chunk failed"}
    ]


async def test_an_unknown_id_is_one_debug_line_and_the_others_are_done(
    pair: Servers,
    shop: Connection[Cursor],
    lanes: Lanes,
    database: Database,
    stop: asyncio.Event,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, "aioworker")
    simple_addons(shop, 2)
    await lanes.send(chunk([1, 999_999, 2]))

    assert await make_worker(pair, database, rate_limit="100/s").run(stop)

    assert current_versions(shop) == {1: 10_001, 2: 10_002}
    assert [r.message for r in caplog.records if "Missing" in r.message] == [
        "Missing addon: 999999"
    ]
    [event] = events(caplog)
    assert (event["ids"], event["changed"], event["missing"]) == (3, 2, 1)


async def test_an_id_that_comes_twice_is_done_once_and_counted_once(
    pair: Servers,
    shop: Connection[Cursor],
    lanes: Lanes,
    database: Database,
    stop: asyncio.Event,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "aioworker")
    simple_addons(shop, 1)
    await lanes.send(chunk([1, 1, [1]]))

    assert await make_worker(pair, database).run(stop)

    [event] = events(caplog)
    assert (event["ids"], event["changed"]) == (1, 1)


async def test_an_empty_chunk_is_acknowledged_without_a_statement(
    pair: Servers,
    shop: Connection[Cursor],
    lanes: Lanes,
    stop: asyncio.Event,
) -> None:
    counting = make_database(pair, Counting)
    assert isinstance(counting, Counting)
    simple_addons(shop, 1)
    await lanes.send(chunk([]))
    worker = make_worker(pair, counting)

    assert await worker.run(stop)

    assert (worker.consumer.settled, worker.consumer.starts) == ({Kind.ACK: 1}, 0)
    # The look at the tables when it started, with no ids; nothing for the chunk.
    assert (counting.queries, counting.writes) == (1, 1)
    counting.close()


class Counting(Database):
    """Counts what it is asked."""

    queries = 0
    writes = 0

    async def query(self, statement: str, args: object = None) -> list[tuple[Any, ...]]:
        """Count, then read."""
        self.queries += 1
        return await super().query(statement, args)

    async def execute(self, statement: str, args: object = None) -> int:
        """Count, then write."""
        self.writes += 1
        return await super().execute(statement, args)


@pytest.mark.parametrize("rate_limit", [None, "100/s"])
async def test_the_same_chunk_again_changes_no_row_and_costs_nothing(
    pair: Servers,
    shop: Connection[Cursor],
    lanes: Lanes,
    database: Database,
    stop: asyncio.Event,
    rate_limit: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As it comes when a worker dies after its commit and before its acknowledgement."""
    caplog.set_level(logging.INFO, "aioworker")
    simple_addons(shop, 3)
    for _ in range(5):
        await lanes.send(chunk([1, 2, 3]))
    worker = make_worker(pair, database, rate_limit=rate_limit)

    assert await worker.run(stop)

    assert [event["changed"] for event in events(caplog)] == [3, 0, 0, 0, 0]
    assert worker.consumer.settled == {Kind.ACK: 5}
    if rate_limit:
        assert worker.consumer.starts == 1


async def test_rows_of_one_id_are_the_same_as_ids(
    pair: Servers,
    shop: Connection[Cursor],
    lanes: Lanes,
    database: Database,
    stop: asyncio.Event,
) -> None:
    """So the original sent them."""
    simple_addons(shop, 4)
    await lanes.send(chunk([[1], [2]]))
    await lanes.send(chunk([3, 4]))

    assert await make_worker(pair, database).run(stop)

    assert current_versions(shop) == {n: n + 10_000 for n in (1, 2, 3, 4)}


async def test_two_workers_with_the_same_chunk_at_once_come_to_the_same_end(
    pair: Servers, shop: Connection[Cursor], lanes: Lanes, stop: asyncio.Event
) -> None:
    """No deadlock error escapes."""
    simple_addons(shop, 1000)
    for _ in range(4):
        await lanes.send(chunk(list(range(1000, 0, -1))))
    databases = [make_database(pair), make_database(pair)]
    workers = [make_worker(pair, database) for database in databases]

    assert await asyncio.gather(*(worker.run(stop) for worker in workers)) == [True, True]

    assert current_versions(shop) == {n: n + 10_000 for n in range(1, 1001)}
    assert sum(worker.consumer.settled[Kind.ACK] for worker in workers) == 4
    for database in databases:
        database.close()


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("7", "'7'"),
        (0, "0"),
        (-1, "-1"),
        (None, "None"),
        (1.5, "1.5"),
        (True, "True"),
        (2**32, "4294967296"),
        ([[1]], "[[1]]"),
    ],
)
async def test_a_bad_id_refuses_the_message_and_stops_nobody(
    pair: Servers,
    shop: Connection[Cursor],
    lanes: Lanes,
    database: Database,
    stop: asyncio.Event,
    value: object,
    shown: str,
) -> None:
    """Nothing of it is run, and the chunk behind it is."""
    simple_addons(shop, 2)
    await lanes.send(chunk([1, value]), headers={"task": "update_current_version", "id": "bad"})
    await lanes.send(chunk([2]))
    worker = make_worker(pair, database)

    assert not await worker.run(stop)

    assert current_versions(shop) == {1: None, 2: 10_002}
    assert worker.consumer.settled == {Kind.DEAD_LETTER: 1, Kind.ACK: 1}
    assert await lanes.holds(QUEUES.dead, 1)
    letter = await lanes.take(QUEUES.dead)
    assert letter.body == chunk([1, value])
    assert letter.headers["id"] == "bad"
    assert letter.headers["x-aioworker-reason"] == (
        f"expected ids from 1 to 4294967295, got: {shown}"
    )
    assert letter.headers["x-aioworker-lane"] == "bulk"
    assert letter.headers["x-aioworker-attempts"] == 1


@pytest.mark.parametrize(
    "headers",
    [
        {"who": Raw(b"S\x00\x00\x00\x01\xe9")},
        {"load": Raw(b"d" + struct.pack(">d", 1e300))},
        {"nested": {"who": Raw(b"S\x00\x00\x00\x01\xe9")}},
        {"retries": 2**63 - 1},
        {"id": ["a", "list"]},
        {"much": "x" * 130_800},
    ],
    ids=["latin-1", "double", "nested", "retries", "id", "a frame full"],
)
async def test_a_bad_message_with_odd_headers_is_a_dead_letter_too(
    pair: Servers,
    shop: Connection[Cursor],
    lanes: Lanes,
    database: Database,
    stop: asyncio.Event,
    headers: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What another client can send, ours may not be able to send on."""
    encode = pamqp.encode.encode_table_value
    with monkeypatch.context() as other_client:
        other_client.setattr(
            pamqp.encode,
            "encode_table_value",
            lambda value: value.data if isinstance(value, Raw) else encode(value),
        )
        await lanes.send(chunk([0]), headers={"task": "update_current_version"} | headers)
    worker = make_worker(pair, database)

    assert not await worker.run(stop)

    assert worker.consumer.settled == {Kind.DEAD_LETTER: 1}
    letter = await lanes.take(QUEUES.dead)
    assert str(letter.headers["x-aioworker-reason"]).startswith("expected ")


async def test_a_message_redelivered_after_its_write_changes_nothing(
    pair: Servers,
    shop: Connection[Cursor],
    lanes: Lanes,
    database: Database,
    stop: asyncio.Event,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The worker before died between its commit and its acknowledgement."""
    caplog.set_level(logging.INFO, "aioworker")
    simple_addons(shop, 3)
    await lanes.send(chunk([1, 2, 3]))
    dying = await aio_pika.connect(pair.amqp_url)
    queue = await (await dying.channel()).get_queue(QUEUES.bulk, ensure=False)
    assert await queue.get(timeout=10)
    await repo.refresh(database, [1, 2, 3])
    await dying.close()

    assert await make_worker(pair, database).run(stop)

    [event] = events(caplog)
    assert (event["ids"], event["changed"]) == (3, 0)
    assert current_versions(shop) == {n: n + 10_000 for n in (1, 2, 3)}


async def test_more_than_a_thousand_ids_are_a_dead_letter(
    pair: Servers,
    shop: Connection[Cursor],
    lanes: Lanes,
    database: Database,
    stop: asyncio.Event,
) -> None:
    simple_addons(shop, 1)
    await lanes.send(chunk([1] * 1001))

    assert not await make_worker(pair, database).run(stop)

    letter = await lanes.take(QUEUES.dead)
    assert letter.headers["x-aioworker-reason"] == "expected at most 1000 ids, got: 1001"
    assert current_versions(shop) == {1: None}


async def test_rows_that_the_data_refuses_are_named_and_the_others_written(
    pair: Servers,
    shop: Connection[Cursor],
    lanes: Lanes,
    database: Database,
    stop: asyncio.Event,
) -> None:
    """One bad row does not lose the other 999."""
    simple_addons(shop, 1000)
    execute(
        shop,
        "CREATE TRIGGER refuse BEFORE UPDATE ON addons FOR EACH ROW"
        " IF NEW.id IN (7, 512) THEN SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'frozen'; END IF",
    )
    await lanes.send(chunk(list(range(1, 1001))))
    worker = make_worker(pair, database)

    assert not await worker.run(stop)

    wrong = {n for n, version in current_versions(shop).items() if version != n + 10_000}
    assert wrong == {7, 512}
    letter = await lanes.take(QUEUES.dead)
    assert letter.headers["x-aioworker-reason"] == (
        "2 rows refused by the database: frozen (1644): ids 7, 512"
    )


async def test_the_urgent_lane_is_taken_first(
    pair: Servers,
    shop: Connection[Cursor],
    lanes: Lanes,
    database: Database,
    stop: asyncio.Event,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A surgical strike does not wait behind a sweep."""
    caplog.set_level(logging.INFO, "aioworker")
    simple_addons(shop, 4)
    for addon in (1, 2, 3):
        await lanes.send(chunk([addon]))
    await lanes.send(chunk([4]), QUEUES.urgent)

    assert await make_worker(pair, database).run(stop)

    assert [event["lane"] for event in events(caplog)] == ["urgent", "bulk", "bulk", "bulk"]
