"""What a session sets before it is used, and what it must find on its server.

The defaults of a server are somebody else's: with `completion_type=CHAIN` a COMMIT opens a
transaction that holds the next writes, with `RELEASE` it ends the connection. So a session
sets all that gives a statement its meaning or makes it fail. What cannot be set is read, and
a server that will not do is refused before anything is taken.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any, NamedTuple

from pymysql.constants import SERVER_STATUS
from pymysql.err import MySQLError

IDLE_SECONDS = 30  # after its longest statement the server may end a session
LOCK_WAIT_SECONDS = 5
AGGREGATE_BYTES = 1_048_576  # MariaDB cuts JSON_ARRAYAGG at this length, without an error
# What is to be taken back of a start of a thousand messages names each twice: 134,000 bytes.
SMALLEST_PACKET_BYTES = 262_144
_MOST = 2**64 - 1  # what the servers call no limit

# The site's tables hold zero dates, so those are allowed; nothing changes the grammar.
SQL_MODE = "STRICT_TRANS_TABLES,ERROR_FOR_DIVISION_BY_ZERO,NO_ENGINE_SUBSTITUTION"

# In this order: nothing commits before `completion_type` is set, and `max_join_size` changes
# `sql_big_selects`.
EVERYWHERE: dict[str, str | int] = {
    "completion_type": "NO_CHAIN",
    "autocommit": 1,
    "sql_mode": SQL_MODE,
    "time_zone": "+00:00",
    "lc_time_names": "en_US",
    "default_week_format": 0,
    "div_precision_increment": 4,
    "max_sort_length": 1024,
    "sort_buffer_size": 262_144,
    "sql_auto_is_null": 0,
    "sql_safe_updates": 0,
    "sql_select_limit": _MOST,
    "max_join_size": _MOST,
    "sql_big_selects": 1,
    "updatable_views_with_limit": "YES",
    "foreign_key_checks": 1,
    "unique_checks": 1,
    "group_concat_max_len": AGGREGATE_BYTES,
    "innodb_lock_wait_timeout": LOCK_WAIT_SECONDS,
    "lock_wait_timeout": LOCK_WAIT_SECONDS,
    "net_read_timeout": 30,
    "net_write_timeout": 60,
}
MARIADB: dict[str, str | int] = {
    "check_constraint_checks": 1,
    "max_session_mem_used": 2**63 - 1,
    "tmp_disk_table_size": _MOST,
}
MYSQL: dict[str, str | int] = {
    "range_optimizer_max_mem_size": 0,  # no limit: beyond one, a page reads all rows before it
}
# Seconds, the longest statement and `IDLE_SECONDS`: our own timeouts come first.
TIMEOUTS_EVERYWHERE = ("wait_timeout",)
TIMEOUTS_MARIADB = (
    "max_statement_time",
    "idle_transaction_timeout",
    "idle_readonly_transaction_timeout",
    "idle_write_transaction_timeout",
)

# Before all else, whatever `completion_type` says: `autocommit = 1` alone ends no transaction.
ROLLBACK = "ROLLBACK AND NO CHAIN NO RELEASE"

# The two servers call these variables by different names; this they both understand.
ISOLATION = "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED, {}"
READS_AND_WRITES, ONLY_READS = "READ WRITE", "READ ONLY"

_FLAGS = SERVER_STATUS.SERVER_STATUS_AUTOCOMMIT | SERVER_STATUS.SERVER_STATUS_IN_TRANS

# Read by SHOW: a variable that a server does not have is no error there.
_READ = (
    *("binlog_format", "log_bin", "lower_case_table_names", "max_allowed_packet"),
    *("wsrep_on", "wsrep_provider"),
)
_NO_PROVIDER = ("", "none")
_SHOW = f"SHOW SESSION VARIABLES WHERE Variable_name IN {_READ}"


def statement(timeout: float) -> str:
    """Return the one SET that a session begins with; both servers read their part of it.

    Args:
        timeout: Seconds that its longest statement may take.
    """
    seconds = idle_seconds(timeout)
    everywhere = EVERYWHERE | dict.fromkeys(TIMEOUTS_EVERYWHERE, seconds)
    mariadb = MARIADB | dict.fromkeys(TIMEOUTS_MARIADB, seconds)
    return (
        f"SET NAMES utf8mb4 COLLATE utf8mb4_general_ci, {_assigned(everywhere)}"
        f" /*M! , system_versioning_asof = DEFAULT, {_assigned(mariadb)} */"
        f" /*!80000 , max_execution_time = {seconds * 1000}, {_assigned(MYSQL)} */"
    )


def idle_seconds(timeout: float) -> int:
    """Return after how many idle seconds the server ends a session.

    Args:
        timeout: Seconds that its longest statement may take.
    """
    return int(timeout) + IDLE_SECONDS


async def restore(connection: Any, timeout: float, access: str = READS_AND_WRITES) -> None:
    """Undo what a task's statements did to a session, as far as the server's answers show it.

    A transaction that is open is rolled back, and a session without autocommit is set again.
    It costs nothing otherwise: each answer to a statement that reads no rows has both flags.

    Args:
        connection: aiomysql's, in no transaction of ours.
        timeout: Seconds that its longest statement may take.
        access: What its transactions may do, `READS_AND_WRITES` or `ONLY_READS`.

    Raises:
        MySQLError: The server refuses a setting.
    """
    if connection.server_status & _FLAGS != SERVER_STATUS.SERVER_STATUS_AUTOCOMMIT:
        await _settle(connection, timeout, access)


async def _settle(connection: Any, timeout: float, access: str) -> None:
    """End whatever transaction is open, and set all that a session relies on."""
    await connection.query(ROLLBACK)
    await connection.query(statement(timeout))
    await connection.query(ISOLATION.format(access))


def _assigned(values: dict[str, str | int]) -> str:
    return ", ".join(f"SESSION {name} = {value!r}" for name, value in values.items())


class Server(NamedTuple):
    """What a session has found on its server.

    Args:
        schema: The database's name as the server has it; lower-cased, if it is blind to case;
            empty if the session has none.
        lock: A lock that this session alone holds, by which it can be found; None if the
            server refuses one.
        unfit: Why it will not do, and the cure, in one line; None if it will.
    """

    schema: str
    lock: str | None
    unfit: str | None


async def begin(
    connection: Any,
    timeout: float,
    database: str,
    *,
    any_node: bool,
    access: str = READS_AND_WRITES,
) -> Server:
    """Set what a new session relies on, and read what its server is.

    Args:
        connection: aiomysql's, logged in, nothing done with it yet.
        timeout: Seconds that its longest statement may take.
        database: The database's name as the address has it.
        any_node: Whether a node of a Galera cluster will do.
        access: What its transactions may do, as for `restore`.

    Raises:
        MySQLError: The server refuses a setting.
    """
    await _settle(connection, timeout, access)
    lock = f"aioworker:session:{secrets.token_hex(16)}"
    async with connection.cursor() as cursor:
        try:
            await cursor.execute("SELECT DATABASE(), GET_LOCK(%s, 0)", (lock,))
        except MySQLError:  # some clusters have no named locks; a lost connection fails again
            await cursor.execute("SELECT DATABASE(), NULL")
        schema, held = await cursor.fetchone()
        await cursor.execute(_SHOW)
        found = {str(name).lower(): str(value) for name, value in await cursor.fetchall()}
    schema, expected = schema or "", database
    if found.get("lower_case_table_names", "0") != "0":
        schema, expected = schema.lower(), expected.lower()
    unfit = _unfit(found, any_node=any_node, writes=access != ONLY_READS)
    if schema != expected:
        unfit = (
            f"expected a session in database {database!r}, got: {schema or 'none'!r};"
            " does the server's init_connect say USE?"
        )
    return Server(schema, lock if held == 1 else None, unfit)


def _unfit(found: Mapping[str, str], *, any_node: bool, writes: bool) -> str | None:
    """Return why a server with these variables will not do; None if it will."""
    galera = found.get("wsrep_on") == "ON" or found.get("wsrep_provider", "") not in _NO_PROVIDER
    if galera and not any_node:
        return (
            "it is a Galera node, whose named locks hold on one node only: set"
            " AIOWORKER_GALERA=single-writer if all workers write through this one,"
            " or AIOWORKER_BUDGET=worker"
        )
    packet_bytes = int(found.get("max_allowed_packet", SMALLEST_PACKET_BYTES))
    if packet_bytes < SMALLEST_PACKET_BYTES:
        return (
            f"expected max_allowed_packet of at least {SMALLEST_PACKET_BYTES} bytes, for the"
            f" notes of a full start, got: {packet_bytes}; raise it on the server"
        )
    if writes and found.get("log_bin") == "ON" and found.get("binlog_format") == "STATEMENT":
        return (
            "expected binlog_format MIXED or ROW, got: STATEMENT, which cannot log READ"
            " COMMITTED transactions; set it on the server"
        )
    return None
