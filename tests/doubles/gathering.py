"""A worker without servers that gathers, and what its tests begin with."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

from aioworker.errors import DatabaseError
from aioworker.limits import Wait
from aioworker.reasons import Reason, ReasonKind
from aioworker.tasks.context import Context
from tests.doubles.heart import Heart, Work
from tests.doubles.lanes import QUEUES

PAUSED = Wait(Reason(ReasonKind.PAUSED, "paused by alice"), 2)
AWAY = DatabaseError("gone", unreachable=True)
GATHER_SECONDS = 20
INTERVAL = 30  # seconds, of 2/m
Ids = list[int]


class Gathering:
    """A heart whose task takes chunks of ids, and gathers.

    Args:
        fail: Called with the ids of each run; what it raises, the run does.
        stale: The ids that need a write; None for all.
        options: Of the heart.

    Attributes:
        reads: What `needed` was asked, each time.
        runs: What ran, each time.
        contexts: What each run got besides.
        stale: As above, less what was written.
    """

    def __init__(
        self,
        fail: Callable[[Ids], Awaitable[None]] | None = None,
        stale: set[int] | None = None,
        **options: Any,
    ) -> None:
        self.reads: list[Ids] = []
        self.runs: list[Ids] = []
        self.contexts: list[Context] = []
        self.stale = stale

        async def refresh(ctx: Context, ids: list[int]) -> None:
            self.runs.append(ids)
            self.contexts.append(ctx)
            if fail is not None:
                await fail(ids)
            ctx.changed(ids)
            if self.stale is not None:
                self.stale -= set(ids)

        async def needed(ids: list[int]) -> list[int]:
            self.reads.append(ids)
            return [one for one in ids if self.stale is None or one in self.stale]

        self.heart = Heart(refresh, **{"rate": "2/m", "gather_seconds": GATHER_SECONDS, **options})
        self.heart.task.needed(needed)

    def send(
        self, ids: Sequence[int], lane: str = QUEUES.bulk, *constants: Any, **headers: Any
    ) -> None:
        """Publish a message of some ids, whose own id is the first of them."""
        body = json.dumps([[list(ids), *constants], {}, None]).encode()
        self.heart.broker.send(body, lane, **{"id": str(ids[0]), **headers})

    def send_each(self, ids: Iterable[int], lane: str = QUEUES.bulk) -> None:
        """Publish a message for each id."""
        for one in ids:
            self.send([one], lane)

    def send_chunks(self, firsts: range) -> None:
        """Publish ids in messages that begin with these; each has all up to the next."""
        for first in firsts:
            self.send(range(first, first + firsts.step))

    @property
    def acknowledged(self) -> list[str]:
        """The ids of what is acknowledged."""
        return self.heart.broker.acknowledged

    def queued(self, lane: str = QUEUES.bulk) -> list[str]:
        """Return the ids of what lies in a lane."""
        return [str(headers["id"]) for headers in self.heart.broker.headers(lane)]


def gathering_with(function: Work) -> Heart:
    """Return a heart that gathers, and runs a function for whatever is published."""
    heart = Heart(function, rate="2/m", gather_seconds=GATHER_SECONDS)
    heart.task.needed(lambda entries: entries)
    return heart


async def come_back(heart: Heart, times: int) -> None:
    """Have the first message be taken and given back so often."""
    for _ in range(times):
        delivery = await heart.lanes.take()
        assert delivery is not None
        await delivery.give_back()


async def fails(_ids: Ids) -> None:
    """Fail for whatever ids."""
    raise KeyError("shop")
