"""Chunks that need nothing cost no start, and no start waits for more than one read of them."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

import pytest

from tests.doubles.gathering import INTERVAL, Gathering, Ids
from tests.doubles.heart import running
from tests.doubles.lanes import QUEUES
from tests.fakes import FakeClock

CHUNKS, SIZE = 1000, 10


class Read(NamedTuple):
    """A read of what needs writing, by the clock."""

    began: float
    ended: float
    ids: Ids


class Slow(Gathering):
    """A heart whose reads take a while, each of one chunk; `all_reads` has them."""

    def __init__(self, clock: FakeClock, read_seconds: float, stale: set[int]) -> None:
        super().__init__(stale=stale, chunk_size=SIZE)
        self.all_reads: list[Read] = []

        async def needed(ids: Ids) -> Ids:
            began = clock.now
            await asyncio.sleep(read_seconds)
            self.all_reads.append(Read(began, clock.now, ids))
            return [one for one in ids if one in stale]

        self.heart.task.needed(needed)

    def send_unneeded(self) -> None:
        """Publish a thousand chunks that need nothing."""
        for first in range(100, 100 + CHUNKS * SIZE, SIZE):
            self.send(range(first, first + SIZE))


@pytest.mark.parametrize("seconds", [0.25, 1, 5])
async def test_a_start_that_is_due_waits_for_one_read_at_most(
    clock: FakeClock, seconds: float
) -> None:
    """A thousand chunks that need nothing lie behind what it writes."""
    slow = Slow(clock, seconds, {1, 2})
    slow.send([1])
    async with running(slow.heart):
        await clock.advance(7, step=0.25)
        slow.send([2])
        slow.send_unneeded()
        await clock.advance(INTERVAL + 7, step=0.25)

    assert slow.runs == [[1], [2]]
    first, second = slow.heart.budget.moments
    before = [read for read in slow.all_reads if read.ended <= second]
    assert len(before) > 3, "it uses the time until then"
    assert len([read for read in before if read.ended > first + INTERVAL]) <= 1


@pytest.mark.parametrize("seconds", [0.25, 1, 5])
async def test_a_change_overtakes_chunks_that_need_nothing(
    clock: FakeClock, seconds: float
) -> None:
    """A start has been due for long: it begins with the read that has the change."""
    slow = Slow(clock, seconds, {1})
    slow.send_unneeded()
    async with running(slow.heart):
        await clock.advance(12, step=0.25)
        slow.send([1], QUEUES.urgent)
        published, after = clock.now, len(slow.acknowledged)
        await clock.advance(3 * seconds + 3, step=0.25)

        assert slow.runs == [[1]]
    [start] = slow.heart.budget.moments
    since = [read for read in slow.all_reads if published < read.began < start]
    assert [1 in read.ids for read in since] == [True]
    assert 0 < after < CHUNKS
    assert slow.heart.budget.starts == [1], "those that need nothing are not charged"
