"""Starts of several messages: whose failure it is, what bounds them, and what is said of them."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import zlib
from datetime import timedelta
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from aioworker.budget.deaths import Deaths
from aioworker.clock import own_time
from aioworker.errors import RowsRefusedError
from aioworker.mysql.database import Answer
from aioworker.rabbitmq.message import TOGETHER
from aioworker.tasks.context import Context
from tests.doubles.heart import Heart, running
from tests.doubles.lanes import QUEUES
from tests.fakes import FakeClock
from tests.unit.test_gathering import GATHER_SECONDS, INTERVAL, PAUSED, Gathering, gathering_with


def told(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str, dict[str, Any]]]:
    """Return the lines that were logged: level, words, fields."""
    return [(one.levelname, one.message, vars(one)["fields"]) for one in caplog.records]


# Whose failure it is.


@pytest.mark.parametrize("ids", [(7, 7, *range(100, 199)), (7, *range(100, 199))])
async def test_rows_that_are_refused_one_and_all_set_nothing_aside(
    clock: FakeClock, ids: tuple[int, ...]
) -> None:
    """It may be the task, also if a later row of one id has taken the place of another."""

    async def price(rows: list[tuple[int, str]]) -> None:
        raise RowsRefusedError({row[0]: "no such column" for row in rows}, 0)

    heart = gathering_with(price)
    for number, one in enumerate(ids):
        body = json.dumps([[[[one, f"v{number}"]]], {}, None]).encode()
        heart.broker.send(body, QUEUES.bulk, id=str(number))

    await heart.run_for(clock, 2)

    assert heart.broker.headers(QUEUES.dead) == []
    assert heart.broker.queues[QUEUES.bulk]


async def test_a_row_that_is_refused_is_its_messages_though_no_other_was_to_be_written(
    clock: FakeClock,
) -> None:
    """Somebody else wrote the others meanwhile: no row of the run is written."""

    async def price(_rows: list[tuple[int, str]]) -> None:
        raise RowsRefusedError({7: "too long"}, 0)

    heart = gathering_with(price)
    for one in (6, 7, 8):
        body = json.dumps([[[[one, "text"]]], {}, None]).encode()
        heart.broker.send(body, QUEUES.bulk, id=str(one))

    await heart.run_for(clock, 2)

    assert [headers["id"] for headers in heart.broker.headers(QUEUES.dead)] == ["7"]
    assert sorted(heart.broker.acknowledged) == ["6", "7", "8"]


async def test_one_that_cannot_be_read_among_what_needs_nothing_opens_no_breaker(
    clock: FakeClock,
) -> None:
    """No start has failed."""
    gathering = Gathering(max_retries=0)

    async def needed(ids: list[int]) -> list[int]:
        if 7 in ids:
            raise KeyError("strange row")
        return []

    gathering.heart.task.needed(needed)
    gathering.send_each(range(1, 65))
    async with running(gathering.heart):
        await clock.advance(5, step=0.1)

        assert gathering.heart.consumer.breaker.reason == ""
    assert len(gathering.heart.broker.acknowledged) >= 63


async def test_a_charge_that_never_arrived_takes_no_death_back() -> None:
    class Database:
        async def each(self, *statements: str, args: Any = None) -> list[Answer]:
            return [Answer(0, []) for _ in statements]

    database: Any = Database()
    deaths = Deaths(database, {"task": "shop", "lock": "l", "worker": "w"})
    row: Any = SimpleNamespace(running=None, deaths=None)
    found = [("killer", 1, 1, 2, None)]  # others have counted two
    await deaths.review(row, found)

    deaths.note(["killer"])
    await deaths.withdraw()
    await deaths.review(row, found)

    assert deaths.of("killer") == 2


# What bounds them.


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


async def test_after_slow_reads_a_start_that_is_due_is_filled(clock: FakeClock) -> None:
    gathering = Gathering()

    async def needed(ids: list[int]) -> list[int]:
        await asyncio.sleep(0.3 if len(ids) > 100 else 0.005)
        return ids if len(ids) < 100 else ids[:1]

    gathering.heart.task.needed(needed)
    gathering.send(range(1000, 2000))
    async with running(gathering.heart):
        await clock.advance(3 * INTERVAL, step=0.05)
        gathering.send_each(range(1, 51), QUEUES.urgent)
        await clock.advance(2, step=0.05)

    assert [len(run) for run in gathering.runs] == [1, 50]


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


@pytest.mark.parametrize("most", [12, 3])
async def test_what_messages_keep_in_memory_bounds_a_start(clock: FakeClock, most: int) -> None:
    """Bodies; and of rows their text, however small it was packed."""

    async def price(rows: list[tuple[int, str]]) -> None:
        pass

    heart = gathering_with(price)
    packs = most == 3
    for number in range(20):
        text = "x" * (4 * 2**20 - 2**10 if packs else 2**19)
        body = json.dumps([[[[number, text]]], {}, None]).encode()
        headers = {"compression": "application/x-gzip"} if packs else {}
        heart.broker.send(zlib.compress(body) if packs else body, id=str(number), **headers)

    await heart.run_for(clock, 2)

    assert heart.budget.starts == [most]


async def test_a_start_that_is_called_off_keeps_the_turn_of_the_bulk_lane(
    clock: FakeClock,
) -> None:
    gathering = Gathering(chunk_size=2)
    heart = gathering.heart
    gathering.send_each(range(1, 41), QUEUES.urgent)
    for first in range(1001, 1020, 2):
        gathering.send([first, first + 1])
    async with running(heart):
        for _ in range(4):
            await clock.advance(INTERVAL / 2, step=0.5)
            heart.budget.refusal = PAUSED
            await clock.advance(3, step=0.5)
            heart.budget.refusal = None
            await clock.advance(INTERVAL / 2, step=0.5)

    begun = ["bulk" if run[0] > 1000 else "urgent" for run in gathering.runs]
    assert ("urgent", "urgent") not in pairwise(begun)
    assert len(begun) > 2


# What is said of them.


async def test_several_that_expire_while_they_are_held_are_warned_of(
    clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    gathering = Gathering()
    heart = gathering.heart
    gathering.send([1])
    async with running(heart):
        await clock.advance(12)
        caplog.set_level(logging.INFO, "aioworker.consumer")
        expires = own_time() + timedelta(hours=1)
        gathering.send([2], QUEUES.bulk, expires=expires.isoformat())
        gathering.send([3], QUEUES.bulk, expires=expires.isoformat())
        await clock.advance(4)
        heart.budget.now = lambda: expires  # type: ignore[method-assign]
        await clock.advance(INTERVAL, step=0.5)

    assert [(level, words) for level, words, _ in told(caplog)] == [("WARNING", "chunks expired")]


@pytest.mark.parametrize(
    ("chunks", "words", "missing"),
    [
        ([[1, 1001], [2, 1002]], "start done", 2),
        ([[1001], [1002, 1003]], "nothing to write", 3),
        ([[1, 1001]], "chunk done", 1),
    ],
)
async def test_what_reads_have_counted_is_in_the_line(
    clock: FakeClock,
    caplog: pytest.LogCaptureFixture,
    chunks: list[list[int]],
    words: str,
    missing: int,
) -> None:
    """As the main job counts ids that are missing: in `needed`, which leaves them out."""
    caplog.set_level(logging.INFO, "aioworker.consumer")

    async def refresh(ctx: Context, ids: list[int]) -> None:
        ctx.changed(ids)
        ctx.counts["missing"] += 0

    async def needed(ctx: Context, ids: list[int]) -> list[int]:
        ctx.counts["missing"] += sum(one >= 1000 for one in ids)
        return [one for one in ids if one < 1000]

    heart = Heart(refresh, rate="2/m", gather_seconds=GATHER_SECONDS)
    heart.task.needed(needed)
    for chunk in chunks:
        heart.broker.send(json.dumps([[chunk], {}, None]).encode(), id=str(chunk[0]))

    await heart.run_for(clock, 2)

    assert [(line, fields["missing"]) for _, line, fields in told(caplog)] == [(words, missing)]


async def test_the_time_of_what_needs_nothing_is_its_own(
    clock: FakeClock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The read takes 3 s; a message that was refused before it had ended by then."""
    passed, monotonic = [0.0], time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + passed[0])
    gathering = Gathering()

    async def needed(_ids: list[int]) -> list[int]:
        passed[0] += 3
        return []

    gathering.heart.task.needed(needed)
    gathering.send([20])
    gathering.heart.broker.send(b"nonsense", QUEUES.bulk, id="bad")
    caplog.set_level(logging.INFO, "aioworker.consumer")

    await gathering.heart.run_for(clock, 1)

    [seconds] = [
        fields["run_seconds"] for _, words, fields in told(caplog) if words == "chunk done"
    ]
    assert seconds >= 3
