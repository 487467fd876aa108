"""Without a rate limit the next message comes while a short run is on; a long one lets it go."""

from __future__ import annotations

import asyncio
import json
import math
from itertools import pairwise
from typing import Any

import pymysql
import pytest

from aioworker.errors import BrokerError
from aioworker.limits import POLL_SECONDS, Wait
from aioworker.rabbitmq.delivery import SUSPECT_RETURNS
from aioworker.rabbitmq.message import SMALL_BYTES
from aioworker.worker.prefetch import SHORT_SECONDS, Prefetch
from tests.doubles.gathering import AWAY, PAUSED, Gathering, Ids
from tests.doubles.heart import Heart, running
from tests.doubles.lanes import QUEUES
from tests.fakes import FakeClock

SHORT, LONG = SHORT_SECONDS / 5, SHORT_SECONDS * 5
CHUNK = 1000


class Runs:
    """Chunks that fill a start each, whose runs take a while.

    Args:
        seconds: How long a run takes.
        options: Of the gathering.

    Attributes:
        held: How many messages the worker held at the end of each run, the run's own among them.
    """

    def __init__(self, seconds: float = SHORT, **options: Any) -> None:
        self.seconds = seconds
        self.held: list[int] = []
        self.fail_from: float = math.inf  # so many runs are fine
        self.error: Exception = KeyError("shop")
        self.gathering = Gathering(self._run, **{"rate": None, **options})
        self.heart = self.gathering.heart

    async def _run(self, ids: Ids) -> None:
        await asyncio.sleep(self.seconds)
        self.held.append(len(self.heart.lanes.held))
        if self.heart.probe.away is not None:
            raise self.heart.probe.away
        if len(self.held) > self.fail_from:
            raise self.error

    def send(self, chunks: int, lane: str = QUEUES.bulk) -> None:
        """Publish so many chunks."""
        first = sum(map(len, self.heart.broker.queues.values())) * CHUNK + 1
        self.gathering.send_chunks(range(first, first + chunks * CHUNK, CHUNK))

    async def run_for(self, clock: FakeClock, seconds: float) -> None:
        """Run a session for so long."""
        await self.heart.run_for(clock, seconds, SHORT / 4)

    @property
    def order(self) -> list[str]:
        """The ids of what ran, in that order."""
        return [str(ids[0]) for ids in self.gathering.runs]


async def until_it_holds_two(clock: FakeClock, runs: Runs) -> None:
    """Wait until a second message is there while one runs."""
    while len(runs.heart.lanes.held) < 2:
        await clock.advance(SHORT / 4, SHORT / 4)


async def test_the_next_message_is_there_when_a_short_run_ends(clock: FakeClock) -> None:
    runs = Runs()
    runs.send(6)

    await runs.run_for(clock, 0.5)

    # How long the first one takes is not known before.
    assert runs.held == [1, 2, 2, 2, 2, 1]
    assert (
        runs.gathering.acknowledged == runs.order == ["1", "1001", "2001", "3001", "4001", "5001"]
    )
    assert "give_back" not in runs.heart.settled


async def test_none_is_held_beside_long_runs(clock: FakeClock) -> None:
    runs = Runs(LONG)
    runs.send(4)

    await runs.run_for(clock, 4 * LONG + 1)

    assert runs.held == [1, 1, 1, 1]
    assert "give_back" not in runs.heart.settled


async def test_what_came_for_the_end_of_a_run_that_is_long_goes_back(clock: FakeClock) -> None:
    runs = Runs()
    runs.send(6)

    async with running(runs.heart):
        await until_it_holds_two(clock, runs)
        runs.seconds = LONG
        await clock.advance(SHORT, SHORT / 4)
        beside = len(runs.heart.lanes.held)
        await clock.advance(SHORT_SECONDS, SHORT / 4)
        left = len(runs.heart.lanes.held)
        await clock.advance(4 * LONG, SHORT / 4)

    assert (beside, left) == (2, 1)
    assert runs.heart.settled.count("give_back") == 1
    assert runs.gathering.acknowledged == ["1", "1001", "2001", "3001", "4001", "5001"]


CASES = ["a rate", "large messages", "an open breaker", "suspects", "one message a start"]


@pytest.mark.parametrize("case", CASES)
async def test_none_is_held_beside_a_run(clock: FakeClock, case: str) -> None:
    options: dict[str, dict[str, Any]] = {
        "a rate": {"rate": "20/s"},
        "one message a start": {"gather_seconds": 0},
    }
    runs = Runs(chunk_size=1, **options.get(case, {}))
    if case == "large messages":
        for one in range(6):
            body = f"[[[{one + 1}]], {{}}, {{}}]{' ' * SMALL_BYTES}".encode()
            runs.heart.broker.send(body, id=str(one))
    elif case == "suspects":  # what kills its worker takes no other with it
        for one in range(6):
            headers: dict[str, Any] = {"x-delivery-count": SUSPECT_RETURNS}
            runs.gathering.send([one + 1], **headers)
    else:
        runs.send(6)
    if case == "an open breaker":
        runs.heart.consumer.breaker.reason = "all fail"

    await runs.run_for(clock, 2)

    assert len(runs.held) > 1
    assert set(runs.held) == {1}


async def test_of_rows_none_is_held_beside_a_run(clock: FakeClock) -> None:
    """The order of two rows of one id may decide, and what goes back twice loses its own."""
    held = []

    async def move(rows: list[tuple[int, str]]) -> None:
        await asyncio.sleep(SHORT)
        held.append(len(heart.lanes.held))

    heart = Heart(move, gather_seconds=20, chunk_size=1)
    heart.task.needed(lambda rows: rows)
    for one in range(6):
        heart.broker.send(json.dumps([[[[one, "up"]]], {}, None]).encode(), id=str(one))

    await heart.run_for(clock, 1, SHORT / 4)

    assert held == [1] * 6


async def test_one_that_is_there_may_show_that_the_task_works(clock: FakeClock) -> None:
    """A failure that may be the task's costs no attempt while another message is in hand."""
    runs = Runs(max_retries=0)
    runs.send(3)
    runs.fail_from, runs.error = 1, pymysql.err.ProgrammingError(1146, "no such table")

    await runs.run_for(clock, 0.2)

    assert runs.heart.broker.headers(QUEUES.dead) == []


async def test_a_run_that_fails_where_none_can_be_asked_for_costs_an_attempt(
    clock: FakeClock,
) -> None:
    runs = Runs()
    runs.send(2)
    runs.fail_from, runs.error = 1, pymysql.err.ProgrammingError(1146, "no such table")
    at = runs.heart.lanes._at

    def refuse(step: str) -> None:
        at(step)
        if step == "take_beside":
            raise BrokerError("no permission")

    runs.heart.lanes._at = refuse
    async with running(runs.heart) as serving:
        await clock.advance(0.2, SHORT / 4)
        with pytest.raises(BrokerError):
            await serving

    assert [one["retries"] for one in runs.heart.broker.headers(QUEUES.retry)] == [1]


async def test_a_look_ahead_that_is_cut_off_holds_nothing() -> None:
    async def cut_off(*_: object) -> None:
        raise asyncio.CancelledError

    async with Prefetch(cut_off, cut_off, asyncio.Event(), 1, ask=True) as prefetch:
        prefetch._asking = asyncio.create_task(cut_off())
        await asyncio.wait({prefetch._asking})

        assert not prefetch.holds()
        prefetch._asking = None


async def test_a_pause_is_followed_and_nothing_is_given_back_for_looking(clock: FakeClock) -> None:
    runs = Runs()
    runs.send(1000)

    async def paused(_contenders: int = 0) -> Wait:
        return PAUSED

    async with running(runs.heart):
        await clock.advance(3 * POLL_SECONDS, SHORT / 4)
        settled = list(runs.heart.settled)
        runs.heart.budget.check = paused  # type: ignore[assignment,method-assign]
        await clock.advance(POLL_SECONDS + 3 * SHORT, SHORT / 4)
        ran = len(runs.held)
        held = dict(runs.heart.lanes.held)
        await clock.advance(2 * POLL_SECONDS, SHORT / 4)

    assert ran > len(settled)
    assert "give_back" not in settled
    assert held == {}
    assert len(runs.held) == ran


async def test_after_a_start_of_urgent_ones_it_comes_from_the_bulk_lane(clock: FakeClock) -> None:
    runs = Runs()
    runs.send(3)
    for first in (100_001, 200_001, 300_001):
        runs.gathering.send(range(first, first + CHUNK), QUEUES.urgent)

    await runs.run_for(clock, 1)

    lanes = ["urgent" if int(one) > 100_000 else "bulk" for one in runs.order]
    assert lanes == ["urgent", "bulk"] * 3


async def test_at_a_stop_it_goes_back_at_the_end_of_the_run(clock: FakeClock) -> None:
    runs = Runs()
    runs.send(6)

    async with running(runs.heart):
        await until_it_holds_two(clock, runs)
        runs.heart.stop.set()
        await clock.advance(SHORT, SHORT / 4)

        assert runs.heart.lanes.held == {}
    assert runs.gathering.queued() == ["2001", "3001", "4001", "5001"]


@pytest.mark.parametrize("seen_by", ["the run", "the worker's row"])
async def test_it_goes_back_where_the_database_is_away(
    clock: FakeClock, seen_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Runs()
    runs.send(6)

    async def away() -> None:
        raise AWAY

    async with running(runs.heart):
        await until_it_holds_two(clock, runs)
        runs.heart.probe.away = AWAY if seen_by == "the run" else None
        if seen_by == "the worker's row":
            monkeypatch.setattr(runs.heart.worker.presence, "keep", away)
        await clock.advance(SHORT, SHORT / 4)

        assert runs.heart.lanes.held == {}


async def test_a_connection_that_is_lost_meanwhile_ends_the_session(clock: FakeClock) -> None:
    runs = Runs()
    runs.send(6)

    before = asyncio.all_tasks()
    async with running(runs.heart) as serving:
        await until_it_holds_two(clock, runs)
        runs.heart.lanes.lose()
        await clock.advance(SHORT, SHORT / 4)
        with pytest.raises(BrokerError):
            await serving

        assert asyncio.all_tasks() == before
    assert not runs.heart.consumer.holds_another()
    assert runs.heart.consumer.under_way == []
    order = list(map(int, runs.gathering.queued()))
    assert all(one < other for one, other in pairwise(order))
