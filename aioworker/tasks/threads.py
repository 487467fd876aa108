"""A function that is no coroutine: run in a thread, its transactions in the event loop.

A thread cannot be cancelled. When its time is up, its statement is ended and its connection
closed, so that it can write nothing more; then it is waited for.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
from concurrent.futures import Future, InvalidStateError
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any

from aioworker.errors import TaskExitError
from aioworker.logs import fields
from aioworker.tasks.loop_monitor import NAME_PREFIX

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioworker.mysql.database import Cursor, Database


log = logging.getLogger(__name__)


async def run(call: Callable[[], Any], database: Database | None, task: str) -> Any:
    """Call a function in a thread named after the task, wait for its end, and return what it does.

    Cancelled, it closes the connection of *database*, which the thread may use, lets no
    other be opened, and still waits for the thread.
    """
    ended = _start(call, f"{NAME_PREFIX}{task}")
    try:
        return await asyncio.shield(ended)
    except asyncio.CancelledError:
        if database is not None and not ended.done():
            await database.cut_off()
        if not ended.done():
            log.warning(
                "its time is up, but a thread cannot be ended: waiting for it to return",
                extra=fields(task=task),
            )
        with database.without_reconnect() if database is not None else nullcontext():
            await asyncio.wait({ended})
        if not ended.cancelled():
            ended.exception()  # looked at: the cancellation is what is told
        raise


def _start(call: Callable[[], Any], name: str) -> asyncio.Future[Any]:
    """Begin a thread; the future has what it returned or raised."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[Any] = loop.create_future()
    context = contextvars.copy_context()

    def work() -> None:
        try:
            found = context.run(call)
        except (StopIteration, GeneratorExit) as error:  # no future can carry these
            exited = TaskExitError.of(error)
            exited.__cause__ = error
            tell(ended.set_exception, exited)
        except BaseException as error:  # noqa: BLE001 - travels on to whoever waits
            tell(ended.set_exception, error)
        else:
            tell(ended.set_result, found)

    def tell(settle: Callable[[Any], None], value: Any) -> None:
        loop.call_soon_threadsafe(settle_once, settle, value)

    def settle_once(settle: Callable[[Any], None], value: Any) -> None:
        if not ended.done():
            settle(value)

    # A daemon: the process may end while it hangs, as after a second signal.
    threading.Thread(target=work, name=name, daemon=True).start()
    return ended


def running_loop() -> asyncio.AbstractEventLoop | None:
    """Return the event loop of this thread, None where none runs."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


class _UndoneError(Exception):
    """The thread's block raised: its transaction is rolled back."""


_COMMIT, _ROLLBACK = "commit", "rollback"


class ThreadCursor:
    """A cursor of a transaction, for a thread; each call waits for the event loop."""

    def __init__(self, transaction: ThreadTransaction) -> None:
        self._transaction = transaction

    def execute(self, query: str, args: object = None) -> int:
        """Run one statement; return the rows it matched."""
        return int(self._transaction.call("execute", query, args))

    def executemany(self, query: str, args: object) -> int:
        """Run one statement for each of *args*; return the rows they matched."""
        return int(self._transaction.call("executemany", query, args) or 0)

    def fetchone(self) -> tuple[Any, ...] | None:
        """Return the next row, None behind the last."""
        found: tuple[Any, ...] | None = self._transaction.call("fetchone")
        return found

    def fetchall(self) -> list[tuple[Any, ...]]:
        """Return the rows that are left."""
        return list(self._transaction.call("fetchall"))


class ThreadTransaction:
    """A transaction for a thread: a coroutine in the event loop holds it, and does what is asked.

    Args:
        database: Where.
        loop: The event loop of *database*.
    """

    def __init__(self, database: Database, loop: asyncio.AbstractEventLoop | None) -> None:
        self._database = database
        self._loop = loop
        self._asked: asyncio.Queue[tuple[str, tuple[Any, ...]]] = asyncio.Queue()
        self._answer: Future[Any] = Future()
        self._held: Future[None] = Future()

    def __enter__(self) -> ThreadCursor:
        if running_loop() is self._in_loop():
            raise RuntimeError("expected `async with ctx.transaction()` in the event loop's thread")
        self._held = asyncio.run_coroutine_threadsafe(self._hold(), self._in_loop())
        self._held.add_done_callback(self._end)
        self._wait()
        return ThreadCursor(self)

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        if kind is None:
            self.call(_COMMIT)
            return
        with suppress(Exception):  # what ended the block is told, not what became of its end
            self.call(_ROLLBACK)

    def call(self, method: str, *args: Any) -> Any:
        """Call a method of the cursor in the event loop, and wait for what it returns."""
        self._answer = Future()
        if self._held.done() and not self._held.cancelled() and self._held.exception() is None:
            raise RuntimeError("expected a transaction that is open, this one has ended")
        self._in_loop().call_soon_threadsafe(self._asked.put_nowait, (method, args))
        return self._wait()

    def _in_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            raise RuntimeError("expected a context that was made in its database's event loop")
        return self._loop

    def _wait(self) -> Any:
        if self._held.done():
            self._end(self._held)
        return self._answer.result()

    async def _hold(self) -> None:
        """Hold the transaction until it is to be committed or rolled back."""
        with suppress(_UndoneError):
            async with self._database.transaction() as cursor:
                self._answer.set_result(None)
                while (asked := await self._asked.get())[0] != _COMMIT:
                    await self._do(cursor, *asked)

    async def _do(self, cursor: Cursor, method: str, args: tuple[Any, ...]) -> None:
        if method == _ROLLBACK:
            raise _UndoneError
        try:
            found = await getattr(cursor, method)(*args)
        except asyncio.CancelledError:
            raise  # it is cut off
        except BaseException as error:  # noqa: BLE001 - the thread's to handle, or to let pass
            self._answer.set_exception(error)
        else:
            self._answer.set_result(found)

    def _end(self, held: Future[None]) -> None:
        """Let the thread go on: the transaction ended, as it asked or before it could."""
        with suppress(InvalidStateError):  # it has its answer
            if held.cancelled():
                self._answer.set_exception(TimeoutError("the transaction was cut off"))
            elif (error := held.exception()) is not None:
                self._answer.set_exception(error)
            else:
                self._answer.set_result(None)
