"""Whatever a task raises, counts or returns reaches no further than its own message."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aioworker.errors import UsageError, name_of
from aioworker.logs import fields
from aioworker.rabbitmq.message import brief
from aioworker.tasks.chunk import part_of
from aioworker.tasks.context import Context
from aioworker.tasks.task import Task
from tests import strange

RUNS = 500
CASES = 3000  # `python -m tests.strange 200000` judges more
_random = st.randoms(use_true_random=False)


def test_no_error_and_no_count_gets_out_of_the_place_that_judges() -> None:
    faults = strange.judge_all(range(CASES))

    assert sum(faults.values()) == CASES


@settings(deadline=None)
@given(_random)
def test_a_value_is_always_told_in_one_short_line(random: Random) -> None:
    shown = brief(strange.thing(random))

    assert type(shown) is str
    assert len(shown) < 1000


@settings(deadline=None)
@given(_random)
def test_no_value_of_a_log_line_raises_or_forges(random: Random) -> None:
    """Both forms of the line are looked at, by `strange.Lines`."""
    lines = strange.Lines()
    values = {f"name_{number}": strange.thing(random) for number in range(3)}
    given = "shop", strange.thing(random)
    record = logging.LogRecord("shop", logging.INFO, "", 0, "%s %s", given, None)
    record.__dict__ |= fields(**values)

    lines.emit(record)

    assert lines.count == 1


def in_loop(raises: Callable[[], None]) -> Callable[..., Any]:
    async def run() -> None:
        raises()

    return run


def in_thread(raises: Callable[[], None]) -> Callable[..., Any]:
    return raises


async def outcome_of(task: Task[..., Any], error: BaseException) -> str:
    """Return what a run came to, in a word: a test cannot show the error itself."""
    try:
        async with asyncio.timeout(10):  # a run that is never told of hangs for ever
            await task.run(Context(None, "strange"), [], {})  # type: ignore[arg-type]  # not used
    except Exception as found:  # noqa: BLE001 - what the run came to
        return "itself" if found is error else name_of(found)
    return "nothing"


def is_a(error: BaseException, kind: type) -> bool:
    """Whether an error is of a kind, whatever its class and its metaclass say."""
    return any(one is kind for one in type.__dict__["__mro__"].__get__(type(error)))


@pytest.mark.parametrize("how", [in_loop, in_thread])
async def test_whatever_a_task_raises_is_an_exception_of_its_run(
    how: Callable[[Callable[[], None]], Callable[..., Any]],
) -> None:
    """No StopIteration, which no future carries, no exit and no cancellation gets through."""
    others = {}
    for number in range(RUNS):
        error = strange.error_of(Random(number))
        task = Task("strange", how(partial(strange.raised, error)))
        found = await outcome_of(task, error)
        if is_a(error, StopIteration):
            told = "TaskExitError" if how is in_thread else "RuntimeError"  # which is Python's own
        else:
            told = "itself" if is_a(error, Exception) else "TaskExitError"
        if found != told:
            others[number] = found, told

    assert others == {}


@settings(deadline=None)
@given(_random)
def test_what_needed_returns_is_a_part_of_its_chunk_or_an_error(random: Random) -> None:
    chunk = [1, 2, 3]
    found = [*random.sample(chunk, 2), strange.thing(random)]

    try:
        kept = part_of(chunk, found)
    except UsageError:
        kept = None

    assert kept in (None, [1, 2], [1, 3], [2, 3], chunk)
