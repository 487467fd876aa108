"""A database in which nothing lasts: for tests.

One transaction is around all that its connection does. A transaction inside of it is a savepoint:
a commit lets that go, a rollback goes back to it. Row locks are held to the end, and no other
connection sees what was written.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from pymysql.constants import ER
from pymysql.err import MySQLError

from aioworker.errors import DatabaseError
from aioworker.mysql import errors
from aioworker.mysql.database import OWN_SECONDS, Database, closing_on_error

_ALL, _ONE = "aioworker_all", "aioworker_one"
# Without autocommit: what follows a statement that commits by itself, or a deadlock, which ends
# the transaction around all, is in another one.
_BEGIN = ("SET SESSION autocommit = 0", "START TRANSACTION", f"SAVEPOINT {_ALL}")


class Rehearsal(Database):
    """A connection to one database; what is done over it is rolled back when it is left.

    Use as `async with Rehearsal(…) as database`. Once the connection is lost it is of no more use.

    Raises:
        DatabaseError: When it is left: a statement has committed by itself, such as COMMIT or
            CREATE TABLE. What was written before that has stayed.
    """

    _begun = False

    async def __aexit__(self, *exc_info: object) -> None:
        try:
            if self.is_open:
                # What a lost connection leaves, the server rolls back.
                with suppress(MySQLError, TimeoutError):
                    await self._undo_all(self._connection)
        finally:
            self.close()

    async def _undo_all(self, connection: Any) -> None:
        async with asyncio.timeout(OWN_SECONDS):
            try:
                await _to_savepoint(connection, f"ROLLBACK TO SAVEPOINT {_ALL}")
            finally:
                await connection.rollback()

    async def _connect(self) -> Any:
        if self._begun:
            raise DatabaseError(
                f"connection to MySQL at {self.address.shown} lost, and with it all that was to be"
                " rolled back"
            )
        connection = await super()._connect()
        with closing_on_error(connection):
            for statement in _BEGIN:
                await connection.query(statement)
        self._begun = True
        return connection

    async def _restore(self, connection: Any) -> None:
        """Leave the session as it is: the transaction around all is open."""

    async def _begin(self, connection: Any) -> None:
        await connection.query(f"SAVEPOINT {_ONE}")

    async def _commit(self, connection: Any) -> None:
        await _to_savepoint(connection, f"RELEASE SAVEPOINT {_ONE}")

    async def _undo(self, connection: Any) -> None:
        # Outside of a transaction it was one statement, of which the server leaves nothing.
        if self._transaction_of is not None:
            await _to_savepoint(connection, f"ROLLBACK TO SAVEPOINT {_ONE}")


async def _to_savepoint(connection: Any, statement: str) -> None:
    """Go to a savepoint, or let it go.

    Raises:
        DatabaseError: It is not there any more.
    """
    try:
        await connection.query(statement)
    except MySQLError as error:
        if errors.code(error) != ER.SP_DOES_NOT_EXIST:
            raise
        raise DatabaseError(
            "expected only what can be rolled back: a statement ended the transaction around all,"
            " such as COMMIT or CREATE TABLE, which commit what was written before, or a deadlock"
        ) from error
