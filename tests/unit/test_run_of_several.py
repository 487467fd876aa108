"""What the run of a start gets of its messages: each id once, the later row, its own time."""

from __future__ import annotations

import asyncio
import json
from datetime import timedelta
from typing import Any

import pytest

from aioworker.clock import own_time
from aioworker.errors import DeadLetter
from aioworker.rabbitmq.message import PUBLISHED, milliseconds
from tests.doubles.gathering import INTERVAL, Gathering, gathering_with
from tests.doubles.heart import running
from tests.doubles.lanes import QUEUES
from tests.fakes import FakeClock

PUBLISHED_AT = own_time()


async def test_what_a_run_sees_is_of_all_its_messages(clock: FakeClock) -> None:
    gathering = Gathering()
    for one, seconds in ((1, 20), (2, 30), (3, 10)):
        at = milliseconds(own_time() - timedelta(seconds=seconds))
        gathering.send([one], QUEUES.bulk, **{PUBLISHED: at})

    await gathering.heart.run_for(clock, 2)

    [ctx] = gathering.contexts
    assert ctx.messages == ("1", "2", "3")
    assert (ctx.message_id, ctx.attempt) == ("2", 1), "the oldest's"
    assert ctx.counts == {"ids": 3, "changed": 3}


async def test_messages_of_one_id_are_one_row(clock: FakeClock) -> None:
    """An id that was published a thousand times costs one write."""
    gathering = Gathering()
    for number in range(1000):
        gathering.send([7], QUEUES.urgent, id=str(number))

    await gathering.heart.run_for(clock, 2)

    assert gathering.runs == [[7]]
    assert len(gathering.acknowledged) == 1000


async def test_a_change_that_came_behind_a_read_is_read_again(clock: FakeClock) -> None:
    """Of an id alone nothing is known but that somebody asks: the later change is in the row."""
    gathering = Gathering(stale={1, 100})
    stale = gathering.stale
    assert stale is not None
    gathering.send([100])
    async with running(gathering.heart):
        await clock.advance(12)
        gathering.send([1])
        gathering.send([5], QUEUES.urgent, id="before")
        await clock.advance(3, step=0.5)
        assert "before" in gathering.acknowledged, "it needs nothing"
        stale.add(5)
        gathering.send([5], QUEUES.bulk, id="behind")
        await clock.advance(INTERVAL, step=0.5)

    assert gathering.runs == [[100], [1, 5]]


async def test_a_read_that_fails_claims_nothing(clock: FakeClock) -> None:
    """A message that names the same row, and was published before, is asked for all the same."""
    gathering = Gathering()
    failures = [DeadLetter("not this one")]

    async def needed(ids: list[int]) -> list[int]:
        if 5 in ids and failures:
            raise failures.pop()
        return ids

    gathering.heart.task.needed(needed)
    now = own_time()
    gathering.send([1])
    async with running(gathering.heart):
        await clock.advance(5)
        gathering.send([2])
        await clock.advance(8)
        for name, seconds in (("refused", 0), ("older", 5)):
            at = milliseconds(now - timedelta(seconds=seconds))
            gathering.send([5], QUEUES.bulk, **{"id": name, PUBLISHED: at})
            await clock.advance(2)
        await clock.advance(INTERVAL)

    assert gathering.runs == [[1], [2, 5]]
    assert gathering.queued(QUEUES.dead) == ["refused"]


@pytest.mark.parametrize(
    ("first", "second", "winner"),
    [
        ((0, "bulk"), (1, "bulk"), "second"),
        ((1, "bulk"), (0, "bulk"), "first"),
        ((1, "urgent"), (0, "bulk"), "first"),
        ((0, "urgent"), (1, "bulk"), "second"),
        ((0, "urgent"), (0, "bulk"), "first"),
        ((None, "urgent"), (1, "bulk"), "first"),
        ((None, "bulk"), (0, "bulk"), "second"),
    ],
)
async def test_of_two_rows_of_one_id_the_later_wins(
    clock: FakeClock,
    first: tuple[int | None, str],
    second: tuple[int | None, str],
    winner: str,
) -> None:
    """By the time of publication; without one, or on a tie, urgent over bulk, then their order."""
    runs: list[list[tuple[int, str]]] = []

    async def price(rows: list[tuple[int, str]]) -> None:
        runs.append(rows)

    heart = gathering_with(price)
    for name, (seconds, lane) in (("first", first), ("second", second)):
        at = None if seconds is None else milliseconds(PUBLISHED_AT + timedelta(seconds=seconds))
        headers: dict[str, Any] = {"id": name} | ({} if at is None else {PUBLISHED: at})
        body = json.dumps([[[[7, name], [8 if name == "first" else 9, "x"]]], {}, None])
        queue = QUEUES.urgent if lane == "urgent" else QUEUES.bulk
        heart.broker.send(body.encode(), queue, **headers)

    await heart.run_for(clock, 2)

    [run] = runs
    assert sorted(run) == [(7, winner), (8, "x"), (9, "x")]
    assert heart.broker.acknowledged == ["first", "second"]


async def test_a_message_that_expires_while_it_is_held_is_not_run(clock: FakeClock) -> None:
    gathering = Gathering()
    heart = gathering.heart
    gathering.send([1])
    async with running(heart):
        await clock.advance(12)
        expires = own_time() + timedelta(hours=1)
        gathering.send([2, 3], QUEUES.bulk, expires=expires.isoformat())
        gathering.send([3, 4])
        await clock.advance(4)
        assert len(heart.lanes.held) == 2
        heart.budget.now = lambda: expires  # type: ignore[method-assign]
        await clock.advance(INTERVAL, step=0.5)

    assert [sorted(run) for run in gathering.runs] == [[1], [3, 4]]
    assert gathering.acknowledged == ["1", "2", "3"]


async def test_the_row_of_a_message_that_expired_is_another_ones(clock: FakeClock) -> None:
    runs: list[list[tuple[int, str]]] = []

    async def price(rows: list[tuple[int, str]]) -> None:
        runs.append(rows)

    heart = gathering_with(price)
    expires = own_time() + timedelta(hours=1)
    heart.broker.send(b'[[[[0, "first"]]], {}, null]')
    async with running(heart):
        await clock.advance(12)
        heart.broker.send(b'[[[[7, "older"]]], {}, null]')
        heart.broker.send(b'[[[[7, "newer"]]], {}, null]', expires=expires.isoformat())
        await clock.advance(4)
        heart.budget.now = lambda: expires  # type: ignore[method-assign]
        await clock.advance(INTERVAL, step=0.5)

    assert runs == [[(0, "first")], [(7, "older")]]


async def test_the_time_of_other_messages_reads_is_not_that_of_a_run(clock: FakeClock) -> None:
    gathering = Gathering(task_timeout=5)

    async def needed(ids: list[int]) -> list[int]:
        await asyncio.sleep(1)
        return [one for one in ids if one < 10]

    gathering.heart.task.needed(needed)
    gathering.send([1])
    async with running(gathering.heart):
        await clock.advance(8, step=0.5)
        gathering.send([2])
        for one in range(10, 20):
            await clock.advance(2, step=0.5)
            gathering.send([one])
        await clock.advance(10, step=0.5)

    assert gathering.runs == [[1], [2]]
    assert gathering.queued(QUEUES.retry) == []
