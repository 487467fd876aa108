"""A sweep's ids come from whatever a user writes: plain or async, pages of ids or of rows."""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, cast

import pytest

from aioworker import Context
from aioworker.errors import TaskError, UsageError
from aioworker.mysql.database import Database
from aioworker.tasks.keys import naming, pages
from aioworker.tasks.task import Task

CTX = Context(cast("Database", None), "sweep")


def plain() -> Iterator[list[int]]:
    yield from ([1, 2], [3, 4])


def plain_after(after: int) -> Iterator[list[int]]:
    yield from ([after + 1], [after + 2])


def a_list() -> list[list[int]]:
    return [[1, 2], [3, 4]]


async def awaited() -> list[list[int]]:
    return [[1, 2], [3, 4]]


async def streamed(ctx: Context) -> AsyncIterator[list[int]]:
    assert ctx is CTX
    yield [1, 2]
    yield [3, 4]


def of_rows() -> Iterator[list[tuple[int, float]]]:
    yield [(1, 0.5), (3, 1.5)]


def of_ids() -> Iterator[int]:
    yield 1


HERE = os.path.relpath(__file__)


async def swept(keys: Callable[..., Any] | None, after: int = 0) -> list[list[Any]]:
    async def function(ids: list[int]) -> None: ...

    return [page async for page in pages(Task("sweep", function, keys=keys), CTX, after)]


@pytest.mark.parametrize("keys", [plain, a_list, awaited, streamed])
async def test_however_they_are_written_the_pages_are_the_same(keys: Callable[..., Any]) -> None:
    assert await swept(keys) == [[1, 2], [3, 4]]
    assert await swept(keys, after=3) == [[4]]


async def test_keys_that_can_begin_behind_an_id_do() -> None:
    """The database skips what is done, not we."""
    assert await swept(plain_after, after=7) == [[8], [9]]


async def test_a_row_begins_with_its_id() -> None:
    assert await swept(of_rows) == [[(1, 0.5), (3, 1.5)]]
    assert await swept(of_rows, after=1) == [[(3, 1.5)]]


async def test_plain_keys_are_called_beside_the_event_loop() -> None:
    """A query that blocks, of Django's, would hold up the confirms, or be refused."""
    called_in: list[threading.Thread] = []

    def blocking() -> list[list[int]]:
        called_in.append(threading.current_thread())
        return [[1]]

    assert await swept(blocking) == [[1]]
    assert called_in != [threading.current_thread()]


async def test_keys_that_fail_name_their_task_and_line() -> None:
    def broken() -> list[list[int]]:
        raise KeyError("x")

    line = broken.__code__.co_firstlineno + 1

    with pytest.raises(TaskError) as refusal:
        await swept(broken)
    where = f"({HERE}, line {line})"
    assert str(refusal.value) == f"task 'sweep': its keys failed: KeyError: 'x' {where}"


async def test_keys_that_fail_with_what_cannot_be_told_name_their_task_all_the_same() -> None:
    """The error of the error's own code was told in its place, without the task."""

    class OddError(Exception):
        def __str__(self) -> str:
            raise KeyError("x")

    def broken() -> list[list[int]]:
        raise OddError

    with pytest.raises(TaskError) as refusal:
        await swept(broken)
    words = "OddError, which cannot be told: its own code raises KeyError"
    assert str(refusal.value).startswith(f"task 'sweep': its keys failed: {words} ({HERE}, line ")


async def test_what_is_needed_that_fails_in_a_sweep_names_its_task_and_line() -> None:
    """`publish-all --only-needed` asks what is needed, too."""
    task = Task("sweep", a_list)
    with pytest.raises(TaskError) as refusal, naming(task, "needed"):
        raise KeyError("x")

    words = str(refusal.value)
    assert words.startswith(f"task 'sweep': its needed failed: KeyError: 'x' ({HERE}, line ")


async def test_ids_that_are_no_pages_are_refused() -> None:
    with pytest.raises(TaskError) as refusal:
        await swept(of_ids)
    assert str(refusal.value) == (
        "task 'sweep': expected keys to yield pages, lists of ids or rows, got: 1"
    )


async def test_a_task_without_keys_has_nothing_to_sweep() -> None:
    with pytest.raises(UsageError, match="has no keys"):
        await swept(None)
