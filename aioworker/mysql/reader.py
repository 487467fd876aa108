"""A connection by which nothing is written: to a replica, perhaps, that is a little behind."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aioworker.errors import DatabaseError
from aioworker.mysql import errors, session
from aioworker.mysql.database import Database
from aioworker.mysql.errors import MySQLError

if TYPE_CHECKING:
    from aioworker.addresses import DatabaseAddress


class Reader(Database):
    """A connection to a server that is only read: any will do that has the tables.

    The server refuses a write in it, whatever its user may do.

    Args:
        address: Where it is.
        connect_timeout: As for `Database`.
        timeout: Likewise.
    """

    setting = "AIOWORKER_MYSQL_READ_URL"
    access = session.ONLY_READS

    def __init__(self, address: DatabaseAddress, *, connect_timeout: float, timeout: float) -> None:
        super().__init__(address, connect_timeout=connect_timeout, timeout=timeout, any_node=True)

    def explain(self, error: Exception) -> DatabaseError:
        """Say in one line why it cannot be used; a write is its task's fault."""
        if isinstance(error, MySQLError) and errors.only_reads(error):
            words = errors.describe(error).partition(";")[0]
            return DatabaseError(
                f"{words} at {self.address.shown}: nothing is written by {self.setting}, keys and"
                " needed are to read only"
            )
        return super().explain(error)
