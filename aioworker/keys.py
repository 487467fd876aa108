"""What a sweep publishes: the pages of a task's `keys`, however they are written."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from pymysql.err import MySQLError

from aioworker.chunk import id_of
from aioworker.errors import AioworkerError, TaskError, UsageError
from aioworker.message import brief
from aioworker.signature import Signature, read

if TYPE_CHECKING:
    from aioworker.context import Context
    from aioworker.task import AnyTask

_AFTER = "after"


async def pages(task: AnyTask, ctx: Context, after: int) -> AsyncIterator[list[Any]]:
    """Yield a task's ids or rows in pages.

    Args:
        task: The task.
        ctx: For its `keys`, where they take one.
        after: Begin behind this id; where `keys` has no such parameter, what comes before
            is left out here.

    Raises:
        UsageError: The task has no `keys`.
        TaskError: They yield something else than pages, or fail.
        MySQLError: The database refuses; TimeoutError: it does not answer.
    """
    if task.keys is None:
        raise UsageError(f"task {task.name!r} has no keys: there is nothing to sweep")
    skips = _AFTER in read(task.keys).parameters
    call = partial(
        task.keys,
        *([ctx] if Signature.wants_context(task.keys) else []),
        **({_AFTER: after} if skips else {}),
    )
    try:
        # In a thread: a query of Django that blocks would hold up the confirms.
        found = call() if _is_async(task.keys) else await asyncio.to_thread(call)
        if inspect.isawaitable(found):
            found = await found
        async for page in _each(task.name, found):
            kept = page if skips or not after else [one for one in page if id_of(one) > after]
            if kept:
                yield kept
    except (AioworkerError, MySQLError, TimeoutError):
        raise
    except Exception as error:
        raise TaskError(
            f"task {task.name!r}: its keys failed: {type(error).__name__}: {error}"
        ) from error


def _is_async(function: Any) -> bool:
    return Signature.is_coroutine(function) or inspect.isasyncgenfunction(function)


async def _each(task: str, found: object) -> AsyncIterator[list[Any]]:
    if isinstance(found, AsyncIterator):
        async for page in found:
            yield _checked(task, page)
    elif isinstance(found, Iterable):
        iterator = iter(found)
        while (page := await asyncio.to_thread(next, iterator, None)) is not None:
            yield _checked(task, page)
    else:
        raise TaskError(f"task {task!r}: expected keys to yield pages, got: {brief(found)}")


def _checked(task: str, page: object) -> list[Any]:
    if not isinstance(page, list):
        raise TaskError(
            f"task {task!r}: expected keys to yield pages, lists of ids or rows, got: {brief(page)}"
        )
    return page
