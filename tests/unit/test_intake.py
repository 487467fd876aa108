"""Several messages at once, without a broker."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from aioworker.rabbitmq.delivery import Delivery
from aioworker.settling.outcome import Kind, Outcome
from aioworker.worker.intake import Intake
from tests.fakes import delivered


def delivery(message: str) -> Delivery:
    headers: Any = {"id": message}
    return Delivery.of(delivered(headers=headers))


FIRST, SECOND, THIRD = map(delivery, ("first", "second", "third"))


@pytest.mark.parametrize("ended", [False, True], ids=["it goes on", "it has ended"])
async def test_what_was_taken_before_a_flow_is_served(*, ended: bool) -> None:
    """Its channel stays open: left alone it would be held until RabbitMQ closes that."""
    served: list[str] = []

    async def serve(delivery: Delivery) -> Outcome:
        served.append(delivery.id)
        return Outcome(Kind.ACK)

    intake = Intake(serve, FIRST)
    if ended:
        intake.ended.set()

    async with intake:
        pass

    assert served == ["first"]


async def test_what_comes_before_a_flow_begins_is_served_and_behind_its_end_left() -> None:
    """Nobody would wait for its end before; behind the end it goes back with its channel."""
    served: list[str] = []

    async def serve(delivery: Delivery) -> Outcome:
        served.append(delivery.id)
        return Outcome(Kind.RELEASED if delivery is SECOND else Kind.ACK)

    intake = Intake(serve, FIRST)
    intake.begin(SECOND)
    await asyncio.sleep(0)
    assert served == []

    async with intake:
        await intake.ended.wait()
        intake.begin(THIRD)

    assert served == ["first", "second"]
    assert (intake.served, intake.failure) == (2, Outcome(Kind.RELEASED))


async def test_one_that_cannot_be_settled_ends_the_flow_after_the_others() -> None:
    """The others are not cut off in the middle."""
    ended: list[str] = []

    async def serve(delivery: Delivery) -> Outcome:
        if delivery is FIRST:
            raise ConnectionError("lost")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        ended.append(delivery.id)
        raise ConnectionError("lost too")

    intake = Intake(serve, FIRST)
    intake.begin(SECOND)

    with pytest.raises(ConnectionError, match=r"^lost$"):
        async with intake:
            await intake.ended.wait()

    assert ended == ["second"]


async def test_what_runs_is_cut_off_with_the_worker() -> None:
    cut_off: list[str] = []

    async def serve(delivery: Delivery) -> Outcome:
        try:
            await asyncio.Event().wait()
        finally:
            cut_off.append(delivery.id)
        return Outcome(Kind.ACK)

    async def run() -> None:
        async with Intake(serve, FIRST):
            await asyncio.Event().wait()

    running = asyncio.create_task(run())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    running.cancel()
    await asyncio.wait({running})

    assert cut_off == ["first"]
