"""What a worker's user needs on aioworker's own tables, and who lacks some of it."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from aioworker.mysql.errors import MySQLError

if TYPE_CHECKING:
    from aioworker.mysql.database import Database

# The least that a worker's user needs: privileges, table.
PRIVILEGES = (
    ("SELECT, INSERT, UPDATE", "aioworker_budget"),
    ("SELECT, INSERT, UPDATE, DELETE", "aioworker_worker"),
    ("SELECT, INSERT, UPDATE, DELETE", "aioworker_run"),
    ("SELECT, INSERT, UPDATE, DELETE", "aioworker_start"),
    ("SELECT, INSERT, DELETE", "aioworker_change"),
)

# Without a table: on all of them. A user sees those of others only as far as it may read them.
_GRANTED = """SELECT grantee, table_name, privilege_type FROM information_schema.table_privileges
    WHERE table_schema = DATABASE()
UNION SELECT grantee, NULL, privilege_type FROM information_schema.schema_privileges
    WHERE DATABASE() LIKE table_schema
UNION SELECT grantee, NULL, privilege_type FROM information_schema.user_privileges"""


async def lacking(database: Database) -> list[str]:
    """Return the GRANTs that those lack who work already, as far as the server shows them.

    Who may insert into `aioworker_worker` works: nobody else needs to. By a right on the whole
    database, or server, others may too; they are named as well, since nothing tells them apart.
    """
    granted: set[tuple[str, str | None, str]] = set()
    with suppress(MySQLError):  # some users may not look
        granted = {(who, table, what) for who, table, what in await database.query(_GRANTED)}
    insert = {("aioworker_worker", "INSERT"), (None, "INSERT")}
    workers = {who for who, table, what in granted if (table, what) in insert}
    found = []
    for who in sorted(workers):
        for privileges, table in PRIVILEGES:
            missing = [
                one
                for one in privileges.split(", ")
                if not {(who, table, one), (who, None, one)} & granted
            ]
            if missing:
                on = qualified(database.address.database, table)
                found.append(f"GRANT {', '.join(missing)} ON {on} TO {_account(who)};")
    return found


def qualified(database: str, table: str) -> str:
    """Return the name of a database's table as a statement has it."""
    return "`{}`.`{}`".format(database.replace("`", "``"), table)


def text(value: str) -> str:
    """Return a text as a statement has it."""
    doubled = value.replace("\\", "\\\\").replace("'", "''")
    return f"'{doubled}'"


def _account(grantee: str) -> str:
    """Return an account as a statement has it: the server's own list escapes nothing.

    MariaDB's roles have no host.
    """
    user, _at, host = grantee[1:-1].rpartition("'@'")
    return f"{text(user)}@{text(host)}" if host else text(user)
