"""What a worker relies on of its budget: the shared one, a process's own, and the one in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING

import pytest

from aioworker.budget.shared import SharedBudget
from aioworker.clock import own_time
from aioworker.limits import POLL_SECONDS, RateLimit, TaskBudget, Wait, WorkerBudget
from aioworker.reasons import ReasonKind
from tests.conftest import TASK, make_database
from tests.doubles.budget import MemoryBudget

if TYPE_CHECKING:
    from aioworker.mysql.database import Database

Make = Callable[[str | None], TaskBudget]
SECONDS = 20


def parsed(rate: str | None) -> RateLimit | None:
    """Return a rate limit as a budget takes it."""
    return None if rate is None else RateLimit.parse(rate)


@pytest.fixture(params=["shared", "worker", "memory"])
async def make(request: pytest.FixtureRequest) -> AsyncIterator[Make]:
    """Make a worker's budget of a rate."""
    databases: list[Database] = []

    def shared(rate: str | None) -> TaskBudget:
        databases.append(make_database(request.getfixturevalue("pair")))
        return SharedBudget(databases[-1], TASK, parsed(rate), "test")

    if request.param == "memory":
        yield cache(MemoryBudget)  # one is all workers'
    elif request.param == "worker":
        yield lambda rate: WorkerBudget(parsed(rate))
    else:
        request.getfixturevalue("shop")
        yield shared
    for database in databases:
        database.close()


async def start(
    budget: TaskBudget, message: str = "one", *, bulk_next: bool = False
) -> Wait | None:
    """Begin a start as a session does: look, have the turn, charge; return why not."""
    if (wait := await budget.check()) is not None:
        return wait
    async with budget.turn() as wait:
        if wait is None:
            wait = await budget.charge([message], bulk_next=bulk_next)
            await budget.ended([message])
    return wait


async def start_when_due(budget: TaskBudget, *, bulk_next: bool = False) -> float:
    """Begin a start once it is due; return when that was, by the event loop's clock."""
    async with asyncio.timeout(SECONDS):
        while (wait := await start(budget, bulk_next=bulk_next)) is not None:  # noqa: ASYNC110
            await asyncio.sleep(wait.seconds)
    return asyncio.get_running_loop().time()


async def test_without_a_rate_every_start_begins_at_once(make: Make) -> None:
    budget = make(None)

    waits = [await start(budget, str(number)) for number in range(5)]

    assert waits == [None] * 5
    assert (budget.limited, budget.interval) == (False, 0)


async def test_a_rate_of_nothing_is_a_pause(make: Make) -> None:
    budget = make("0/m")

    wait = await budget.check()

    assert wait is not None
    assert (wait.reason.kind, wait.reason.words) == (ReasonKind.PAUSED, "paused: rate limit 0/m")


async def test_behind_a_start_the_next_one_waits_for_its_interval(make: Make) -> None:
    budget = make("30/m")
    await start_when_due(budget)

    wait = await budget.check()

    assert (budget.limited, budget.interval) == (True, 2)
    assert wait is not None
    assert wait.reason.kind is ReasonKind.BUDGET
    assert wait.reason.words.startswith("budget: next start at ")
    assert 0 < wait.seconds <= 2


async def test_a_long_wait_is_looked_at_again_soon(make: Make) -> None:
    """What is set meanwhile is followed."""
    budget = make("1/h")
    await start(budget)

    wait = await budget.check()

    assert wait is not None
    assert wait.seconds <= POLL_SECONDS


async def test_who_has_the_turn_before_a_start_is_due_hears_so(make: Make) -> None:
    budget = make("30/m")
    await start_when_due(budget)

    async with budget.turn() as wait:
        assert wait is not None
        assert wait.reason.kind is ReasonKind.BUDGET


async def test_starts_are_an_interval_apart(make: Make) -> None:
    budget = make("20/s")

    before = asyncio.get_running_loop().time()
    for _ in range(6):
        after = await start_when_due(budget)

    # The first charge comes behind the one moment, the last one before the other.
    assert after - before >= 5 * 0.05 * 0.98, "two clocks may differ a little"


SHARED = pytest.mark.parametrize("make", ["shared", "memory"], indirect=True)


@SHARED
async def test_a_turn_that_another_worker_has_is_not_had(make: Make) -> None:
    budget, other = make("100/s"), make("100/s")
    await start_when_due(other)
    await start_when_due(budget)

    async with budget.turn(), other.turn() as wait:
        assert wait is not None
        assert wait.reason.words.startswith("turn: held by ")
        assert wait.seconds < 1


@pytest.mark.parametrize("rate", [None, "100/s"])
async def test_a_start_tells_whether_the_bulk_lane_is_next(make: Make, rate: str | None) -> None:
    budget = make(rate)
    told = [budget.bulk_next]

    for bulk_next in (True, False):
        await start_when_due(budget, bulk_next=bulk_next)
        await budget.check()
        told.append(budget.bulk_next)

    assert told == [False, True, False]


@SHARED
async def test_which_lane_is_next_is_known_to_all_workers(make: Make) -> None:
    """Else several workers begin one start after the other with the urgent lane."""
    budget, other = make("100/s"), make("100/s")
    told = []

    for bulk_next in (True, False):
        await start_when_due(budget, bulk_next=bulk_next)
        await other.check()
        told.append(other.bulk_next)

    assert told == [True, False]


async def test_of_a_message_that_never_ran_no_death_is_known(make: Make) -> None:
    budget = make("100/s")
    await start_when_due(budget)

    assert budget.deaths("another") == 0
    assert budget.deaths("one") == 0


async def test_a_budget_tells_the_time_of_day(make: Make) -> None:
    budget = make("2/m")
    await budget.check()

    assert abs(budget.now() - own_time()) < timedelta(seconds=SECONDS)


async def test_nothing_stops_a_run_that_nobody_paused(make: Make) -> None:
    budget = make("1/h")
    if isinstance(budget, WorkerBudget):
        assert await budget.stops_run() is None  # it waits an interval before its first start
        return
    assert await budget.check() is None

    async with budget.turn():
        assert await budget.charge(["one"]) is None
        assert await budget.stops_run() is None
        await budget.ended(["one"])
