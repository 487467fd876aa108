"""A worker without servers: its consumer, its session, and all that they touch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from aioworker.consumer import Consumer
from aioworker.settling.probe import Probe
from aioworker.status.presence import Presence
from aioworker.tasks.chunk import CHUNK_LIMIT
from aioworker.tasks.task import Task
from aioworker.worker.recovery import Recovery
from aioworker.worker.session import Session, Worker
from tests.doubles.budget import MemoryBudget
from tests.doubles.database import MemoryDatabase
from tests.doubles.lanes import MemoryBroker, MemoryLanes
from tests.fakes import TURNS

if TYPE_CHECKING:
    from aioworker.errors import DatabaseError
    from aioworker.rabbitmq.delivery import Delivery
    from aioworker.settling.outcome import Outcome
    from tests.fakes import FakeClock

MAX_RETRIES = 2
Work = Callable[..., Awaitable[None]]


async def nothing() -> None:
    """Do nothing, successfully."""


async def fails() -> None:
    """Fail."""
    raise KeyError("shop")


class MemoryProbe(Probe):
    """Finds the database as a test has it.

    Attributes:
        away: Why it cannot be used; None while it can.
        asked: How often somebody asked.
    """

    away: DatabaseError | None = None
    asked = 0

    async def check_database(self) -> None:
        """See whether it can be used."""
        self.asked += 1
        if self.away is not None:
            raise self.away


class Heart:
    """The worker of one task, `shop`; it uses a database if its function takes a `Context`.

    Args:
        work: What a run does.
        rate: How often it may start, such as `2/m`; None is no limit.
        burst: Whether a session ends once the lanes are empty.
        max_retries: Attempts after the first.
        task_timeout: Seconds a run may take.
        gather_seconds: How long before a start is due messages are gathered for it, at most.
        chunk_size: Ids that need a write, before a start takes no more messages.
        beside: Another worker of the task, whose budget and broker are its own, too.

    Attributes:
        database: What it uses.
        broker: Where its messages lie.
        steps: What was asked of the lanes, in that order.
        said: What the worker said that it does, in that order.
        stop: Ends a session.
        lost: Set when the connection is lost.
    """

    def __init__(  # noqa: PLR0913 - what a test may choose of a worker
        self,
        work: Work = nothing,
        *,
        rate: str | None = None,
        burst: bool = False,
        max_retries: int = MAX_RETRIES,
        task_timeout: float = 30,
        gather_seconds: float = 0.0,
        chunk_size: int = CHUNK_LIMIT,
        beside: Heart | None = None,
    ) -> None:
        self.budget: MemoryBudget = beside.budget if beside else MemoryBudget(rate, gather_seconds)
        self.broker: MemoryBroker = beside.broker if beside else MemoryBroker()
        self.steps: list[str] = []
        self.said: list[str] = []
        self.lanes = MemoryLanes(self.broker, self.steps.append)
        self.task: Task[..., Any] = Task("shop", work)
        self.stop, self.lost = asyncio.Event(), asyncio.Event()
        self.database = database = MemoryDatabase()
        presence = Presence("shop", "test", 1, rate, self.said.append, None)
        self.probe = MemoryProbe(self.task, database, presence, 10)
        self.consumer = Consumer(
            self.task,
            database,
            self.budget,
            presence,
            self.probe,
            max_retries=max_retries,
            task_timeout=task_timeout,
            chunk_size=chunk_size,
            worker="test",
        )
        self.worker = Worker(
            self.task,
            database,
            self.budget,
            self.consumer,
            presence,
            self.probe,
            Recovery(1, patience=50),
            task_timeout=task_timeout,
            needs_database=self.task.needs_database,
            burst=burst,
            gather_seconds=gather_seconds,
        )

    async def serve(self) -> Outcome:
        """Take what is first, and serve it."""
        delivery = await self.lanes.take()
        assert delivery is not None
        return await self.consumer.serve(delivery, self.lanes)

    def session(self) -> Session:
        """Return a session over a connection."""
        return Session(self.worker, self.lanes, self.stop, self.lost)

    async def run_for(self, clock: FakeClock, seconds: float, step: float = 0.1) -> None:
        """Run a session for so long."""
        async with running(self):
            await clock.advance(seconds, step)

    @property
    def settled(self) -> list[str]:
        """How messages were settled, in that order."""
        return [step for step in self.steps if step in ("acknowledge", "give_back", "copy")]


@asynccontextmanager
async def running(heart: Heart) -> AsyncIterator[asyncio.Task[None]]:
    """Run a session inside, and stop it at the end."""
    serving = asyncio.create_task(heart.session().run())
    try:
        yield serving
    finally:
        heart.stop.set()
        for _ in range(TURNS):
            await asyncio.sleep(0)
        serving.cancel()
        await asyncio.wait({serving})


def slow_down(heart: Heart, seconds: float) -> None:
    """Have each look into the lanes take a while."""
    take = heart.lanes.take

    async def slow(*, bulk_first: bool = False) -> Delivery | None:
        await asyncio.sleep(seconds)
        return await take(bulk_first=bulk_first)

    heart.lanes.take = slow  # type: ignore[method-assign]
