"""Whose time counts: the database's, for whatever a worker's own clock shows."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from aioworker import DeadLetter
from aioworker.clock import Clock
from aioworker.settling.outcome import Kind
from aioworker.tasks.task import Task
from tests.conftest import QUEUES, TASK, Lanes, make_database, make_worker

if TYPE_CHECKING:
    from support.servers import Servers

NOT_OURS = "this machine's clock is not the database's, which counts"
Serve = Callable[..., Awaitable[dict[Kind, int]]]


@pytest.fixture
def serve(
    pair: Servers, lanes: Lanes, stop: asyncio.Event, shop: object, caplog: pytest.LogCaptureFixture
) -> Serve:
    """Serve one message by a worker whose own clock is so many minutes ahead."""

    async def run(
        function: Callable[..., Any], ahead: int, expires_in: int | None = None
    ) -> dict[Kind, int]:
        caplog.set_level(logging.INFO, "aioworker")
        expires = None
        if expires_in is not None:
            expires = (datetime.now(UTC) + timedelta(minutes=expires_in)).isoformat()
        await lanes.send(
            json.dumps([[1], {}, None]).encode(), headers={"task": TASK, "expires": expires}
        )
        database = make_database(pair)
        clock = Clock(TASK, lambda: datetime.now(UTC) + timedelta(minutes=ahead))
        worker = make_worker(
            pair, database, task=Task(TASK, function), rate_limit="100/s", clock=clock
        )
        await worker.run(stop)
        database.close()
        return dict(worker.consumer.settled)

    return run


async def test_a_worker_whose_clock_is_fast_runs_what_has_not_expired(serve: Serve) -> None:
    """20 minutes fast, it threw away all that was to run within ten."""
    ran: list[int] = []

    assert await serve(ran.append, ahead=20, expires_in=10) == {Kind.ACK: 1}
    assert ran == [1]


async def test_what_expired_is_said_aloud_with_how_late_it_was(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    """By a worker whose own clock is 20 minutes slow, too."""
    ran: list[int] = []

    assert await serve(ran.append, ahead=-20, expires_in=-10) == {Kind.ACK: 1}

    assert ran == []
    [line] = [one for one in caplog.records if one.getMessage() == "chunk expired"]
    fields: dict[str, Any] = line.fields  # type: ignore[attr-defined]
    assert (line.levelno, fields["expired"], fields["outcome"]) == (logging.WARNING, 1, "ack")
    assert fields["reason"].startswith("expired 10 min")


@pytest.mark.parametrize(("ahead", "said"), [(20, 1), (-20, 1), (0, 0)])
async def test_a_clock_that_is_not_the_databases_is_said_once(
    serve: Serve, caplog: pytest.LogCaptureFixture, ahead: int, said: int
) -> None:
    await serve(lambda _shop: None, ahead)

    lines = [one for one in caplog.records if one.getMessage() == NOT_OURS]
    assert len(lines) == said
    for line in lines:
        fields: dict[str, Any] = line.fields  # type: ignore[attr-defined]
        here, there = (datetime.fromisoformat(fields[name]) for name in ("here", "database"))
        assert fields["ahead_seconds"] == pytest.approx(60 * ahead, abs=60)
        assert (here - there).total_seconds() == pytest.approx(60 * ahead, abs=60)


async def test_a_dead_letter_has_the_databases_time(serve: Serve, lanes: Lanes) -> None:
    """Letters of all workers can be told apart by their age."""

    def refuse(shop: int) -> None:
        raise DeadLetter("no shop")

    await serve(refuse, ahead=20)

    headers = (await lanes.take(QUEUES.dead)).headers
    for name in ("x-aioworker-failed-at", "x-aioworker-first-failed-at"):
        at = datetime.fromisoformat(str(headers[name]))
        assert abs(datetime.now(UTC) - at) < timedelta(minutes=5)
