"""What aioworker stands on; read this first."""

from __future__ import annotations

import asyncio

from aioworker.limits import Limiter, RateLimit, WorkerBudget
from aioworker.rabbitmq.queues import Queues
from aioworker.reasons import Reason, ReasonKind
from tests.fakes import FakeClock


async def starts_of(limiter: Limiter, clock: FakeClock, count: int) -> list[float]:
    """Start *count* times as soon as each is due, and return when that was."""
    started_at: list[float] = []

    async def start() -> None:
        for _ in range(count):
            while seconds := limiter.due_in():  # noqa: ASYNC110 - on the fake clock
                await asyncio.sleep(seconds)
            await limiter.charge()
            started_at.append(round(clock.now, 6))

    starting = asyncio.create_task(start())
    while not starting.done():
        await clock.advance(1)
    return started_at


async def test_two_a_minute_is_one_every_thirty_seconds(clock: FakeClock) -> None:
    """Not two at once and then a minute of nothing: the database feels each start."""
    limiter = Limiter(RateLimit.parse("2/m").interval)

    assert await starts_of(limiter, clock, 4) == [0, 30, 60, 90]


async def test_an_idle_hour_does_not_earn_a_burst(clock: FakeClock) -> None:
    """A sweep after a quiet night begins as gently as any other."""
    limiter = Limiter(RateLimit.parse("2/m").interval)
    assert await starts_of(limiter, clock, 1) == [0]

    await clock.advance(3600 - clock.now)

    assert await starts_of(limiter, clock, 3) == [3600, 3630, 3660]


async def test_a_rate_of_nothing_is_paused_and_not_unlimited() -> None:
    """Celery takes 0/m for no limit at all."""
    budget = WorkerBudget(RateLimit.parse("0/m"))

    wait = await budget.check()

    assert wait is not None
    assert wait.reason == Reason(ReasonKind.PAUSED, "paused: rate limit 0/m")


def test_a_task_has_four_queues_named_after_it() -> None:
    """The names are what an operator types, and a contract with other producers."""
    assert Queues.of("update_current_version", "aioworker") == Queues(
        bulk="aioworker.update_current_version",
        urgent="aioworker.update_current_version.urgent",
        retry="aioworker.update_current_version.retry",
        dead="aioworker.update_current_version.dead",
    )
