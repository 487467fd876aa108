"""What a worker says of a server that is away, while it is and after it was."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
from pymysql.constants import CR
from pymysql.err import OperationalError

from aioworker.mysql.database import Database
from aioworker.reasons import Reason, ReasonKind
from aioworker.settling.outcome import Kind
from aioworker.status.presence import Presence
from tests.conftest import (
    DEADLINE_SECONDS,
    TASK,
    Lanes,
    execute,
    make_database,
    make_worker,
    simple_addons,
)
from tests.place import chunk

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

    from support.servers import Broker, Servers


async def test_a_second_outage_is_told_since_its_own_beginning(
    pair: Servers,
    broker: Broker,
    lanes: Lanes,
    shop: object,
    database: Database,
    stop: asyncio.Event,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Soon after the first one, too: an operator looks for what happened at that time."""
    said: list[str] = []
    monkeypatch.setattr(Presence, "report", lambda _self, reason: said.append(reason.words))
    worker = make_worker(pair, database, burst=False)
    working = asyncio.create_task(worker.run(stop))

    moments = []
    for _ in range(2):
        await until(lambda: said[-1:] == ["nothing queued"])
        began = now()
        await until(lambda: now() > began)  # noqa: B023 - called before the next round
        await asyncio.to_thread(broker.control, "close_all_connections", "test")
        await until(lambda: "unreachable" in said[-1])
        found = re.search(r"since ([\d:]+) UTC", said[-1])
        assert found is not None
        moments.append(found[1])
        assert found[1] > began
    stop.set()
    await working

    assert moments[1] > moments[0]


def now() -> str:
    """Return the time of day in whole seconds."""
    return f"{datetime.now(UTC):%H:%M:%S}"


async def until(holds: Callable[[], bool]) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not holds():  # noqa: ASYNC110 - another process is waited for
            await asyncio.sleep(0.02)


class Counting(Database):
    """A database that counts what is written."""

    tries = 0

    async def execute(self, statement: str, args: object = None) -> int:
        """Write, and count the try."""
        self.tries += 1
        return await super().execute(statement, args)


async def test_a_row_that_cannot_be_written_holds_nobody_up_twice(
    pair: Servers, shop: Connection[Cursor], caplog: pytest.LogCaptureFixture
) -> None:
    """A backup that locks aioworker's own table made every start wait for it twice."""
    database = make_database(pair, Counting)
    presence = Presence(TASK, "here", 1, None, lambda _doing: None, database)
    execute(shop, "LOCK TABLES aioworker_worker READ")

    for kind in (ReasonKind.RUNNING, ReasonKind.EMPTY) * 2:
        presence.report(Reason(kind, "nothing queued"))
        await presence.keep()
    database.close()

    assert isinstance(database, Counting)
    assert database.tries == 1
    [line] = [one for one in caplog.records if one.getMessage() == "worker's row not written"]
    assert "Lock wait timeout exceeded" in line.fields["reason"]  # type: ignore[attr-defined]


class Losing(Database):
    """A database whose connection is lost once, in the read of what a chunk needs."""

    lost = False

    async def query(self, statement: str, args: object = None) -> list[tuple[Any, ...]]:
        """Read; the first time that it is asked what is needed, lose the connection."""
        if self._no_reconnect and "JSON_TABLE" in statement and not self.lost:
            self.lost = True
            self.close()
            raise OperationalError(CR.CR_SERVER_LOST, "Lost connection to MySQL server")
        return await super().query(statement, args)


async def test_a_turn_that_is_lost_with_its_connection_takes_no_other_message(
    pair: Servers, shop: Connection[Cursor], lanes: Lanes, stop: asyncio.Event
) -> None:
    """One whose database failed over in that read put all that waited into the retry queue."""
    simple_addons(shop, 3)
    for addon in (1, 2, 3):
        await lanes.send(chunk(addon))
    database = make_database(pair, Losing)
    worker = make_worker(pair, database, rate_limit="100/s")

    await worker.run(stop)

    database.close()
    assert worker.consumer.settled == {Kind.RETRY: 1, Kind.ACK: 2}
