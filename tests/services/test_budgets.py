"""What a worker relies on of its budget: the shared one, a process's own, and the one in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from aioworker.budget.shared import SharedBudget
from aioworker.clock import own_time
from aioworker.limits import POLL_SECONDS, Budget, RateLimit, Wait, WorkerBudget
from aioworker.reasons import ReasonKind
from tests.conftest import TASK
from tests.doubles.budget import MemoryBudget

if TYPE_CHECKING:
    from aioworker.mysql.database import Database

Make = Callable[[str | None], Budget]
SECONDS = 20


def parsed(rate: str | None) -> RateLimit | None:
    """Return a rate limit as a budget takes it."""
    return None if rate is None else RateLimit.parse(rate)


@pytest.fixture(params=["shared", "worker", "memory"])
def make(request: pytest.FixtureRequest) -> Make:
    """Make a budget of a rate."""
    if request.param == "memory":
        return MemoryBudget
    if request.param == "worker":
        return lambda rate: WorkerBudget(parsed(rate))
    request.getfixturevalue("shop")
    database: Database = request.getfixturevalue("database")
    return lambda rate: SharedBudget(database, TASK, parsed(rate), "test")


async def start(budget: Budget, message: str = "one") -> Wait | None:
    """Begin a start as a session does: look, have the turn, charge; return why not."""
    if (wait := await budget.check()) is not None:
        return wait
    async with budget.turn() as wait:
        if wait is None:
            wait = await budget.charge([message])
            await budget.ended([message])
    return wait


async def start_when_due(budget: Budget) -> float:
    """Begin a start once it is due; return when that was, by the event loop's clock."""
    async with asyncio.timeout(SECONDS):
        while (wait := await start(budget)) is not None:  # noqa: ASYNC110 - it says how long
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


async def test_of_a_message_that_never_ran_no_death_is_known(make: Make) -> None:
    budget = make("100/s")
    await start_when_due(budget)

    assert budget.deaths("another") == 0
    assert budget.deaths("one") == 0


async def test_a_budget_tells_the_time_of_day(make: Make) -> None:
    budget = make("2/m")
    await budget.check()

    assert abs(budget.now() - own_time()) < timedelta(seconds=SECONDS)
