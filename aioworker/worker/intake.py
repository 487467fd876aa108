"""Several messages at once: of a task without a rate limit whose runs use no database.

RabbitMQ sends them, as many as there is room for: each is served as soon as it is here, and
none is held while another one runs.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from aioworker.settling.outcome import Outcome

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from aioworker.rabbitmq.delivery import Delivery


class Flow:
    """Serves what arrives.

    Args:
        serve: Takes one delivery to its end.

    Attributes:
        served: How many were served.
        running: How many are being served.
        moved: When one was begun or ended last, by the event loop's time.
        ended: Set when no more are to be served: one was given back or put off uncounted, or
            could not be settled.
        failure: What the last one that was given back or put off came to.
    """

    def __init__(self, serve: Callable[[Delivery], Awaitable[Outcome]]) -> None:
        self.served = 0
        self.running = 0
        self.moved = asyncio.get_running_loop().time()
        self.ended = asyncio.Event()
        self.failure: Outcome | None = None
        self._serve = serve

    @asynccontextmanager
    async def serving(
        self,
        first: Delivery,
        arrived: asyncio.Queue[Delivery | None],
        at_once: int,
    ) -> AsyncIterator[None]:
        """Serve what arrives while inside; at the end wait for what runs, and leave the rest.

        Args:
            first: What was taken before, by a channel that stays open: it is served, come what may.
            arrived: What arrives; it goes back with its channel if it is left.
            at_once: How many of those are served at once.

        Raises:
            BrokerError: One could not be settled: RabbitMQ will deliver it again.
        """
        loops = [asyncio.create_task(self._serve_one(first))]
        loops += [asyncio.create_task(self._serve_all(arrived)) for _ in range(at_once)]
        try:
            yield
        finally:
            self.ended.set()
            for _ in range(at_once):
                arrived.put_nowait(None)
            ends = await asyncio.gather(*loops, return_exceptions=True)
        for end in ends:
            if isinstance(end, BaseException):
                raise end

    async def _serve_all(self, arrived: asyncio.Queue[Delivery | None]) -> None:
        while (delivery := await arrived.get()) is not None:
            if self.ended.is_set():
                arrived.put_nowait(delivery)
                return
            await self._serve_one(delivery)

    async def _serve_one(self, delivery: Delivery) -> None:
        self._moves(1)
        try:
            result = await self._serve(delivery)
        except BaseException:
            self.ended.set()
            raise
        finally:
            self._moves(-1)
        self.served += 1
        if result.uncounted:
            self.failure = result
            self.ended.set()

    def _moves(self, more: int) -> None:
        self.running += more
        self.moved = asyncio.get_running_loop().time()
