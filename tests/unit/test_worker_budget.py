"""The budget of one process alone."""

from __future__ import annotations

import asyncio

from aioworker.limits import LEAD_SECONDS, RateLimit, WorkerBudget
from tests.fakes import FakeClock


async def test_a_start_is_charged_at_the_moment_it_is_due(clock: FakeClock) -> None:
    """Its message is taken before: taking and reading cost nothing of the rate."""
    budget = WorkerBudget(RateLimit.parse("1/s"))
    charged_at: list[float] = []
    wait = await budget.check()
    assert wait is not None
    assert wait.seconds == 1 - LEAD_SECONDS

    async def start() -> None:
        assert await budget.check() is None
        assert await budget.charge(["one"]) is None
        charged_at.append(clock.now)

    for _ in range(3):
        await clock.advance(1 - LEAD_SECONDS, step=0.125)
        starting = asyncio.create_task(start())
        await clock.advance(LEAD_SECONDS, step=0.001)
        await starting

    assert charged_at == [1, 2, 3]
