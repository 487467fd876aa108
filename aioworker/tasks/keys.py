"""What a sweep publishes: the pages of a task's `keys`, however they are written."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
from collections.abc import AsyncIterator, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from aioworker.errors import AioworkerError, TaskError, UsageError, told
from aioworker.mysql.errors import MySQLError
from aioworker.rabbitmq.message import brief
from aioworker.tasks.chunk import id_of
from aioworker.tasks.load import place
from aioworker.tasks.signature import AFTER, Signature, read

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioworker.tasks.context import Context
    from aioworker.tasks.task import AnyTask


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
    skips = AFTER in read(task.keys).parameters
    call = partial(
        task.keys,
        *([ctx] if Signature.wants_context(task.keys) else []),
        **({AFTER: after} if skips else {}),
    )
    with naming(task, "keys"), _Thread() as thread:
        found = call() if _is_async(task.keys) else await thread.call(call)
        if inspect.isawaitable(found):
            found = await found
        async for page in _each(task.name, found, thread):
            kept = page if skips or not after else [one for one in page if id_of(one) > after]
            if kept:
                yield kept


@contextmanager
def naming(task: AnyTask, what: str) -> Iterator[None]:
    """Name the task, and the line, if a function of the user's fails inside.

    Args:
        task: Whose it is.
        what: `keys` or `needed`.

    Raises:
        TaskError: It failed; errors of ours, of the database and of time pass as they are.
    """
    try:
        yield
    except (AioworkerError, MySQLError, TimeoutError):
        raise
    except Exception as error:
        raise TaskError(
            f"task {task.name!r}: its {what} failed: {told(error)}{place(error)}"
        ) from error


def _is_async(function: Any) -> bool:
    return Signature.is_coroutine(function) or inspect.isasyncgenfunction(function)


class _Thread:
    """The one thread that a sweep's blocking calls are made in, so that they hold up no confirm.

    One, since a connection of sqlite3 or of Django is of use only in the thread that made it.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, "aioworker keys")
        self._context = contextvars.copy_context()

    def __enter__(self) -> _Thread:
        return self

    def __exit__(self, *_error: object) -> None:
        self._executor.shutdown(wait=False)

    async def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function there and return what it returns."""
        call = partial(self._context.run, function, *args)
        return await asyncio.get_running_loop().run_in_executor(self._executor, call)


async def _each(task: str, found: object, thread: _Thread) -> AsyncIterator[list[Any]]:
    if isinstance(found, AsyncIterator):
        async for page in found:
            yield _checked(task, page)
    elif isinstance(found, Iterable):
        iterator = await thread.call(iter, found)
        try:
            while (page := await thread.call(next, iterator, None)) is not None:
                yield _checked(task, page)
        finally:
            if isinstance(iterator, Generator):
                await thread.call(iterator.close)
    else:
        raise TaskError(f"task {task!r}: expected keys to yield pages, got: {brief(found)}")


def _checked(task: str, page: object) -> list[Any]:
    if not isinstance(page, list):
        raise TaskError(
            f"task {task!r}: expected keys to yield pages, lists of ids or rows, got: {brief(page)}"
        )
    return page
