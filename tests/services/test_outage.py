"""What a worker says of a server that is away, while it is and after it was."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from aioworker.presence import Presence
from tests.conftest import DEADLINE_SECONDS, Lanes, make_worker

if TYPE_CHECKING:
    from aioworker.db import Database
    from support.servers import Servers


async def test_a_second_outage_is_told_since_its_own_beginning(
    private: Servers,
    lanes: Lanes,
    shop: object,
    database: Database,
    stop: asyncio.Event,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Soon after the first one, too: an operator looks for what happened at that time."""
    said: list[str] = []
    monkeypatch.setattr(Presence, "tell", lambda _self, _state, reason, _level: said.append(reason))
    worker = make_worker(private, database, burst=False)
    working = asyncio.create_task(worker.run(stop))

    moments = []
    for _ in range(2):
        await until(lambda: said[-1:] == ["nothing queued"])
        began = now()
        await until(lambda: now() > began)  # noqa: B023 - called before the next round
        assert private.broker is not None
        await asyncio.to_thread(private.broker.control, "close_all_connections", "test")
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
