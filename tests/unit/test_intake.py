"""Several messages at once, without a broker."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from aioworker.rabbitmq.delivery import Delivery
from aioworker.settling.outcome import Kind, Outcome
from aioworker.worker.intake import Intake
from tests.fakes import TURNS, delivered


def delivery(message: str, body: bytes = b"body", *, again: bool = False, **more: Any) -> Delivery:
    headers: Any = {"id": message} | more
    return Delivery.of(delivered(body, redelivered=again, headers=headers))


FIRST, SECOND, THIRD = map(delivery, ("first", "second", "third"))
AGAIN = delivery("first", again=True)


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


async def test_what_is_delivered_again_while_it_runs_is_served_behind_its_run() -> None:
    """RabbitMQ may do so before it says that it closed the channel of that run."""
    steps: list[str] = []
    release = asyncio.Event()

    async def serve(delivery: Delivery) -> Outcome:
        name = "again" if delivery is AGAIN else delivery.id
        steps.append(f"{name} begins")
        if delivery is FIRST:
            await release.wait()
        steps.append(f"{name} ends")
        return Outcome(Kind.ACK)

    intake = Intake(serve, FIRST)
    async with intake:
        intake.begin(AGAIN)
        intake.begin(SECOND)
        await until_idle()
        release.set()
        await until_idle()

    assert steps == [
        "first begins",
        "second begins",
        "second ends",
        "first ends",
        "again begins",
        "again ends",
    ]
    assert intake.served == 3


async def test_what_is_delivered_again_goes_back_if_its_run_cannot_be_settled() -> None:
    """How its run ended is known when it comes once more, by a channel that is open."""
    served: list[Delivery] = []
    release = asyncio.Event()

    async def serve(delivery: Delivery) -> Outcome:
        served.append(delivery)
        await release.wait()
        raise ConnectionError("closed")

    intake = Intake(serve, FIRST)
    with pytest.raises(ConnectionError, match=r"^closed$"):
        async with intake:
            intake.begin(AGAIN)
            await until_idle()
            release.set()
            await intake.ended.wait()

    assert served == [FIRST]


@pytest.mark.parametrize(
    "other",
    [
        delivery("first"),
        delivery("other", again=True),
        delivery("first", b"other", again=True),
        delivery("first", again=True, retries=1),
    ],
    ids=["delivered once", "another id", "another body", "another attempt"],
)
async def test_another_message_waits_for_no_run(other: Delivery) -> None:
    """Publishers may give all their messages one id."""
    served: list[Delivery] = []
    release = asyncio.Event()

    async def serve(delivery: Delivery) -> Outcome:
        served.append(delivery)
        await release.wait()
        return Outcome(Kind.ACK)

    async with Intake(serve, FIRST) as intake:
        intake.begin(other)
        await until_idle()
        together = list(served)
        release.set()

    assert together == [FIRST, other]


async def until_idle() -> None:
    """Let whatever is due run."""
    for _ in range(TURNS):
        await asyncio.sleep(0)
