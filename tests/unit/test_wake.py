"""How soon an idle worker notices a message, and whom it asks meanwhile."""

from __future__ import annotations

import pytest

from aioworker.worker.session import IDLE_SECONDS, LOOK_SECONDS
from tests.doubles.heart import Heart, running
from tests.doubles.lanes import QUEUES
from tests.fakes import FakeClock

STEP = 0.005


async def work() -> None:
    """Do nothing."""


@pytest.mark.parametrize(
    ("silence", "seconds"),
    [(0.5, LOOK_SECONDS), (4.9, LOOK_SECONDS), (20.0, 0.4), (3600.0, 1.0)],
)
async def test_an_idle_worker_notices_a_message(
    clock: FakeClock, silence: float, seconds: float
) -> None:
    """At once after another one, within a second after an hour."""
    heart = Heart(work, rate="100/s")
    heart.broker.send(lane=QUEUES.urgent)
    async with running(heart):
        await clock.advance(0.1, STEP)
        assert heart.broker.acknowledged == ["one"]
        await clock.advance(silence - 0.1, 0.01 if silence < 60 else IDLE_SECONDS)
        sent_at = clock.now
        heart.broker.send(lane=QUEUES.urgent)
        while len(heart.broker.acknowledged) < 2 and clock.now < sent_at + 2:
            await clock.advance(STEP, STEP)

    # A start is made 10 ms after the last at the earliest, which is long ago.
    assert clock.now - sent_at <= seconds + 2 * STEP


async def test_while_nothing_is_queued_rabbitmq_alone_is_asked_often(clock: FakeClock) -> None:
    heart = Heart(work, rate="100/s")

    await heart.run_for(clock, 60, 0.01)

    looks = heart.steps.count("hold_something")
    lively = 5 / LOOK_SECONDS
    assert heart.budget.asked <= 60 / IDLE_SECONDS + 1
    assert lively < looks < 2 * lively


async def test_a_stop_is_heeded_between_two_looks(clock: FakeClock) -> None:
    heart = Heart(work, rate="100/s")
    async with running(heart) as serving:
        await clock.advance(120, 0.1)
        heart.stop.set()
        await clock.advance(STEP, STEP)

        assert serving.done()
