"""Several messages at once, without a broker."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from aioworker.settling.outcome import Kind, Outcome
from aioworker.worker.intake import Flow


@pytest.mark.parametrize("ended", [False, True], ids=["all loops are taken", "it has ended"])
async def test_what_was_taken_before_a_flow_is_served(*, ended: bool) -> None:
    """Its channel stays open: left alone it would be held until RabbitMQ closes that."""
    served: list[Any] = []
    release = asyncio.Event()

    async def serve(delivery: Any) -> Outcome:
        served.append(delivery)
        await release.wait()
        return Outcome(Kind.RELEASED)

    arrived: asyncio.Queue[Any] = asyncio.Queue()
    for number in range(2):
        arrived.put_nowait(number)
    flow = Flow(serve)
    async with flow.serving("first", arrived, 2):  # type: ignore[arg-type]
        if not ended:
            await asyncio.sleep(0)
        flow.ended.set()
        release.set()

    assert "first" in served
    assert flow.running == 0


async def test_one_that_cannot_be_settled_ends_the_flow_after_the_others() -> None:
    """The others are not cut off in the middle."""
    ended: list[int] = []

    async def serve(delivery: Any) -> Any:
        if delivery == 1:
            raise ConnectionError("lost")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        ended.append(delivery)
        raise ConnectionError("lost too")

    flow = Flow(serve)
    arrived: asyncio.Queue[Any] = asyncio.Queue()
    arrived.put_nowait(1)

    with pytest.raises(ConnectionError):
        async with flow.serving(2, arrived, 2):  # type: ignore[arg-type]
            await flow.ended.wait()

    assert ended == [2]
