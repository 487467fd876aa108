"""One connection to the database: opened when needed, closed when in doubt.

Never aiomysql's Pool, which loses wake-ups when a connection breaks: one is all that a worker
needs. aiomysql has no timeout of its own for a statement: each use is inside one
`asyncio.timeout()`, and a statement that is cut off is killed on the server too, which would
finish it otherwise.
"""

from __future__ import annotations

import asyncio
import logging
import re
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import aiomysql
from pymysql.constants import CLIENT, ER
from pymysql.err import MySQLError

from aioworker.errors import DatabaseError, NestedTransactionError
from aioworker.logs import fields
from aioworker.mysql import errors, login, session
from aioworker.mysql.errors import ErrorKind

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
    from contextlib import AbstractAsyncContextManager
    from types import TracebackType

    from aioworker.addresses import DatabaseAddress
    from aioworker.reasons import Reason

log = logging.getLogger(__name__)

KILL_SECONDS = 3
# For a statement of ours, which waits for a lock for `session.LOCK_WAIT_SECONDS` at most, and a
# second for a turn: a server that answers no sooner stands still, and perhaps another one is there.
OWN_SECONDS = 7
ANSWER_SECONDS = 3  # for a server to say that it is there; then its address is tried anew
TOLD_SECONDS = 1.0  # a shorter wait in a run is not worth a word
# What may stand before a statement's first word; a comment with an exclamation mark is executed.
_BEFORE = r"(?:\s|\(|/\*(?![!M]).*?\*/|(?:#|--(?=\s))[^\n]*(?:\n|\Z))*+"
_READ = re.compile(
    _BEFORE + r"(?:(?:SELECT|SHOW|DESC|DESCRIBE|VALUES|TABLE)\b"
    r"|WITH\b(?!.*\b(?:INSERT|REPLACE|UPDATE|DELETE)\b))",
    re.IGNORECASE | re.DOTALL,
)
# It returns rows only by RETURNING: those that it wrote.
_WRITE = re.compile(_BEFORE + r"(?:INSERT|REPLACE|UPDATE|DELETE)\b", re.IGNORECASE | re.DOTALL)
_CALL = re.compile(_BEFORE + r"CALL\b", re.IGNORECASE | re.DOTALL)
_LOGIN_REFUSED = (ER.ACCESS_DENIED_ERROR, errors.Lacking.SECURE_TRANSPORT_REQUIRED)


class FirstWrite(Protocol):
    """Who waits for a run's first write, and is told of it."""

    async def before_opening(self) -> None:
        """Wait as long as it is too early to open a transaction that may write."""

    async def before_writing(self) -> tuple[str, ...]:
        """Wait, inside a transaction, as long as it is too early to write.

        Returns:
            Statements in which the server waits out the rest; none if nothing is left.
        """

    def wrote(self) -> None:
        """Note that a statement has written."""

    async def before_commit(self, cursor: Cursor) -> None:
        """Write along: the transaction that is committed next has written."""


class Cursor(aiomysql.Cursor):  # type: ignore[misc]  # aiomysql has no types
    """What `Database.transaction` gives: aiomysql's cursor, which knows whether it wrote.

    A statement that returns rows may have written them, or read them. In doubt it waits for its
    moment as a write does, and so does the next one.

    Attributes:
        written: Rows that its statements wrote so far, or may have written.
        surely: Whether one of them wrote without a doubt.
        first_write: Asked before the first that does, and told of it; None for nobody.
    """

    written = 0
    surely = False
    first_write: FirstWrite | None = None

    async def execute(self, query: str, args: object = None) -> int:
        """Run one statement; return the rows it matched."""
        reads = _reads(query)
        first = None if self.surely or reads else self.first_write
        waits = await first.before_writing() if first is not None else ()
        matched = int(await super().execute(_behind(waits, query), args))
        for _ in waits:
            await self.nextset()
            matched = int(self.rowcount)
        if not reads:
            self._note(query, matched, first)
        return matched

    async def callproc(self, procname: str, args: Sequence[object] = ()) -> object:
        """Call a procedure, which may write."""
        first = None if self.surely else self.first_write
        if first is not None:
            for wait in await first.before_writing():
                await self._query(wait)
        found: object = await super().callproc(procname, args)
        self._note(f"CALL {procname}", int(self.rowcount), first)
        return found

    def _note(self, query: str | bytes, matched: int, first: FirstWrite | None) -> None:
        """Note what a statement wrote, or may have written."""
        returns = self.description is not None
        # Of several statements the first has answered, of a procedure's on MySQL the last.
        in_doubt = returns or self._result.has_next or _begins(query, _CALL)
        if matched > 0 and (not returns or _begins(query, _WRITE)):
            self.surely = True
        elif in_doubt:
            matched = max(matched, 1)
        self.written += matched
        if first is not None and matched:
            first.wrote()


def _reads(query: str | bytes) -> bool:
    """Whether a statement can be seen to write nothing, but by a function that it calls."""
    return _begins(query, _READ) and ";" not in str(query).rstrip(" \t\r\n;")


def _begins(query: str | bytes, pattern: re.Pattern[str]) -> bool:
    return isinstance(query, str) and pattern.match(query) is not None


def _behind(waits: tuple[str, ...], query: str | bytes) -> str | bytes:
    """Return a statement in one packet with those that it waits for."""
    first = "".join(f"{wait}; " for wait in waits)
    return first + query if isinstance(query, str) else first.encode() + query


class Answer(NamedTuple):
    """What the server answers to one statement.

    Args:
        matched: Rows that it wrote or read.
        rows: What it read.
    """

    matched: int
    rows: list[tuple[Any, ...]]


class _Run:
    """What uses a connection: a run of a task, or a step of the worker's own.

    Args:
        database: Whose connection.
        go_on: Awaited before each of its transactions; None for nobody.

    Attributes:
        uses: How many of its asyncio tasks use it.
        ended: Whether the run is over.
    """

    def __init__(self, database: Database, go_on: Callable[[], Awaitable[None]] | None) -> None:
        self.database = database
        self.go_on = go_on
        self.uses = 0
        self.ended = False

    def refuse_ended(self) -> None:
        """See that the run is not over: others use the connection by then.

        Raises:
            DatabaseError: It is.
        """
        if self.ended:
            raise DatabaseError("expected a statement inside its run, which has ended")


# An asyncio task and a thread have a copy of it: what a run begins is known by it.
_current: ContextVar[_Run | None] = ContextVar("aioworker_run", default=None)


class Database:
    """A connection to one database, reopened after it was lost.

    Sessions are READ COMMITTED, in UTC, count the rows that a WHERE matched (not those
    that it changed), and give up on a lock after 5 s; `session` has all that they set.
    `async with` connects and closes.

    Args:
        address: Where it is.
        connect_timeout: Seconds for a connection to stand, session settings included.
        timeout: Seconds for a `query` or a `transaction`; an idle session is ended by the
            server 30 s later than that.
        any_node: Whether a node of a Galera cluster will do, whose named locks hold on it
            alone; otherwise it is refused.

    Attributes:
        setting: What named it, for errors.
        access: What its transactions may do.
    """

    setting = errors.MYSQL_URL
    access = session.READS_AND_WRITES

    def __init__(
        self,
        address: DatabaseAddress,
        *,
        connect_timeout: float,
        timeout: float,
        any_node: bool = False,
    ) -> None:
        self.address = address
        self.timeout = timeout
        self._any_node = any_node
        self._server: session.Server | None = None
        self._connect_timeout = connect_timeout
        self._connection: Any = None
        self._no_reconnect = False
        self._transaction_of: object | None = None  # who holds the transaction that is open
        self._first_write: FirstWrite | None = None
        # Of what is on now, and who is to be told of its waits.
        self._limits: list[tuple[asyncio.Timeout, Callable[[Reason | None], None] | None]] = []

    async def __aenter__(self) -> Database:
        await self.ready()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.close()

    def another(self) -> Database:
        """Return another connection to the same database, not open yet."""
        return Database(
            self.address,
            connect_timeout=self._connect_timeout,
            timeout=self.timeout,
            any_node=self._any_node,
        )

    @property
    def is_open(self) -> bool:
        """Whether a connection stands, as far as is known."""
        return self._connection is not None

    def take_no_room(self) -> DatabaseError | None:
        """Return what the server said since the last time if it had no room for a write.

        A write of a few bytes may do where a larger one did not.
        """
        if self._connection is None:
            return None
        refused, self._connection.no_room = self._connection.no_room, None
        return None if refused is None else self.explain(refused)

    async def ready(self) -> None:
        """See that the connection stands; open one where it does not.

        Raises:
            DatabaseError: It cannot be had; the text says why and what to do.
        """
        try:
            async with asyncio.timeout(self._connect_timeout):
                if self._connection is not None and not await self._answers():
                    self.close()
                if self._connection is None:
                    self._connection = await self._connect()
        except (MySQLError, OSError) as error:
            self.close()
            raise self.explain(error) from error

    async def schema(self) -> str:
        """Return the database's name as its server has it, however the address spells it."""
        async with self._use():
            return self._server.schema if self._server else self.address.database

    async def query(self, statement: str, args: object = None) -> list[tuple[Any, ...]]:
        """Run one statement in a transaction of its own; return the rows it read."""
        if self._first_write is not None and not _reads(statement):
            async with self.transaction() as cursor:
                await cursor.execute(statement, args)
                return list(await cursor.fetchall())
        if not _reads(statement):
            await self._go_on()
        async with self._use() as connection, connection.cursor() as cursor:
            await cursor.execute(statement, args)
            return list(await cursor.fetchall())

    async def execute(self, statement: str, args: object = None) -> int:
        """Run one statement in a transaction of its own; return how many rows it matched."""
        if self._first_write is not None:
            async with self.transaction() as cursor:
                return await cursor.execute(statement, args)
        await self._go_on()
        async with self._use() as connection, connection.cursor() as cursor:
            return int(await cursor.execute(statement, args))

    async def each(self, *statements: str, args: object = None) -> list[Answer]:
        """Send statements of ours at once, each a transaction of its own; return every answer.

        The first that fails ends it: those behind it are not run.
        """
        answers = []
        async with (
            asyncio.timeout(OWN_SECONDS),
            self._use() as connection,
            connection.cursor() as cursor,
        ):
            await cursor.execute("; ".join(statements), args)
            answers.append(Answer(cursor.rowcount, list(await cursor.fetchall() or ())))
            while await cursor.nextset():
                answers.append(Answer(cursor.rowcount, list(await cursor.fetchall() or ())))
        return answers

    def transaction(self) -> AbstractAsyncContextManager[Cursor]:
        """Write in one transaction, committed at the end, rolled back on any exception.

        Raises:
            NestedTransactionError: One is open.
        """
        return _Block(self._transaction())

    @asynccontextmanager
    async def _transaction(self) -> AsyncIterator[Cursor]:
        if self._transaction_of is not None:
            raise NestedTransactionError("expected no transaction inside another one")
        self._transaction_of = mine = object()
        first = self._first_write
        try:
            if first is not None:
                await first.before_opening()
            await self._go_on(mine)
            async with self._use() as connection:
                await self._begin(connection)
                async with connection.cursor(Cursor) as cursor:
                    cursor.first_write = first
                    yield cursor
                    surely, cursor.first_write = cursor.surely, None
                    if first is not None and cursor.written:
                        await first.before_commit(cursor)
                await self._commit(connection)
                if surely:
                    self._first_write = None
        finally:
            if self._transaction_of is mine:
                self._transaction_of = None

    def end_run(self) -> None:
        """Close the connection if the run left a transaction open: in an asyncio task of its own.

        The next run begins one.
        """
        if self._transaction_of is not None:
            self._transaction_of = None
            self.close()

    def expect(self, first: FirstWrite | None) -> None:
        """Have *first* wait for the next transaction that writes, and write along; None forgets."""
        self._first_write = first

    async def _go_on(self, transaction: object | None = None) -> None:
        """Ask the run that is on, if one is, whether it may begin a further transaction.

        Args:
            transaction: Which one; None for that of a single statement, which may be part of an
                open one.
        """
        run = _current.get()
        begins = self._transaction_of is transaction
        if begins and run is not None and run.database is self and run.go_on is not None:
            await run.go_on()

    def bounded(
        self,
        limit: asyncio.Timeout,
        report: Callable[[Reason | None], None] | None = None,
        go_on: Callable[[], Awaitable[None]] | None = None,
    ) -> ExitStack:
        """Inside is a run: its wait for a first write is no part of its limit.

        What it leaves behind in an asyncio task of its own may use the connection no more: a
        statement that runs at its end is cut off by closing it.

        Args:
            limit: The limit.
            report: Called with the reason when a wait begins that lasts a second or more, and
                with None when it is over.
            go_on: Awaited before each transaction of the run; raises if that may not begin.
        """
        # No generator of contextlib's, which sets the traceback of an error that passes: an
        # exception of a task's may be a frozen dataclass, and refuse.
        inside = self._limited(limit, report)
        _current.set(run := _Run(self, go_on))
        inside.callback(self._end, run)
        return inside

    def _end(self, run: _Run) -> None:
        _current.set(None)
        run.ended = True
        if run.uses:
            self.close()

    def _limited(
        self, limit: asyncio.Timeout, report: Callable[[Reason | None], None] | None = None
    ) -> ExitStack:
        """Inside, a wait for a first write is no part of a limit."""
        entry = (limit, report)
        self._limits.append(entry)
        inside = ExitStack()
        inside.callback(self._limits.remove, entry)
        return inside

    @contextmanager
    def waiting(self, seconds: float, reason: Reason) -> Iterator[None]:
        """Inside, what is on waits for so long: give it as much more time, and tell why."""
        reports = []
        for limit, report in self._limits:
            if not limit.expired() and (when := limit.when()) is not None:
                limit.reschedule(when + seconds)
            if report is not None and seconds >= TOLD_SECONDS:
                reports.append(report)
        for report in reports:
            report(reason)
        try:
            yield
        finally:
            for report in reports:
                report(None)

    @contextmanager
    def without_reconnect(self) -> Iterator[None]:
        """Inside, a lost connection is not replaced: it held a lock that is lost with it."""
        before, self._no_reconnect = self._no_reconnect, True
        try:
            yield
        finally:
            self._no_reconnect = before

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Turn what goes wrong with the database inside into one `DatabaseError`."""
        try:
            yield
        except (MySQLError, TimeoutError) as error:
            raise self.explain(error) from error

    def close(self) -> None:
        """Close the connection at once; the server rolls back what was not committed."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @asynccontextmanager
    async def _use(self) -> AsyncIterator[Any]:
        """Lend the connection: what belongs to a run has it until that ends."""
        run = _current.get()
        if run is None or run.database is not self:
            run = _Run(self, None)
        run.uses += 1
        try:
            async with self._lend(run) as connection:
                yield connection
        finally:
            run.uses -= 1

    @asynccontextmanager
    async def _lend(self, run: _Run) -> AsyncIterator[Any]:
        """Lend the connection; leave no transaction open and no statement running."""
        run.refuse_ended()
        if self._connection is None:
            if self._no_reconnect:
                raise DatabaseError(f"connection to MySQL at {self.address.shown} lost in a run")
            await self.ready()
            run.refuse_ended()
        connection = self._connection
        try:
            async with asyncio.timeout(self.timeout) as limit:
                with self._limited(limit):
                    if self._transaction_of is None:
                        await self._restore(connection)
                    yield connection
        except (asyncio.CancelledError, TimeoutError):
            await self.cut_off()
            raise
        except BaseException as error:
            # After a lock wait timeout the transaction is still open: never commit half.
            if self._connection is connection:
                await self._roll_back()
            if isinstance(error, MySQLError) and errors.only_reads(error):
                self.close()  # its address may lead to another server now
            raise

    # What a transaction is, in statements; `rehearsal` has others.

    async def _restore(self, connection: Any) -> None:
        """Have a session as it is to be before a use of it."""
        await session.restore(connection, self.timeout, self.access)

    async def _begin(self, connection: Any) -> None:
        await self._restore(connection)
        await connection.query("START TRANSACTION")  # BEGIN begins a block in Oracle's mode

    async def _commit(self, connection: Any) -> None:
        await connection.commit()

    async def _undo(self, connection: Any) -> None:
        await connection.rollback()

    async def cut_off(self) -> None:
        """Close the connection, and end the statement that it runs: the server would finish it."""
        if self._connection is None:
            return
        lock = self._server.lock if self._server else None
        self.close()
        if lock is not None:
            await self._kill(lock)

    async def _roll_back(self) -> None:
        try:
            async with asyncio.timeout(KILL_SECONDS):
                await self._undo(self._connection)
        except Exception:  # noqa: BLE001 - two of a run's coroutines may use it at once
            self.close()  # the server rolls back what a closed connection leaves

    async def _answers(self) -> bool:
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                with login.expecting_mysql():
                    await self._connection.ping(reconnect=False)
        except (MySQLError, OSError):
            return False
        return True

    async def _connect(self) -> Any:
        """Log in, set what a session relies on, and see that this server will do.

        Raises:
            DatabaseError: It will not.
        """
        connection = await self._log_in()
        with closing_on_error(connection):
            with login.expecting_mysql():
                server = await session.begin(
                    connection,
                    self.timeout,
                    self.address.database,
                    any_node=self._any_node,
                    access=self.access,
                )
            if server.unfit is not None:
                raise DatabaseError(f"cannot use MySQL at {self.address.shown}: {server.unfit}")
        self._server = server
        return connection

    async def _log_in(self) -> login.Connection:
        return await login.connect(
            self.address,
            charset="utf8mb4",
            autocommit=None,  # `session` sets it
            client_flag=CLIENT.FOUND_ROWS,
            program_name="aioworker",
        )

    async def _kill(self, lock: str) -> None:
        """End the statement of the session that holds a lock: the server would finish it.

        The number of a session is no name: behind a failover or a proxy it is somebody
        else's. There nobody holds the lock, and nothing is ended. One that runs on holds its row
        locks to its end.
        """
        try:
            async with asyncio.timeout(KILL_SECONDS):
                connection = await self._log_in()
                with closing_on_error(connection), login.expecting_mysql():
                    await connection.query(f"KILL QUERY IS_USED_LOCK('{lock}')")
                connection.close()
        except MySQLError as error:
            ended = errors.code(error) == ER.NO_SUCH_THREAD  # by itself
            if errors.is_the_servers(error) and not ended:
                log.warning(
                    "statement runs on, which was to be ended",
                    extra=fields(reason=errors.describe(error)),
                )
        except OSError:
            return  # the server does not answer: whoever asks it next says so

    def explain(self, error: Exception) -> DatabaseError:
        """Say in one line why this database cannot be used, and what to do."""
        away = errors.kind(error) in (None, ErrorKind.NO_ROOM)
        if isinstance(error, TimeoutError):
            reason = f"no answer in time; check {self.setting}"
        elif isinstance(error, MySQLError):
            reason = errors.describe(error, self.setting) + self._cure_by_tls(error)
            if errors.code(error) == ER.LOCK_WAIT_TIMEOUT:
                reason += "; somebody else holds a lock that this waits for"
        else:
            reason = " ".join(str(error).split())
        return DatabaseError(
            f"cannot use MySQL at {self.address.shown}: {reason}", unreachable=away
        )

    def _cure_by_tls(self, error: MySQLError) -> str:
        """Say what a refused login may lack: to MariaDB plain text is a wrong password too."""
        if errors.code(error) not in _LOGIN_REFUSED:
            return ""
        if self.address.tls is None:
            return "; if the server asks for TLS, add ssl_mode=required or ssl_ca=FILE to the URL"
        if self.address.tls.cert is None:
            return "; if it asks for a client's certificate, add ssl_cert and ssl_key"
        return ""


class _UndoneError(Exception):
    """The block raised: its transaction is rolled back."""


class _Block:
    """A transaction's block, which any exception may leave.

    Where it is not the database's, what it is makes no difference to the transaction. It is not
    handed on: contextlib sets the traceback of what it carries, which a frozen dataclass refuses.

    Args:
        transaction: The transaction.
    """

    def __init__(self, transaction: AbstractAsyncContextManager[Cursor]) -> None:
        self._transaction = transaction

    async def __aenter__(self) -> Cursor:
        return await self._transaction.__aenter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None or issubclass(kind, MySQLError | TimeoutError | asyncio.CancelledError):
            await self._transaction.__aexit__(kind, error, trace)
            return
        with suppress(_UndoneError):
            await self._transaction.__aexit__(_UndoneError, _UndoneError(), None)


@contextmanager
def closing_on_error(connection: Any) -> Iterator[None]:
    """Close a connection if what is inside fails."""
    try:
        yield
    except BaseException:
        connection.close()
        raise
