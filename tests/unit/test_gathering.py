"""Several messages become one start: what comes before it is due, and no later."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from contextlib import AsyncExitStack
from itertools import pairwise

import pytest

from aioworker.limits import Wait
from tests.doubles.gathering import GATHER_SECONDS, INTERVAL, PAUSED, Gathering, Ids
from tests.doubles.heart import Heart, running
from tests.doubles.lanes import QUEUES
from tests.fakes import FakeClock


async def test_fifty_single_changes_are_one_start(clock: FakeClock) -> None:
    gathering = Gathering()
    gathering.send_each(range(1, 51), QUEUES.urgent)

    await gathering.heart.run_for(clock, 2)

    assert gathering.runs == [list(range(1, 51))]
    assert gathering.heart.budget.starts == [50]
    assert gathering.acknowledged == [str(one) for one in range(1, 51)]


async def test_what_several_messages_need_is_asked_in_one_read(clock: FakeClock) -> None:
    gathering = Gathering(stale={3})
    gathering.send_each(range(1, 51))

    await gathering.heart.run_for(clock, 2)

    assert gathering.reads == [list(range(1, 51))]
    assert gathering.runs == [[3]]
    assert gathering.acknowledged[-1] == "3", "those that need nothing are done before"


async def test_a_sweep_of_which_little_is_stale_is_one_start(clock: FakeClock) -> None:
    stale = {1, 1001, 2001, 3001}
    gathering = Gathering(stale=set(stale))
    gathering.send_chunks(range(1, 5001, 1000))

    await gathering.heart.run_for(clock, 2)

    assert gathering.runs == [sorted(stale)]
    assert gathering.queued() == []


async def test_what_comes_before_the_start_is_due_goes_along(clock: FakeClock) -> None:
    gathering = Gathering()
    gathering.send([1])
    async with running(gathering.heart):
        await clock.advance(5)
        assert gathering.runs == [[1]]
        for one in range(2, 6):
            gathering.send([one], QUEUES.urgent)
            await clock.advance(5)
            assert gathering.runs == [[1]], f"at {clock.now} s"
        await clock.advance(6, step=0.1)

    assert gathering.runs == [[1], [2, 3, 4, 5]]
    assert gathering.heart.budget.moments[1] == pytest.approx(INTERVAL, abs=1)


async def test_nothing_is_held_before_the_gathering_begins(clock: FakeClock) -> None:
    gathering = Gathering()
    gathering.send([1])
    async with running(gathering.heart):
        await clock.advance(1, step=0.1)
        gathering.send([2])
        while clock.now < INTERVAL - GATHER_SECONDS - 1:
            assert gathering.heart.lanes.held == {}, f"at {clock.now} s"
            await clock.advance(1)
        await clock.advance(3)

        assert len(gathering.heart.lanes.held) == 1
        assert gathering.heart.said[-1] == "waiting: gathering: 1 message, 1 id to write"


async def test_of_two_starts_in_a_row_one_begins_with_the_bulk_lane(clock: FakeClock) -> None:
    """A steady stream of single changes never stops a sweep."""
    gathering = Gathering(chunk_size=2)
    gathering.send_each(range(1, 9), QUEUES.urgent)
    for first in (11, 21):
        gathering.send([first, first + 1])

    await gathering.heart.run_for(clock, 4 * INTERVAL, step=0.5)

    assert gathering.runs[:4] == [[1, 2], [11, 12], [3, 4], [21, 22]]


async def test_of_two_starts_of_four_workers_one_begins_with_the_bulk_lane(
    clock: FakeClock,
) -> None:
    """Each of them knew its own last start alone, and the urgent lane had several in a row."""
    starts: list[tuple[int, str]] = []
    chance = random.Random(0)

    def make(number: int, beside: Heart | None = None) -> Gathering:
        async def note(ids: Ids) -> None:
            starts.append((number, "urgent" if ids[0] < 1000 else "bulk"))

        return Gathering(note, chunk_size=2, beside=beside)

    first = make(0)
    fleet = [first, *(make(number, first.heart) for number in range(1, 4))]
    budget = first.heart.budget
    check = budget.check

    async def soon(contenders: int = 0) -> Wait | None:
        await asyncio.sleep(chance.random())  # so that any of them may be next
        return await check(contenders)

    budget.check = soon  # type: ignore[method-assign]
    first.send_each(range(1, 1000), QUEUES.urgent)
    first.send_chunks(range(1001, 1201, 2))
    async with AsyncExitStack() as stack:
        for one in fleet:
            await stack.enter_async_context(running(one.heart))
        await clock.advance(20 * INTERVAL, step=0.5)

    assert {number for number, _lane in starts} == {0, 1, 2, 3}
    assert [lane for _number, lane in starts] == ["urgent", "bulk"] * 10


async def test_a_start_of_both_lanes_is_followed_by_one_that_begins_with_the_urgent_lane(
    clock: FakeClock,
) -> None:
    """The sweep has advanced: a change that came too late for it waits for no second start."""
    gathering = Gathering(chunk_size=3)
    gathering.send([1], QUEUES.urgent)
    for first in (11, 21, 31):
        gathering.send([first, first + 1, first + 2])
    async with running(gathering.heart):
        await clock.advance(1, step=0.1)
        gathering.send([2], QUEUES.urgent)
        await clock.advance(INTERVAL, step=0.5)

    assert gathering.runs == [[1, 11, 12, 13], [2, 21, 22, 23]]


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


async def test_without_a_rate_what_is_there_is_one_start(clock: FakeClock) -> None:
    gathering = Gathering(rate=None)
    gathering.send_each(range(1, 1001))

    await gathering.heart.run_for(clock, 4)

    assert gathering.runs == [list(range(1, 1001))]
    assert gathering.reads == [], "the run finds out itself"


@pytest.mark.parametrize("off", ["seconds", "task"])
async def test_gathering_can_be_turned_off(clock: FakeClock, off: str) -> None:
    gathering = Gathering(gather_seconds=0 if off == "seconds" else GATHER_SECONDS)
    if off == "task":
        gathering.heart.task.options = gathering.heart.task.options.__class__(gather=False)
    gathering.send([1])
    gathering.send([2])

    await gathering.heart.run_for(clock, 2)

    assert gathering.runs == [[1]]


async def test_a_single_change_waits_for_nothing_if_its_start_is_due(clock: FakeClock) -> None:
    gathering = Gathering()
    gathering.send([1], QUEUES.urgent)

    async with running(gathering.heart):
        await clock.advance(0, step=0.1)

        assert gathering.acknowledged == ["1"]


async def test_a_read_that_would_end_too_late_is_not_begun(clock: FakeClock) -> None:
    """A thousand chunks that need nothing delay no start once a read's length is known."""
    gathering = Gathering(stale={1, 2})
    gathering.send([1])

    async def slow(ids: list[int]) -> list[int]:
        clock.now += 8
        gathering.reads.append(ids)
        return [one for one in ids if one in (1, 2)]

    gathering.heart.task.needed(slow)
    async with running(gathering.heart):
        await clock.advance(5)
        gathering.send([2])
        gathering.send_chunks(range(1000, 20_000, 1000))
        await clock.advance(INTERVAL, step=0.5)

    assert gathering.runs == [[1], [2]]
    assert gathering.heart.budget.moments[1] - gathering.heart.budget.moments[0] <= INTERVAL + 1
    assert gathering.queued() != [], "the rest is for the next start"


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


async def test_an_urgent_message_waits_behind_no_sweep_that_needs_nothing(
    clock: FakeClock,
) -> None:
    gathering = Gathering(stale={7, 8})

    async def needed(ids: list[int]) -> list[int]:
        await asyncio.sleep(0.3)
        return [one for one in ids if one in (7, 8)]

    gathering.heart.task.needed(needed)
    gathering.send([7], QUEUES.urgent)
    async with running(gathering.heart):
        await clock.advance(3, step=0.1)
        gathering.send_chunks(range(10_000, 510_000, 1000))
        gathering.send([8], QUEUES.urgent)
        await clock.advance(INTERVAL, step=0.1)

    assert gathering.runs == [[7], [8]]


async def test_who_waits_with_the_turn_rests_and_who_reads_or_runs_does_not(
    clock: FakeClock,
) -> None:
    """A host that is lost while it only waits loses its turn soon; a run may be long."""

    async def run(_ids: Ids) -> None:
        seen.append(f"run: {gathering.heart.budget.resting}")

    gathering = Gathering(run)
    seen: list[str] = []

    async def needed(ids: list[int]) -> list[int]:
        seen.append(f"read: {gathering.heart.budget.resting}")
        return ids

    gathering.heart.task.needed(needed)
    gathering.send([1])
    async with running(gathering.heart):
        await clock.advance(5)
        for one in (2, 3):
            gathering.send([one])
            await clock.advance(10)
            seen.append(f"wait: {gathering.heart.budget.resting}")
        await clock.advance(INTERVAL)

    read, wait, run_ = "read: False", "wait: True", "run: False"
    assert seen == [read, run_, read, wait, read, wait, run_]


@pytest.mark.parametrize(("rate", "spare"), [("2/m", 0.25), ("1/s", 0.05)])
async def test_a_moment_of_the_wait_is_left_to_the_charge(
    clock: FakeClock, rate: str, spare: float
) -> None:
    """What is gathered is charged as soon as the start is due, not when somebody looks next."""
    gathering = Gathering(rate=rate)
    budget = gathering.heart.budget
    charge, early = budget.charge, list[float]()

    async def noting(
        messages: Sequence[str], *, ids: int | None = None, bulk_next: bool = False
    ) -> Wait | None:
        early.append(budget.due_at - clock.now)
        return await charge(messages, ids=ids, bulk_next=bulk_next)

    budget.charge = noting  # type: ignore[method-assign]
    gathering.send([1])
    async with running(gathering.heart):
        await clock.advance(0)
        gathering.send([2])
        await clock.advance(1.1 * budget.interval, step=0.01)

    assert early[0] == 0
    assert spare - 0.02 < early[1] <= spare


async def test_a_worker_that_gathers_keeps_its_row(clock: FakeClock) -> None:
    gathering = Gathering()
    keep, kept = gathering.heart.worker.presence.keep, list[float]()

    async def noting() -> None:
        kept.append(clock.now)
        await keep()

    gathering.heart.worker.presence.keep = noting  # type: ignore[method-assign]
    gathering.send([1])
    async with running(gathering.heart):
        await clock.advance(1, step=0.1)
        gathering.send([2])
        await clock.advance(INTERVAL - 2, step=0.1)
        assert gathering.runs == [[1]]
        kept.append(clock.now)

    assert max(later - earlier for earlier, later in pairwise(kept)) < 3
