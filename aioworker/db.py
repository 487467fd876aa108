"""One connection to the database: opened when needed, closed when in doubt.

Never aiomysql's Pool, which loses wake-ups when a connection breaks. aiomysql has no
timeout of its own for a statement: each use is inside one `asyncio.timeout()`, and a
statement that is cut off is killed on the server too, which would finish it otherwise.
"""

from __future__ import annotations

import asyncio
import ssl
from contextlib import asynccontextmanager, contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

import aiomysql
from pymysql.constants import CLIENT
from pymysql.err import MySQLError

from aioworker.errors import DatabaseError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from aioworker.addresses import DatabaseAddress

LOCK_WAIT_SECONDS = 5
KILL_SECONDS = 3
IDLE_SECONDS = 30
AGGREGATE_BYTES = 1_048_576  # MariaDB cuts JSON_ARRAYAGG at this length, without an error
DEADLOCKS = frozenset({1213, 1020})  # another try at once may do


class Trouble(StrEnum):
    """What an error of the database means for the message at hand."""

    UNAVAILABLE = "unavailable"  # the server is away or full: wait, the message is fine
    CONTENTION = "contention"  # others hold the rows: later
    DATA = "data"  # these rows will never do
    EVERY_MESSAGE = "every message"  # a wrong table or privilege: no message will do


_CODES = {
    Trouble.UNAVAILABLE: (0, 1021, 1040, 1053, 1290, 1836, 1927, 2003, 2006, 2013, 3100, 4031),
    Trouble.CONTENTION: (1020, 1205, 1213, 1317, 1969, 3024),
    Trouble.DATA: (1048, 1062, 1264, 1292, 1366, 1406, 1451, 1452, 1644, 1690, 3819, 4025),
    Trouble.EVERY_MESSAGE: (1044, 1045, 1049, 1054, 1064, 1142, 1143, 1146, 1665, 1698),
}
_TROUBLES = {code: trouble for trouble, codes in _CODES.items() for code in codes}
_CURES = {
    0: "is it a MySQL server? check AIOWORKER_MYSQL_URL",
    1044: "`aioworker init --print` shows what the user needs",
    1045: "check user and password in AIOWORKER_MYSQL_URL",
    1049: "create it, or correct AIOWORKER_MYSQL_URL",
    1054: "is this the right database? check AIOWORKER_MYSQL_URL",
    1142: "`aioworker init --print` shows what the user needs",
    1143: "`aioworker init --print` shows what the user needs",
    1146: "is this the right database? check AIOWORKER_MYSQL_URL",
    1698: "check user and password in AIOWORKER_MYSQL_URL",
    2003: "is it running? check AIOWORKER_MYSQL_URL",
}


def sort(error: BaseException) -> Trouble | None:
    """Return what an error means; None when it is not known to be the database's."""
    if not isinstance(error, MySQLError):
        return None
    return _TROUBLES.get(code(error))


def code(error: MySQLError) -> int:
    """Return the server's error number, 0 where there is none."""
    first = error.args[0] if error.args else 0
    return first if isinstance(first, int) else 0


def describe(error: MySQLError) -> str:
    """Return the server's words and number, and the cure where one is known, in one line."""
    words = " ".join(str(error.args[-1] if error.args else error).split())
    if isinstance(error.__cause__, ssl.SSLError):
        words += f": {error.__cause__.reason}"
    cure = _CURES.get(code(error))
    return f"{words} ({code(error)})" + (f"; {cure}" if cure else "")


class Cursor(Protocol):
    """What `Database.transaction` gives: aiomysql's cursor, as far as it is used."""

    rowcount: int

    async def execute(self, query: str, args: object = None) -> int:
        """Run one statement; return the rows it matched."""

    async def fetchall(self) -> list[tuple[Any, ...]]:
        """Return the rows of the last statement."""


class Database:
    """A connection to one database, reopened after it was lost.

    Sessions are READ COMMITTED, in UTC, count the rows that a WHERE matched (not those
    that it changed), and give up on a row lock after 5 s.

    Args:
        address: Where it is.
        connect_timeout: Seconds for a connection to stand, session settings included.
        timeout: Seconds for a `query` or a `transaction`; an idle session is ended by the
            server 30 s later than that.
    """

    def __init__(self, address: DatabaseAddress, *, connect_timeout: float, timeout: float) -> None:
        self.address = address
        self._connect_timeout = connect_timeout
        self._timeout = timeout
        self._connection: Any = None

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
        except (MySQLError, OSError, RuntimeError) as error:
            # RuntimeError: PyMySQL misses a package for this server's way to log in.
            self.close()
            raise self.explain(error) from error

    async def query(self, statement: str, args: object = None) -> list[tuple[Any, ...]]:
        """Read rows outside any transaction."""
        async with self._use() as connection, connection.cursor() as cursor:
            await cursor.execute(statement, args)
            return list(await cursor.fetchall())

    async def execute(self, statement: str, args: object = None) -> int:
        """Run one statement in a transaction of its own; return how many rows it matched."""
        async with self._use() as connection, connection.cursor() as cursor:
            return int(await cursor.execute(statement, args))

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Cursor]:
        """Write in one transaction, committed at the end, rolled back on any exception."""
        async with self._use() as connection:
            await connection.begin()
            async with connection.cursor() as cursor:
                yield cursor
            await connection.commit()

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
        """Lend the connection; leave no transaction open and no statement running."""
        if self._connection is None:
            await self.ready()
        connection = self._connection
        thread = connection.thread_id()
        try:
            async with asyncio.timeout(self._timeout):
                yield connection
        except (asyncio.CancelledError, TimeoutError):
            self.close()
            await self._kill(thread)
            raise
        except BaseException:
            # After a lock wait timeout the transaction is still open: never commit half.
            await self._roll_back()
            raise

    async def _roll_back(self) -> None:
        try:
            async with asyncio.timeout(KILL_SECONDS):
                await self._connection.rollback()
        except (MySQLError, OSError):
            self.close()  # the server rolls back what a closed connection leaves

    async def _answers(self) -> bool:
        try:
            await self._connection.ping(reconnect=False)
        except (MySQLError, OSError, RuntimeError):
            return False
        return True

    async def _connect(self) -> Any:
        address = self.address
        connection = await aiomysql.connect(
            host=address.host,
            port=address.port,
            user=address.user,
            password=address.password,
            db=address.database,
            unix_socket=address.options.get("unix_socket"),
            ssl=_tls(address.options),
            charset="utf8mb4",
            autocommit=True,
            connect_timeout=self._connect_timeout,
            client_flag=CLIENT.FOUND_ROWS,
            program_name="aioworker",
            init_command="SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED",
        )
        with _closing_on_error(connection):
            async with connection.cursor() as cursor:
                await cursor.execute(
                    "SET SESSION time_zone = '+00:00', wait_timeout = %s,"
                    " innodb_lock_wait_timeout = %s, group_concat_max_len = %s",
                    (int(self._timeout) + IDLE_SECONDS, LOCK_WAIT_SECONDS, AGGREGATE_BYTES),
                )
        return connection

    async def _kill(self, thread: int) -> None:
        """End the statement of a connection that was cut off: the server would finish it."""
        try:
            async with asyncio.timeout(KILL_SECONDS):
                connection = await self._connect()
                with _closing_on_error(connection):
                    async with connection.cursor() as cursor:
                        await cursor.execute("KILL QUERY %s", (thread,))
                connection.close()
        except (MySQLError, OSError):
            # Gone already, or out of reach: its row locks then end with its lock wait.
            return

    def explain(self, error: Exception) -> DatabaseError:
        """Say in one line why this database cannot be used, and what to do."""
        if isinstance(error, TimeoutError):
            reason = "no answer in time; check AIOWORKER_MYSQL_URL"
        elif isinstance(error, MySQLError):
            reason = describe(error)
        elif isinstance(error, RuntimeError):
            reason = f"{error}; use TLS (ssl_mode=required), or install cryptography"
        else:
            reason = " ".join(str(error).split())
        return DatabaseError(f"cannot use MySQL at {self.address.shown}: {reason}")


@contextmanager
def _closing_on_error(connection: Any) -> Iterator[None]:
    try:
        yield
    except BaseException:
        connection.close()
        raise


def _tls(options: dict[str, str]) -> ssl.SSLContext | None:
    """Return the TLS context that the address asks for, as the mysql client's --ssl-mode."""
    mode = options.get("ssl_mode", "verify_identity" if "ssl_ca" in options else "disabled")
    if mode == "disabled":
        return None
    context = ssl.create_default_context(cafile=options.get("ssl_ca"))
    context.check_hostname = mode == "verify_identity"
    if mode == "required":
        context.verify_mode = ssl.CERT_NONE
    if "ssl_cert" in options:
        context.load_cert_chain(options["ssl_cert"], options.get("ssl_key"))
    return context
