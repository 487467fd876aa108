"""Changes, messages, reads and runs in any order: the last change is written, the later row wins.

COALESCING_SEED sets what is drawn; it is printed.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any, NamedTuple

from aioworker.clock import own_time
from aioworker.limits import Wait
from aioworker.rabbitmq.message import PUBLISHED, milliseconds
from aioworker.reasons import Reason, ReasonKind
from aioworker.tasks.context import Context
from tests.doubles.gathering import INTERVAL, Gathering
from tests.doubles.heart import Heart, running
from tests.doubles.lanes import QUEUES
from tests.fakes import FakeClock

SEED = int(os.environ.get("COALESCING_SEED") or random.randrange(2**32))
DRAWN = 100  # interleavings of each kind
MESSAGES = 25
IDS = range(1, 7)
LONGEST_SECONDS = 600
STEP_SECONDS = 0.5
SINGLE, CHUNKS, SIZE = 500, 6, 500
PAUSED = Wait(Reason(ReasonKind.PAUSED, "paused by alice"), 2)
PUBLISHED_AT = own_time()


class Sent(NamedTuple):
    """A message of rows.

    Args:
        moment: When it was published, in seconds, as its header says; None if it does not.
        urgent: Whether it went to the urgent lane.
        rows: Its rows: id and value.
    """

    moment: int | None
    urgent: bool
    rows: dict[int, int]


class Site:
    """A table that is changed while a worker keeps another one up to date with it.

    Args:
        chance: Draws how long each step takes, and all else.

    Attributes:
        truth: What each id should hold.
        stored: What it holds.
        runs: What ran, each time.
        sent: The ids of the messages.
    """

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.truth = dict.fromkeys(IDS, 0)
        self.stored = dict.fromkeys(IDS, 0)
        self.runs: list[list[int]] = []
        self.sent: list[str] = []
        self.heart = draw_heart(chance, self._refresh)
        self.heart.task.needed(self._needed)

    async def _needed(self, ids: list[int]) -> list[int]:
        """Read what is stale at one moment; the answer takes a while."""
        await self.pass_time()
        stale = [one for one in ids if self.stored[one] != self.truth[one]]
        await self.pass_time()
        return stale

    async def _refresh(self, _ctx: Context, ids: list[int]) -> None:
        """Read the right values at one moment, and write them a while later."""
        self.runs.append(ids)
        await self.pass_time()
        read = {one: self.truth[one] for one in ids}
        await self.pass_time()
        self.stored |= read

    async def pass_time(self) -> None:
        """Take no time or some."""
        await asyncio.sleep(self.chance.choice([0, 0, 0.2, 1]))

    async def change(self) -> None:
        """Change some rows and publish their ids, again and again; pause the task meanwhile."""
        for number in range(MESSAGES):
            await asyncio.sleep(self.chance.choice([0, 0, 0.1, 2]))
            ids = self.chance.sample(IDS, self.chance.choice([1, 1, 3]))
            for one in ids:
                self.truth[one] += 1
            await self.pass_time()
            self.sent.append(str(number))
            # Whatever the publisher's clock says.
            at = PUBLISHED_AT + timedelta(seconds=self.chance.randrange(60))
            send(self.heart, number, ids, at, urgent=self.chance.random() < 0.5)
            self.heart.budget.refusal = PAUSED if self.chance.random() < 0.1 else None
        self.heart.budget.refusal = None


class Prices:
    """A table whose rows come by messages; `sent` has those by their ids, `runs` what ran."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.sent: dict[str, Sent] = {}
        self.runs: list[tuple[tuple[str, ...], list[tuple[int, int]]]] = []
        self._stored: dict[int, int] = {}
        self.heart = draw_heart(chance, self._price)
        self.heart.task.needed(self._needed)

    async def _price(self, ctx: Context, rows: list[tuple[int, int]]) -> None:
        self.runs.append((ctx.messages, rows))
        self._stored.update(rows)

    async def _needed(self, rows: list[tuple[int, int]]) -> list[tuple[int, int]]:
        await asyncio.sleep(self.chance.choice([0, 0.2]))
        return [(one, price) for one, price in rows if self._stored.get(one) != price]

    async def publish(self) -> None:
        """Publish rows whose times are in no order, or not known."""
        timed = self.chance.random() < 0.8
        for number in range(MESSAGES):
            await asyncio.sleep(self.chance.choice([0, 0, 0.1, 1]))
            ids = self.chance.sample(IDS, self.chance.choice([1, 1, 3]))
            moment = self.chance.randrange(4) if timed else None
            one = Sent(
                moment, self.chance.random() < 0.5, {key: self.chance.randrange(3) for key in ids}
            )
            self.sent[str(number)] = one
            at = None if moment is None else PUBLISHED_AT + timedelta(seconds=moment)
            send(self.heart, number, list(one.rows.items()), at, urgent=one.urgent)


def draw_heart(chance: random.Random, work: Any) -> Heart:
    """Return a heart that gathers, of some rate and size."""
    return Heart(
        work,
        rate=chance.choice([None, "1/s", "6/m", "6/m", "2/m"]),
        gather_seconds=chance.choice([1, 20]),
        chunk_size=chance.choice([2, 5, 1000]),
    )


def send(heart: Heart, number: int, chunk: Any, at: datetime | None, *, urgent: bool) -> None:
    """Publish a message."""
    lane = QUEUES.urgent if urgent else QUEUES.bulk
    headers = {"id": str(number)} | ({} if at is None else {PUBLISHED: milliseconds(at)})
    heart.broker.send(json.dumps([[chunk], {}, None]).encode(), lane, **headers)


async def until_idle(heart: Heart, clock: FakeClock, publishing: asyncio.Task[None]) -> None:
    """Let time pass until all is published and settled."""
    ends = clock.now + LONGEST_SECONDS
    while not publishing.done() or heart.consumer.under_way or any(heart.broker.queues.values()):
        assert clock.now < ends, heart.broker.queues
        await clock.advance(STEP_SECONDS, step=STEP_SECONDS)
    publishing.result()


async def test_a_change_is_seen_whose_message_was_published_after_it(clock: FakeClock) -> None:
    """However reads, runs, pauses and further messages of the same ids fall together."""
    print(f"COALESCING_SEED={SEED}")  # noqa: T201 - whoever sees it fail needs it
    for number in range(DRAWN):
        site = Site(random.Random(f"{SEED} {number}"))
        async with running(site.heart):
            await until_idle(site.heart, clock, asyncio.create_task(site.change()))

        assert site.stored == site.truth, number
        assert sorted(site.heart.broker.acknowledged) == sorted(site.sent), number
        assert all(len(set(run)) == len(run) for run in site.runs), number


async def test_of_the_rows_of_one_id_the_last_that_was_published_wins(clock: FakeClock) -> None:
    """Of a start's messages: by their times, else urgent over bulk, else as they were taken."""
    print(f"COALESCING_SEED={SEED}")  # noqa: T201 - whoever sees it fail needs it
    for number in range(DRAWN):
        prices = Prices(random.Random(f"{SEED} {number}"))
        async with running(prices.heart):
            await until_idle(prices.heart, clock, asyncio.create_task(prices.publish()))

        for messages, run in prices.runs:
            taken = [prices.sent[one] for one in messages]
            # Of equal ones the last that was taken is the last here.
            taken.sort(key=lambda one: (one.moment or 0, one.urgent))
            last = {key: value for one in taken for key, value in one.rows.items()}
            assert all(last[key] == value for key, value in run), (number, messages)
            assert len(dict(run)) == len(run), number
        assert sorted(prices.heart.broker.acknowledged) == sorted(prices.sent), number


async def test_single_changes_wait_for_two_starts_at_most_and_do_not_stop_a_sweep(
    clock: FakeClock,
) -> None:
    """Five hundred within two intervals, one id each, in the middle of a sweep."""
    gathering = Gathering(chunk_size=SIZE)
    single = range(CHUNKS * SIZE + 1, CHUNKS * SIZE + 1 + SINGLE)
    for first in range(1, CHUNKS * SIZE, SIZE):
        gathering.send(range(first, first + SIZE))
    published: dict[int, int] = {}
    async with running(gathering.heart):
        await clock.advance(INTERVAL / 3, step=0.5)
        for one in single:
            gathering.send([one], QUEUES.urgent)
            published[one] = len(gathering.runs)
            await clock.advance(2 * INTERVAL / SINGLE, step=0.5)
        await clock.advance((CHUNKS + 1) * INTERVAL, step=0.5)

    starts = {one: number for number, run in enumerate(gathering.runs, 1) for one in run}
    assert {*starts} == set(range(1, single.stop))
    assert [one for one, at in published.items() if starts[one] > at + 2] == []
    advances = sorted({starts[one] for one in range(1, single.start)})
    assert all(later - earlier <= 2 for earlier, later in pairwise(advances))
