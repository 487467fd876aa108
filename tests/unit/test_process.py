"""A process of several workers, without servers: what it waits for, and what systemd hears."""

from __future__ import annotations

import asyncio
import gc
from types import SimpleNamespace
from typing import Any

import pytest

from aioworker.errors import BrokerError
from aioworker.worker.process import Process
from aioworker.worker.systemd import Notifier
from tests.doubles.heart import Heart, nothing
from tests.fakes import FakeClock

WATCHDOG_SECONDS = 10.0


class Manager(Notifier):
    """A service manager that notes when it heard that the process lives."""

    def __init__(self) -> None:
        super().__init__({"WATCHDOG_USEC": str(int(WATCHDOG_SECONDS * 1e6))})
        self.heard: list[float] = []

    def send(self, **states: str) -> None:
        """Note when."""
        if "WATCHDOG" in states:
            self.heard.append(asyncio.get_running_loop().time())

    def longest_silence(self, until: float) -> float:
        """Return the longest time without a word, up to a moment."""
        ends = [*self.heard[1:], until]
        return max(end - begin for begin, end in zip(self.heard, ends, strict=True))


def process_of(*hearts: Heart, burst: bool = False) -> tuple[Process, Manager]:
    """Return a process of workers that are made already, and its manager."""
    settings: Any = SimpleNamespace(shutdown_timeout=600.0)
    made = Process(
        settings,
        [],
        burst=burst,
        origin=None,  # type: ignore[arg-type]  # nothing is reloaded
        raise_early=lambda: None,
        report=lambda _done: None,
    )
    made._notifier = manager = Manager()
    made._workers = [heart.worker for heart in hearts]
    for heart in hearts:
        heart.stop = made._stop
    return made, manager


async def serve(heart: Heart) -> bool:
    """Serve as a supervisor does."""
    heart.worker.recovery.progress()
    await heart.session().run()
    heart.worker.recovery.due_by = float("inf")
    return not heart.consumer.failures


async def test_a_worker_that_has_ended_does_not_silence_the_others(clock: FakeClock) -> None:
    """One drains a long run; systemd would end it in the middle."""
    release = asyncio.Event()

    async def run() -> None:
        await release.wait()

    quick, slow = Heart(rate="2/m"), Heart(run, rate="2/m", task_timeout=300)
    slow.broker.send()
    process, manager = process_of(quick, slow)
    serving = [asyncio.create_task(serve(heart)) for heart in (quick, slow)]
    until = asyncio.create_task(process._until_stopped(serving))
    await clock.advance(10)
    process._stop.set()
    await clock.advance(200)

    assert not until.done()
    assert manager.longest_silence(clock.now) <= WATCHDOG_SECONDS
    release.set()
    await clock.advance(1)
    assert await until


async def test_systemd_hears_nothing_of_a_step_that_is_overdue(clock: FakeClock) -> None:
    """It ends the process, and starts it again."""
    heart = Heart(nothing, rate="2/m")
    never = asyncio.Event()
    heart.lanes.take = never.wait  # type: ignore[assignment, method-assign]
    process, manager = process_of(heart)
    serving = [asyncio.create_task(serve(heart))]
    until = asyncio.create_task(process._until_stopped(serving))
    heart.broker.send()
    await clock.advance(500)

    assert manager.longest_silence(clock.now) > 400
    until.cancel()
    serving[0].cancel()
    await asyncio.wait({until, *serving})


async def test_a_task_that_fails_where_another_ends_the_burst_is_no_error_of_asyncio(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It closes its connection when it is cut off, and goes on with its own error."""
    process, _manager = process_of(burst=True)

    async def fail() -> bool:
        raise BrokerError("the first queue is not there")

    async def fail_meanwhile() -> bool:
        try:
            return await asyncio.Event().wait()
        finally:
            raise BrokerError("the second queue is not there")

    async def serve_both() -> None:
        serving = [asyncio.create_task(fail()), asyncio.create_task(fail_meanwhile())]
        with pytest.raises(BrokerError, match="first"):
            await process._until_stopped(serving)
        await process._end(serving)

    await serve_both()
    gc.collect()
    assert caplog.messages == []


@pytest.mark.parametrize(("fails", "complete"), [(False, True), (True, False)])
async def test_a_burst_is_complete_if_all_that_was_taken_is_done(
    clock: FakeClock, fails: bool, complete: bool
) -> None:
    async def run() -> None:
        if fails:
            raise KeyError("shop")

    heart = Heart(run, burst=True)
    heart.broker.send()
    process, _manager = process_of(heart, burst=True)
    until = asyncio.create_task(process._until_stopped([asyncio.create_task(serve(heart))]))
    await clock.advance(1, step=0.1)

    assert await until is complete
