"""What an error of the database means for the message at hand, and how to tell it."""

from __future__ import annotations

from enum import IntEnum, StrEnum

from pymysql.constants import CR
from pymysql.constants import ER as ER
from pymysql.err import MySQLError as MySQLError

from aioworker.words import command

DEADLOCKS = frozenset({ER.LOCK_DEADLOCK, ER.CHECKREAD})  # another try at once may do


class ErrorKind(StrEnum):
    """What an error of the database means for the message at hand."""

    CONTENTION = "contention"  # others hold the rows: later
    DATA = "data"  # these rows will never do
    NO_ROOM = "no room"  # on the server's disk: a write of a few bytes may do all the same
    EVERY_MESSAGE = "every message"  # a wrong table or privilege: no message will do


class Lacking(IntEnum):
    """Errors that PyMySQL has no names for, by the servers' own."""

    SIGNAL_EXCEPTION = 1644  # of a trigger
    BINLOG_STMT_MODE_AND_ROW_ENGINE = 1665
    LOCK_ABORTED = 1689
    DATA_OUT_OF_RANGE = 1690
    ACCESS_DENIED_NO_PASSWORD_ERROR = 1698
    INDEX_CORRUPT = 1712
    CANT_EXECUTE_IN_READ_ONLY_TRANSACTION = 1792
    TABLESPACE_MISSING = 1812
    TABLESPACE_DISCARDED = 1814
    MUST_CHANGE_PASSWORD = 1820
    READ_ONLY_MODE = 1836
    MUST_CHANGE_PASSWORD_LOGIN = 1862
    INNODB_READ_ONLY = 1874
    TABLE_CORRUPT = 1877
    INNODB_FORCED_RECOVERY = 1881
    NO_SUCH_TABLE_IN_ENGINE = 1932
    USER_LOCK_DEADLOCK = 3058
    BEFORE_DML_VALIDATION_ERROR = 3098  # of a table that Group Replication cannot replicate
    TRANSACTION_ROLLBACK_DURING_COMMIT = 3101  # another member of the group was first
    ACCOUNT_HAS_BEEN_LOCKED = 3118
    INVALID_JSON_TEXT = 3140
    SECURE_TRANSPORT_REQUIRED = 3159
    LOCK_NOWAIT = 3572
    CHECK_CONSTRAINT_VIOLATED = 3819
    SCHEMA_READ_ONLY = 3989
    USER_IS_BLOCKED = 4150
    ACCOUNT_HAS_BEEN_LOCKED_MARIADB = 4151


# A server that takes no writes from this user, or from anybody: perhaps another one does.
_READ_ONLY = (
    ER.OPEN_AS_READONLY,
    Lacking.CANT_EXECUTE_IN_READ_ONLY_TRANSACTION,
    Lacking.READ_ONLY_MODE,
    Lacking.INNODB_READ_ONLY,
    Lacking.INNODB_FORCED_RECOVERY,
    Lacking.SCHEMA_READ_ONLY,
)
_CONTENTION = (
    *DEADLOCKS,
    ER.LOCK_WAIT_TIMEOUT,
    ER.QUERY_INTERRUPTED,
    ER.STATEMENT_TIMEOUT,
    ER.QUERY_TIMEOUT,
    ER.TABLE_DEF_CHANGED,
    Lacking.LOCK_ABORTED,
    Lacking.LOCK_NOWAIT,
    Lacking.USER_LOCK_DEADLOCK,
    Lacking.TRANSACTION_ROLLBACK_DURING_COMMIT,
)
_DATA = (
    ER.BAD_NULL_ERROR,
    ER.DUP_ENTRY,
    ER.WARN_DATA_OUT_OF_RANGE,
    ER.WARN_DATA_TRUNCATED,
    ER.TRUNCATED_WRONG_VALUE,
    ER.INVALID_CHARACTER_STRING,
    ER.NO_DEFAULT_FOR_FIELD,
    ER.DIVISION_BY_ZERO,
    ER.TRUNCATED_WRONG_VALUE_FOR_FIELD,
    ER.DATA_TOO_LONG,
    ER.WRONG_VALUE_FOR_TYPE,
    ER.DATETIME_FUNCTION_OVERFLOW,
    ER.ROW_IS_REFERENCED_2,
    ER.NO_REFERENCED_ROW_2,
    Lacking.SIGNAL_EXCEPTION,
    Lacking.DATA_OUT_OF_RANGE,
    Lacking.INVALID_JSON_TEXT,
    Lacking.CHECK_CONSTRAINT_VIOLATED,
    ER.CONSTRAINT_FAILED,
)
_NO_ROOM = (ER.DISK_FULL, ER.ERROR_ON_WRITE, ER.GET_ERRNO, ER.RECORD_FILE_FULL)
_EVERY_MESSAGE = (
    # No access.
    ER.DBACCESS_DENIED_ERROR,
    ER.ACCESS_DENIED_ERROR,
    ER.TABLEACCESS_DENIED_ERROR,
    ER.COLUMNACCESS_DENIED_ERROR,
    ER.SPECIFIC_ACCESS_DENIED_ERROR,
    ER.PROCACCESS_DENIED_ERROR,
    ER.NO_SUCH_USER,
    Lacking.ACCESS_DENIED_NO_PASSWORD_ERROR,
    Lacking.MUST_CHANGE_PASSWORD,
    Lacking.MUST_CHANGE_PASSWORD_LOGIN,
    Lacking.ACCOUNT_HAS_BEEN_LOCKED,
    Lacking.ACCOUNT_HAS_BEEN_LOCKED_MARIADB,
    Lacking.USER_IS_BLOCKED,
    Lacking.SECURE_TRANSPORT_REQUIRED,
    # Not the tables that are meant, or broken ones.
    ER.NO_DB_ERROR,
    ER.BAD_DB_ERROR,
    ER.BAD_FIELD_ERROR,
    ER.PARSE_ERROR,
    ER.NO_SUCH_TABLE,
    ER.CRASHED_ON_USAGE,
    ER.CRASHED_ON_REPAIR,
    ER.SP_DOES_NOT_EXIST,
    ER.VIEW_INVALID,
    Lacking.BINLOG_STMT_MODE_AND_ROW_ENGINE,
    Lacking.INDEX_CORRUPT,
    Lacking.TABLE_CORRUPT,
    Lacking.TABLESPACE_MISSING,
    Lacking.TABLESPACE_DISCARDED,
    Lacking.NO_SUCH_TABLE_IN_ENGINE,
    Lacking.BEFORE_DML_VALIDATION_ERROR,
)
_KINDS: dict[int, ErrorKind] = {
    **dict.fromkeys(_CONTENTION, ErrorKind.CONTENTION),
    **dict.fromkeys(_DATA, ErrorKind.DATA),
    **dict.fromkeys(_NO_ROOM, ErrorKind.NO_ROOM),
    **dict.fromkeys(_EVERY_MESSAGE, ErrorKind.EVERY_MESSAGE),
}

MYSQL_URL = "AIOWORKER_MYSQL_URL"  # the setting that a cure names, unless it was another one
_GRANT = "`{init}` shows what the user needs"
_LOGIN = "check user and password in {setting}"
_DATABASE = "is this the right database? check {setting}"
_CURES: dict[int, str] = {
    0: "is it a MySQL server? check {setting}",
    ER.DBACCESS_DENIED_ERROR: _GRANT,
    ER.TABLEACCESS_DENIED_ERROR: _GRANT,
    ER.COLUMNACCESS_DENIED_ERROR: _GRANT,
    ER.ACCESS_DENIED_ERROR: _LOGIN,
    Lacking.ACCESS_DENIED_NO_PASSWORD_ERROR: _LOGIN,
    ER.BAD_DB_ERROR: "create it, or correct {setting}",
    ER.BAD_FIELD_ERROR: _DATABASE,
    ER.NO_SUCH_TABLE: _DATABASE,
    CR.CR_CONN_HOST_ERROR: "is it running? check {setting}",
    ER.UPDATE_WITHOUT_KEY_IN_SAFE_MODE: "the task itself set sql_safe_updates: name a key, or"
    " SET sql_safe_updates = 0",
    Lacking.BINLOG_STMT_MODE_AND_ROW_ENGINE: "set binlog_format to MIXED or ROW on the server",
    CR.CR_SSL_CONNECTION_ERROR: "check {setting}",
    CR.CR_AUTH_PLUGIN_CANNOT_LOAD: "check the user's plugin, and {setting}",
}
ONLY_READS = f"this server only reads: is it a replica? check {MYSQL_URL}"


def kind(error: BaseException) -> ErrorKind | None:
    """Return what an error means; None for one that tells nothing of the message.

    Such an error may be a server that is away, or full, or that only reads, or the message's
    own: whoever judges it asks the server, by a write of his own.
    """
    if not isinstance(error, MySQLError) or only_reads(error):
        return None
    return _KINDS.get(code(error))


def is_the_servers(error: MySQLError) -> bool:
    """Whether an error is a server's word, not the driver's."""
    number = code(error)
    return number != 0 and not CR.CR_ERROR_FIRST <= number <= CR.CR_ERROR_LAST


def only_reads(error: MySQLError) -> bool:
    """Whether a server refuses to write: one number stands for whatever an option forbids."""
    number = code(error)
    if number == ER.OPTION_PREVENTS_STATEMENT:
        return "read-only" in str(error) or "read_only" in str(error)
    return number in _READ_ONLY


def server_only_reads(error: MySQLError) -> bool:
    """Whether it is the server that refuses to write, not the transaction that was begun so."""
    return only_reads(error) and code(error) != Lacking.CANT_EXECUTE_IN_READ_ONLY_TRANSACTION


def code(error: MySQLError) -> int:
    """Return the server's error number, 0 where there is none."""
    first = error.args[0] if error.args else 0
    return first if isinstance(first, int) else 0


def describe(error: MySQLError, setting: str = MYSQL_URL) -> str:
    """Return the server's words and number, and the cure where one is known, in one line.

    Args:
        error: What the server, or the driver, says.
        setting: What named the server.
    """
    words = " ".join(str(error.args[-1] if error.args else error).split())
    cure = ONLY_READS if only_reads(error) else _CURES.get(code(error))
    how = f"; {cure.format(init=command('init --print'), setting=setting)}" if cure else ""
    return f"{words} ({code(error)}){how}"
