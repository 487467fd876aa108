"""Runs beside each other, and one alone: whoever is not let in asks again."""

from __future__ import annotations

from aioworker.gate import PATIENCE_SECONDS, Gate
from tests.fakes import FakeClock


async def test_any_number_runs_beside_each_other() -> None:
    gate = Gate()

    assert all(gate.enter(task, alone=False) for task in ("a", "a", "b"))
    assert gate.closed_to("c") is None


async def test_one_that_finds_nobody_runs_alone_at_once_and_keeps_others_out() -> None:
    gate = Gate()

    assert gate.enter("suspect", alone=True)

    assert gate.closed_to("a") == "suspect runs alone: a message may have killed its worker"
    assert not gate.enter("a", alone=False)
    gate.leave("suspect", alone=True)
    assert gate.closed_to("a") is None
    assert gate.enter("a", alone=False)


async def test_one_that_finds_others_closes_the_gate_and_comes_again_when_they_ended() -> None:
    gate = Gate()
    gate.enter("a", alone=False)
    gate.enter("a", alone=False)

    assert not gate.enter("suspect", alone=True)

    told = "to run alone, without a: a message may have killed its worker"
    assert gate.closed_to("suspect") == told
    assert not gate.enter("a", alone=False)
    gate.leave("a", alone=False)
    assert gate.closed_to("suspect") == told
    gate.leave("a", alone=False)
    assert not gate.enter("a", alone=False)
    assert gate.enter("suspect", alone=True)


async def test_a_task_that_runs_several_at_once_is_in_its_own_way_too() -> None:
    gate = Gate()
    gate.enter("flow", alone=False)

    assert not gate.enter("flow", alone=True)

    assert not gate.enter("a", alone=False)
    gate.leave("flow", alone=False)
    assert gate.enter("flow", alone=True)


async def test_what_does_not_end_is_run_beside(clock: FakeClock) -> None:
    """A thread that never returns would keep it waiting for ever."""
    gate = Gate()
    gate.enter("a", alone=False)
    gate.enter("suspect", alone=True)
    await clock.advance(PATIENCE_SECONDS - 1)
    assert gate.closed_to("suspect")

    await clock.advance(2)

    assert gate.closed_to("suspect") is None
    assert gate.enter("suspect", alone=True)


async def test_the_gate_opens_when_what_was_to_run_alone_went_elsewhere(clock: FakeClock) -> None:
    """To another worker: this one's task takes others, or none."""
    gate = Gate()
    gate.enter("a", alone=False)
    gate.enter("suspect", alone=True)
    gate.leave("a", alone=False)
    assert gate.closed_to("a")

    gate.enter("suspect", alone=False)
    assert gate.closed_to("a") is None

    gate.enter("a", alone=False)
    gate.enter("late", alone=True)
    await clock.advance(PATIENCE_SECONDS + 1)
    assert gate.closed_to("a") is None


async def test_one_that_runs_alone_holds_up_others_for_a_minute_at_most(clock: FakeClock) -> None:
    """A task may take many minutes, and it may be the wrong suspect."""
    gate = Gate()
    gate.enter("suspect", alone=True)

    await clock.advance(PATIENCE_SECONDS + 1)

    assert gate.closed_to("a") is None
    assert gate.enter("a", alone=False)
    gate.leave("suspect", alone=True)
    assert gate.enter("b", alone=False)
