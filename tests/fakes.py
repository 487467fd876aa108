"""What is not real here: a clock that a test moves, a delivery that no broker made."""

from __future__ import annotations

import asyncio
from typing import Any

import aio_pika
from aiormq.abc import DeliveredMessage
from pamqp.commands import Basic
from pamqp.header import ContentHeader

TURNS = 30  # of the event loop, in which whatever is due has come to its next wait


class FakeClock:
    """Stands in for the time of an event loop; seconds pass when `advance` says so."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.now = 0.0
        self._loop = loop
        loop.time = lambda: self.now  # type: ignore[method-assign]

    async def advance(self, seconds: float, step: float = 1.0) -> None:
        """Move the clock in steps, letting what is due run before and after each."""
        end = self.now + seconds
        while True:
            for _ in range(TURNS):
                await asyncio.sleep(0)
            if self.now >= end:
                return
            self.now = min(self.now + step, end)


class Settleable(aio_pika.IncomingMessage):
    """A delivery that no channel is needed to settle."""

    refusal: Exception | None = None

    async def ack(self, multiple: bool = False) -> None:
        """Acknowledge it, or fail as `refusal` has it."""
        if self.refusal is not None:
            raise self.refusal

    async def nack(self, multiple: bool = False, requeue: bool = True) -> None:
        """Give it back."""


def settleable(body: bytes, **properties: Any) -> Settleable:
    """Return a delivery that can be settled."""
    return Settleable(message_of(body, **properties))


def delivered(
    body: bytes = b"body", *, redelivered: bool = False, **properties: Any
) -> aio_pika.IncomingMessage:
    """Return a delivery as it comes out of its frames."""
    return aio_pika.IncomingMessage(message_of(body, redelivered=redelivered, **properties))


def message_of(body: bytes, *, redelivered: bool = False, **properties: Any) -> DeliveredMessage:
    """Return a message as aiormq hands it out."""
    header = ContentHeader()
    sent = Basic.Properties(**properties)
    header.unmarshal(ContentHeader(body_size=len(body), properties=sent).marshal())
    method = Basic.GetOk(
        delivery_tag=1, exchange="", routing_key="aioworker.shop", redelivered=redelivered
    )
    return DeliveredMessage(delivery=method, header=header, body=body, channel=None)  # type: ignore[arg-type]
