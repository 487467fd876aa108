"""What an error of the database means for the message at hand, and how to tell it."""

from __future__ import annotations

from enum import StrEnum

from pymysql.err import MySQLError

DEADLOCKS = frozenset({1213, 1020})  # another try at once may do


class Trouble(StrEnum):
    """What an error of the database means for the message at hand."""

    UNAVAILABLE = "unavailable"  # the server is away or full: wait, the message is fine
    CONTENTION = "contention"  # others hold the rows: later
    DATA = "data"  # these rows will never do
    EVERY_MESSAGE = "every message"  # a wrong table or privilege: no message will do


_CODES = {
    Trouble.UNAVAILABLE: (
        0,
        1021,
        1026,
        1030,
        1037,
        1040,
        1041,
        1053,
        1114,
        1129,
        1130,
        1135,
        1158,
        1159,
        1160,
        1161,
        1203,
        1226,
        1290,
        1792,
        1836,
        1927,
        2003,
        2006,
        2013,
        2055,
        3100,
        4031,
    ),
    Trouble.CONTENTION: (1020, 1205, 1213, 1317, 1969, 3024),
    Trouble.DATA: (
        *(1048, 1062, 1264, 1265, 1292, 1300, 1364, 1365, 1366, 1406, 1411, 1441, 1451, 1452),
        *(1644, 1690, 3140, 3819, 4025),
    ),
    Trouble.EVERY_MESSAGE: (
        *(1044, 1045, 1049, 1054, 1064, 1142, 1143, 1146, 1227),
        *(1305, 1356, 1370, 1449, 1665, 1698),
    ),
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
    2026: "check AIOWORKER_MYSQL_URL",
    2059: "check the user's plugin, and AIOWORKER_MYSQL_URL",
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
    cure = _CURES.get(code(error))
    return f"{words} ({code(error)})" + (f"; {cure}" if cure else "")
