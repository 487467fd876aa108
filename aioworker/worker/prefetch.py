"""The first message of the next start, asked for while a short run of ids is on, without a rate.

Behind a short run the wait for RabbitMQ would be much of the time. Behind a long one it is not, and
another worker could run meanwhile what this one holds.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aioworker.errors import DatabaseError
from aioworker.rabbitmq.delivery import SUSPECT_RETURNS
from aioworker.settling.rows import Ids

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from types import TracebackType

    from aioworker.rabbitmq.delivery import Delivery
    from aioworker.settling.start import Start

SHORT_SECONDS = 0.1  # a run may take so long, and a message may wait so long for its end


class Prefetch:
    """Takes one message after the other, and asks for the next one while one runs.

    Use as `async with Prefetch(…)`: at the end, what nobody took goes back.

    Args:
        take: Takes a message, from the bulk lane first or the urgent one; None if there is none.
        take_beside: Likewise, while others run.
        stop: Set when no more are to be taken.
        seconds: How long it lasts; then it asks for no more ahead.
        ask: Whether it asks ahead at all.
    """

    def __init__(
        self,
        take: Callable[[bool], Awaitable[Delivery | None]],
        take_beside: Callable[[Sequence[Delivery], bool], Awaitable[Delivery | None]],
        stop: asyncio.Event,
        seconds: float,
        *,
        ask: bool,
    ) -> None:
        self._take = take
        self._take_beside = take_beside
        self._stop = stop
        self._time = asyncio.get_running_loop().time
        self._until = self._time() + seconds
        self._ask = ask
        self._run_began: float | None = None
        self._short = False  # whether the last run was
        self._asking: asyncio.Task[Delivery | None] | None = None
        self._wanted = asyncio.Event()

    async def __aenter__(self) -> Prefetch:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None or isinstance(error, DatabaseError):
            if (delivery := await self._came()) is not None:
                await delivery.give_back()
            return
        asking, self._asking = self._asking, None
        if asking is not None:
            # The connection ends, and what comes by it goes back.
            asking.cancel()
            asking.add_done_callback(lambda one: one.cancelled() or one.exception())

    @property
    def over(self) -> bool:
        """Whether its time is, and nothing was asked for that is still to be taken."""
        return self._asking is None and self._time() >= self._until

    def holds(self) -> bool:
        """Whether a message came ahead, or may come."""
        asking = self._asking
        if asking is None or asking.cancelled():
            return False
        return not asking.done() or (asking.exception() is None and asking.result() is not None)

    async def take(self, *, bulk_first: bool) -> Delivery | None:
        """Return what came ahead, or else take a message; None without any, or at a stop.

        Args:
            bulk_first: Whether the bulk lane goes first, if none came ahead.

        Raises:
            BrokerError: As `Lanes.take`.
        """
        if self._stop.is_set():
            return None
        return await self._came() or await self._take(bulk_first)

    def begin_run(self, start: Start) -> None:
        """Ask for a message beside the run that begins now, if the one before was short."""
        self._run_began = self._time()
        running = [one.delivery for one in start.held]
        # If the run's messages go back behind one that came ahead, the lane is in another order:
        # that decides nothing of ids. What may kill its worker takes no other with it.
        suspects = any(one.returns >= SUSPECT_RETURNS for one in running)
        may = isinstance(start.rows, Ids) and not suspects
        if may and self._ask and self._short and self._run_began < self._until:
            self._wanted.clear()
            self._asking = asyncio.create_task(self._hold(running, start.urgent))

    async def _hold(self, running: Sequence[Delivery], bulk_first: bool) -> Delivery | None:
        """Take a message, and let it wait for the end of the run, but not for long."""
        if (delivery := await self._take_beside(running, bulk_first)) is None:
            return None
        try:
            async with asyncio.timeout(SHORT_SECONDS):
                await self._wanted.wait()
        except TimeoutError:
            await delivery.give_back()
            return None
        return delivery

    async def _came(self) -> Delivery | None:
        """Return what came while the last run was on, and note whether that was short."""
        if self._run_began is not None:
            self._short = self._time() - self._run_began < SHORT_SECONDS
            self._run_began = None
        asking, self._asking = self._asking, None
        self._wanted.set()
        return None if asking is None else await asking
