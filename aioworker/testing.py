"""For tests of your own tasks: what is published, without RabbitMQ; a run, without a worker.

`published` collects messages in place of RabbitMQ. `run` runs a task as a worker does, on a
database of yours; inside of `rolled_back` nothing of it lasts.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from aioworker.addresses import DatabaseAddress
from aioworker.errors import UsageError
from aioworker.mysql.database import Database
from aioworker.mysql.rehearsal import Rehearsal
from aioworker.producer import Outgoing, handing_to, outgoing_message
from aioworker.rabbitmq.message import LONGEST_RUN_SECONDS, Call, decode
from aioworker.tasks.context import Context
from aioworker.tasks.registry import check_publishable, find
from aioworker.tasks.task import AnyTask, Task

__all__ = ["Message", "Run", "published", "rolled_back", "run"]

CONNECT_SECONDS = 10.0
_NOWHERE = "mysql://127.0.0.1/none"  # of a task that uses no database: nothing connects


@dataclass(frozen=True, slots=True)
class Message:
    """What was published once, with its arguments as a worker gets them: as JSON.

    A tuple is a list by then, a key `1` is `"1"`, a date is text, and of a chunk each id is there
    once.

    Args:
        task: The task's name.
        args: Positional arguments of its function, without a `Context`.
        kwargs: Keyword arguments.
        urgent: Whether it was published to the urgent lane; otherwise to the bulk lane.
        message_id: What `publish` returned; two messages that differ in it alone are equal.
    """

    task: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    urgent: bool = False
    message_id: str = field(default="", compare=False, repr=False)


@contextmanager
def published() -> Iterator[list[Message]]:
    """Collect in a list what is published inside, in place of RabbitMQ.

    That is what `publish_sync`, a `Producer` and a task's own `publish` and `publish_sync`
    publish, in any thread of the process and any event loop; nothing connects. They check and
    encode as they always do, so that a wrong argument raises the same error; whether the task's
    queues are declared is not looked at. Of two, one inside the other, the inner one gets them.

    Yields:
        The messages so far, in their order.
    """
    messages: list[Message] = []

    def take(outgoing: Outgoing, urgent: bool) -> None:
        name = str(outgoing.headers["task"])
        call = _received(name, outgoing)
        messages.append(
            Message(name, tuple(call.args), call.kwargs, urgent, outgoing.message_id or "")
        )

    with handing_to(take):
        yield messages


def _received(name: str, outgoing: Outgoing) -> Call:
    """Return what a worker reads in a message."""
    return decode(
        name,
        outgoing.headers,
        outgoing.content_type,
        outgoing.body,
        outgoing.content_encoding,
    )


@dataclass(frozen=True, slots=True)
class Run:
    """What a run did, as far as it is told.

    Args:
        counts: What its log line would have: `ids` of a task that takes chunks, and what the
            task counted in `ctx.counts`.
        needed: What of its chunk the function was called with; without any it was not called.
            None for a task that takes no chunks.
    """

    counts: Counter[str]
    needed: list[Any] | None = None


async def run(
    task: AnyTask | str,
    /,
    *args: Any,
    database: str | Database | None = None,
    rollback: bool = False,
    **kwargs: Any,
) -> Run:
    """Run a task once, as a worker runs it; `asyncio.run(run(…))` where no event loop is.

    The arguments are checked and encoded as for publishing, and read again. What the task has
    as `needed` is asked first, as under a rate limit; a `def` runs in a thread. No rate and no
    time limit is kept, so that a debugger may stop in it. RabbitMQ and aioworker's own tables
    are not used.

    Args:
        task: The task, or the name of one that is registered.
        args: The function's arguments, without its `Context`.
        database: Where it works: an address, `mysql://user:password@host:3306/database`, or what
            `rolled_back` gave. No setting stands in for it: that may be the database of your
            site.
        rollback: Whether what it wrote is rolled back at the end, as in `rolled_back`; in there
            it is anyway.
        kwargs: The function's keyword arguments.

    Raises:
        UsageError: The task cannot be called with these, or needs a database.
        MessageRefusedError: A worker would refuse the arguments.
        DatabaseError: The database cannot be used, or not all could be rolled back.
        Exception: What the task raises, `Retry` and `DeadLetter` too, as it is.
    """
    made = task if isinstance(task, Task) else find(task)
    outgoing = outgoing_message(*check_publishable(made, args, kwargs))
    call = _received(made.name, outgoing)
    message_id = outgoing.message_id or ""
    if isinstance(database, Database):
        if rollback:
            raise UsageError("expected rollback with the address of a database, got one open")
        return await _run(made, call, database, message_id)
    if database is None and made.needs_database:
        raise UsageError(
            f"task {made.name!r} uses the database: expected the address of one for tests,"
            " such as database='mysql://root@127.0.0.1:3306/test'"
        )
    if not made.needs_database:
        return await _run(made, call, _opened(Database, _NOWHERE), message_id)
    async with _opened(Rehearsal if rollback else Database, database or "") as opened:
        return await _run(made, call, opened, message_id)


async def _run(made: AnyTask, call: Call, database: Database, message_id: str) -> Run:
    """Do what `Consumer` does between taking a message and settling it, but for the budget."""
    ctx = Context(database, made.name, message_id)
    (args, kwargs), needed = made.checked(call.args, call.kwargs), None
    try:
        if made.takes_chunks:
            ctx.counts["ids"] = len(args[0])
            needed = await made.read_needed(ctx, args[0])
            args[0] = list(needed)
        if needed != []:
            async with asyncio.timeout(None) as limit:
                with database.bounded(limit):
                    await made.run(ctx, args, kwargs)
    finally:
        database.end_run()
    return Run(ctx.counts, needed)


@asynccontextmanager
async def rolled_back(database: str) -> AsyncIterator[Database]:
    """Connect to a database, and roll back at the end all that was done over this connection.

    Inside, rows can be put there, a task be `run` on them, and what it wrote be read::

        async with rolled_back("mysql://root@127.0.0.1:3306/test") as database:
            await database.execute("INSERT INTO shops (id) VALUES (3)")
            await run(update_rating, [3], database=database)
            assert await database.query("SELECT rating FROM shops") == [(None,)]

    The task's transactions commit and roll back as they do elsewhere, inside of the one around
    all. Other connections see nothing of it, and wait for the rows that it wrote, those of
    Django's models too. What cannot be rolled back: what the task does over a connection that it
    opens itself; tables that are made or changed, and all that was written before that; what an
    engine other than InnoDB holds; the next AUTO_INCREMENT.

    Args:
        database: Its address, `mysql://user:password@host:3306/database`.

    Yields:
        The connection, with `query(statement, args)` and `execute(statement, args)`.

    Raises:
        UsageError: The address is none.
        DatabaseError: The database cannot be used. At the end: a statement ended the transaction
            around all, such as COMMIT, CREATE TABLE or one in a deadlock.
    """
    async with _opened(Rehearsal, database) as opened:
        yield opened


def _opened(kind: type[Database], address: str) -> Database:
    try:
        parsed = DatabaseAddress.parse(address)
    except ValueError as error:
        raise UsageError(str(error)) from None
    # Nothing here relies on named locks, which a node of a Galera cluster holds alone.
    return kind(parsed, connect_timeout=CONNECT_SECONDS, timeout=LONGEST_RUN_SECONDS, any_node=True)
