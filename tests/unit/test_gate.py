"""Runs beside each other, and one alone."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager

from aioworker.gate import Gate
from tests.fakes import FakeClock

PATIENCE = 30.0


class Runs:
    """Runs by name, each of which ends when it is told to."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self._ends: dict[str, asyncio.Event] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def begin(self, name: str, entry: AbstractAsyncContextManager[None]) -> None:
        """Let one ask to run."""
        self._ends[name] = asyncio.Event()
        self._tasks[name] = asyncio.create_task(self._run(name, entry))
        await asyncio.sleep(0.01)

    async def _run(self, name: str, entry: AbstractAsyncContextManager[None]) -> None:
        async with entry:
            self.log.append(f"{name} runs")
            await self._ends[name].wait()
            self.log.append(f"{name} ends")

    async def end(self, name: str) -> None:
        """Let one end."""
        self._ends[name].set()
        await self._tasks[name]
        await asyncio.sleep(0.01)


async def test_one_alone_waits_for_those_that_run_and_keeps_others_out() -> None:
    gate, runs = Gate(), Runs()
    for name in ("a", "b"):
        await runs.begin(name, gate.through())
    await runs.begin("suspect", gate.alone(PATIENCE))
    await runs.begin("c", gate.through())

    for name in ("b", "a", "suspect", "c"):
        assert gate.busy
        await runs.end(name)

    assert not gate.busy
    assert runs.log == [
        *("a runs", "b runs", "b ends", "a ends"),
        *("suspect runs", "suspect ends", "c runs", "c ends"),
    ]


async def test_one_alone_waits_no_longer_than_it_may(clock: FakeClock) -> None:
    """A thread that never returns would keep it waiting for ever."""
    gate, log = Gate(), list[str]()

    async def suspect() -> None:
        async with gate.alone(PATIENCE):
            log.append("suspect runs")

    async with gate.through():
        waiting = asyncio.create_task(suspect())
        await clock.advance(PATIENCE - 1)
        assert log == []
        await clock.advance(2)
        assert log == ["suspect runs"]
    await waiting
