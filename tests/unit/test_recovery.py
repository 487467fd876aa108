"""What a worker does after a failure: how long it waits, and when it finds that it stands still."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from unittest.mock import Mock

import pytest

from aioworker.errors import BrokerError, DatabaseError, StalledError
from aioworker.worker.recovery import Outage, Stall
from tests.fakes import FakeClock

AWAY = DatabaseError("gone", unreachable=True)
REFUSED = BrokerError("user or password refused")


def test_a_server_that_is_away_is_asked_again_soon_and_at_random() -> None:
    """It may be back at any moment, and all workers wait for it."""
    outage = Outage("database")

    waits = [outage.seconds(AWAY) for _ in range(200)]

    assert 0.1 <= min(waits[2:]) < 0.5
    assert 2.5 < max(waits) <= 3.0
    assert max(waits[:2]) <= 2.0


def test_a_server_that_refuses_is_asked_less_and_less_often() -> None:
    """A wrong password is not mended by asking."""
    outage = Outage("broker")

    assert 20 < max(outage.seconds(REFUSED) for _ in range(200)) <= 30


def test_each_node_is_tried_once_without_a_wait() -> None:
    """Another one may work; once all have failed, the usual waits begin."""
    outage = Outage("broker", nodes=3)

    waits = [outage.seconds(AWAY) for _ in range(5)]

    assert waits[:2] == [0, 0]
    assert min(waits[2:]) >= 0.1
    assert waits[2] <= 1.0


@pytest.mark.parametrize(("healthy", "longest"), [(31.0, 1.0), (5.0, 3.0)])
def test_a_server_that_was_back_for_a_while_is_asked_soon_again(
    healthy: float, longest: float
) -> None:
    """One that answers and is gone again at once is not asked in a hurry."""
    waits = []
    for _ in range(100):
        now = 0.0
        outage = Outage("database", clock=lambda: now)  # noqa: B023 - called before the next round
        for _ in range(10):
            outage.seconds(AWAY)
        outage.end()
        now += healthy
        outage.end()
        waits.append(outage.seconds(AWAY))

    assert longest / 2 < max(waits) <= longest


def test_an_outage_is_told_since_its_own_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not since that of the one before it, from which the server came back."""
    outage, said = Outage("broker"), []

    for minute, heals in ((1, False), (2, True), (3, False), (4, False)):
        moment = datetime(2026, 11, 28, 12, minute, tzinfo=UTC)
        monkeypatch.setattr("aioworker.worker.recovery.datetime", Mock(now=lambda _: moment))  # noqa: B023
        said.append(outage.tell(AWAY).words.partition(" UTC")[0])
        if heals:
            outage.end()

    assert said == [f"broker unreachable since 12:0{minute}:00" for minute in (1, 1, 3, 3)]


@pytest.mark.parametrize(("interval", "limit"), [(0.0, 10), (1.0, 10), (30.0, 60)])
async def test_two_intervals_without_a_start_are_a_stall(
    clock: FakeClock, interval: float, limit: int
) -> None:
    """Never less than ten seconds: at 100/s a hiccup is no stall."""
    stall = Stall(patience=40)
    stall.due(interval)
    await clock.advance(limit)
    stall.due(interval)

    await clock.advance(1)

    with pytest.raises(StalledError, match=f"nothing started for {limit + 1} s"):
        stall.due(interval)


async def test_whatever_gets_on_is_no_stall(clock: FakeClock) -> None:
    stall = Stall(patience=40)
    for _ in range(10):
        stall.due(1.0)
        await clock.advance(9)
        stall.moves()
        await clock.advance(9)

    stall.due(1.0)


async def test_a_step_that_never_ends_is_cut_off(clock: FakeClock) -> None:
    """Only after its own timeouts had their time."""
    stall = Stall(patience=40)
    cut_off_at: list[float] = []

    async def serve() -> None:
        stall.due(1.0)
        try:
            await asyncio.Event().wait()
        finally:
            cut_off_at.append(clock.now)

    watching = asyncio.create_task(stall.watch(serve()))
    await clock.advance(60)

    with pytest.raises(StalledError):
        await watching
    assert cut_off_at == [pytest.approx(51, abs=2)]


async def test_whoever_ends_the_watch_ends_the_work(clock: FakeClock) -> None:
    ended: list[bool] = []

    async def serve() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    watching = asyncio.create_task(Stall(patience=40).watch(serve()))
    await clock.advance(5)
    watching.cancel()
    await clock.advance(1)

    assert (watching.cancelled(), ended) == (True, [True])
