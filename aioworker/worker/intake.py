"""Several messages at once: of a task without a rate limit whose runs use no database.

RabbitMQ sends them, as many as there is room for: each is served as soon as it is here, and
none is held while another one runs.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from aioworker.rabbitmq.delivery import Delivery
    from aioworker.settling.outcome import Outcome


class Intake:
    """Serves what arrives; use as `async with intake`, which ends once all that runs has ended.

    Args:
        serve: Takes one delivery to its end.
        first: What was taken before, by a channel that stays open: it is served, come what may.

    Attributes:
        served: How many were served.
        running: Those that are being served, by the asyncio tasks that do.
        ended: Set when no more are to be served: one was given back or put off uncounted, or
            could not be settled.
        failure: What the last one that was given back or put off came to.
    """

    def __init__(
        self, serve: Callable[[Delivery], Coroutine[None, None, Outcome]], first: Delivery
    ) -> None:
        self.served = 0
        self.running: dict[asyncio.Task[Outcome | None], Delivery] = {}
        self.ended = asyncio.Event()
        self.failure: Outcome | None = None
        self._serve = serve
        self._waiting = [first]  # until this is entered: before, nobody would wait for their end
        self._entered = False
        self._error: BaseException | None = None
        self._time = asyncio.get_running_loop().time
        self._moved_at = self._time()

    @property
    def seconds_since_it_moved(self) -> float:
        """Seconds since one was begun or ended last."""
        return self._time() - self._moved_at

    async def __aenter__(self) -> Intake:
        self._entered = True
        for delivery in self._waiting:
            self._begin(delivery)
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.ended.set()
        if isinstance(error, asyncio.CancelledError):
            for one in self.running:
                one.cancel()
        await asyncio.gather(*self.running, return_exceptions=True)
        if error is None and self._error is not None:
            raise self._error

    def begin(self, delivery: Delivery) -> None:
        """Serve a delivery beside the others.

        Of those that come after the end, none is served: they go back with their channel.
        """
        if self.ended.is_set():
            return
        if self._entered:
            self._begin(delivery)
        else:
            self._waiting.append(delivery)

    def _begin(self, delivery: Delivery) -> None:
        self._moved_at = self._time()
        runs = []
        if delivery.message.redelivered:
            runs = [run for run, one in self.running.items() if delivery.repeats(one)]
        serving = self._serve_behind(runs, delivery) if runs else self._serve(delivery)
        running: asyncio.Task[Outcome | None] = asyncio.create_task(serving)
        self.running[running] = delivery
        running.add_done_callback(self._end)

    async def _serve_behind(
        self, runs: list[asyncio.Task[Outcome | None]], delivery: Delivery
    ) -> Outcome | None:
        """Serve a delivery, but not beside earlier runs of the same message.

        RabbitMQ may deliver a message again before it tells that the channel is closed by which
        its run was to be settled. If the run's end is the end of all, the message goes back.
        """
        await asyncio.wait(runs)
        return None if self.ended.is_set() else await self._serve(delivery)

    def _end(self, ended: asyncio.Task[Outcome | None]) -> None:
        self._moved_at = self._time()
        del self.running[ended]
        if ended.cancelled():
            return
        if (error := ended.exception()) is not None:
            self._error = self._error or error
            self.ended.set()
        elif (outcome := ended.result()) is not None:
            self.served += 1
            if outcome.uncounted:
                self.failure = outcome
                self.ended.set()
