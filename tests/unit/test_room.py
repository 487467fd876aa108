"""Which messages go into one start, and how many there is room for."""

from __future__ import annotations

import json
import zlib
from typing import Any

import pytest

from aioworker.rabbitmq.message import REASON, TOGETHER
from tests.doubles.gathering import INTERVAL, Gathering, gathering_with
from tests.doubles.heart import running
from tests.doubles.lanes import QUEUES
from tests.fakes import FakeClock


async def test_a_start_takes_no_more_once_one_chunk_is_to_be_written(clock: FakeClock) -> None:
    gathering = Gathering(chunk_size=10)
    gathering.send_chunks(range(1, 41, 4))

    await gathering.heart.run_for(clock, 2)

    assert gathering.runs == [list(range(1, 13))], "the last message may be more than has room"
    assert gathering.queued() == [str(first) for first in range(13, 41, 4)]


async def test_what_fits_no_other_is_the_first_of_the_next_start(clock: FakeClock) -> None:
    """Constants that differ are another call of the function."""
    runs = []

    async def move(ids: list[int], way: object = None) -> None:
        runs.append((ids, way))

    heart = gathering_with(move)
    for one, way in enumerate(("up", "up", 1, True, True), start=1):
        heart.broker.send(json.dumps([[[one], way], {}, None]).encode(), id=str(one))

    await heart.run_for(clock, 3 * INTERVAL, step=0.5)

    assert runs == [([1, 2], "up"), ([3], 1), ([4, 5], True)]


@pytest.mark.parametrize(
    "headers",
    [
        {"timelimit": [5, None]},
        {REASON: "it failed", "retries": 1},
        {TOGETHER: 1},
    ],
    ids=["a time limit of its own", "from the retry queue", "more of them failed"],
)
@pytest.mark.parametrize("place", [0, 1])
async def test_some_messages_run_alone(
    clock: FakeClock, headers: dict[str, Any], place: int
) -> None:
    gathering = Gathering()
    for one in range(3):
        gathering.send([one + 1], QUEUES.bulk, **(headers if one == place else {}))

    await gathering.heart.run_for(clock, 3 * INTERVAL, step=0.5)

    assert gathering.runs == ([[1], [2, 3]] if place == 0 else [[1], [2], [3]])


async def test_no_start_is_larger_than_its_messages_may_run_with(clock: FakeClock) -> None:
    gathering = Gathering()
    for one in range(1, 6):
        gathering.send([one], QUEUES.bulk, **({TOGETHER: 2} if one == 2 else {}))
    gathering.heart.budget.most["4"] = 1

    await gathering.heart.run_for(clock, 4 * INTERVAL, step=0.5)

    assert gathering.runs == [[1, 2], [3], [4], [5]]


async def test_a_message_that_needs_nothing_leaves_no_bound_behind(clock: FakeClock) -> None:
    """It might run with one other at most."""
    gathering = Gathering(stale={*range(1, 51), 100})
    gathering.send([100])
    async with running(gathering.heart):
        await clock.advance(15, step=0.5)
        gathering.send([1])
        gathering.send([99], QUEUES.bulk, **{TOGETHER: 2})
        await clock.advance(2, step=0.5)
        gathering.send_each(range(2, 51))
        await clock.advance(20, step=0.5)

    assert [len(run) for run in gathering.runs] == [1, 50]


async def test_large_bodies_end_a_gathering(clock: FakeClock) -> None:
    gathering = Gathering()
    body = 4 * 1024 * 1024 - 100
    for one in range(1, 8):
        text = json.dumps([[[one]], {}, None])
        gathering.heart.broker.send((text + " " * (body - len(text))).encode(), id=str(one))

    await gathering.heart.run_for(clock, 2)

    assert gathering.runs == [[1, 2, 3]]


@pytest.mark.parametrize("most", [8, 2])
async def test_what_messages_keep_in_memory_bounds_a_start(clock: FakeClock, most: int) -> None:
    """Bodies; and of rows their text, however small it was packed."""

    async def price(rows: list[tuple[int, str]]) -> None:
        pass

    heart = gathering_with(price)
    packs = most == 2
    for number in range(20):
        text = "x" * (4 * 2**20 - 2**10 if packs else 2**19)
        body = json.dumps([[[[number, text]]], {}, None]).encode()
        headers = {"compression": "application/x-gzip"} if packs else {}
        heart.broker.send(zlib.compress(body) if packs else body, id=str(number), **headers)

    await heart.run_for(clock, 2)

    assert heart.budget.starts == [most]


async def test_of_a_chunk_only_what_is_to_be_written_is_kept(clock: FakeClock) -> None:
    gathering = Gathering(stale={1, *range(1000, 51_000, 1000)})
    gathering.send([1])
    async with running(gathering.heart):
        await clock.advance(15, step=0.5)
        for first in range(1000, 51_000, 1000):
            gathering.send(range(first, first + 1000))
        await clock.advance(5, step=0.5)
        [start] = gathering.heart.consumer.under_way
        kept = [one.args[0] for one in start.held]
        await clock.advance(INTERVAL, step=0.5)

    assert kept == [[first] for first in range(1000, 51_000, 1000)]
    assert gathering.runs == [[1], list(range(1000, 51_000, 1000))]
