"""What an error of the database means for the message at hand."""

from __future__ import annotations

import pytest
from pymysql.err import MySQLError, OperationalError

from aioworker.mysql.errors import ErrorKind, describe, kind

READS = "; this server only reads: is it a replica? check AIOWORKER_MYSQL_URL"


def option(name: str) -> MySQLError:
    """Return the error of whatever an option of the server forbids."""
    words = f"The MariaDB server is running with the --{name} option so it cannot execute this"
    return OperationalError(1290, words)


@pytest.mark.parametrize("number", [1036, 1792, 1836, 1874, 1881, 3989])
def test_a_server_that_only_reads_is_called_so(number: int) -> None:
    assert describe(OperationalError(number, "words")) == f"words ({number}){READS}"


def test_an_option_that_forbids_one_statement_is_not_a_server_that_only_reads() -> None:
    """INTO OUTFILE beside secure_file_priv has the same number: no other server mends it."""
    assert describe(option("super-read-only")).endswith(READS)
    assert describe(option("secure-file-priv")).endswith("(1290)")


@pytest.mark.parametrize(
    ("number", "cure"),
    [
        (1175, "the task itself set sql_safe_updates: name a key, or SET sql_safe_updates = 0"),
        (1665, "set binlog_format to MIXED or ROW on the server"),
    ],
)
def test_a_refusal_that_a_setting_explains_names_its_cure(number: int, cure: str) -> None:
    assert describe(OperationalError(number, "words")) == f"words ({number}); {cure}"


@pytest.mark.parametrize("number", [1689, 3058, 3101, 3572])
def test_what_others_were_first_at_is_tried_again(number: int) -> None:
    """Named locks that wait for each other, a group's other member, NOWAIT."""
    assert kind(OperationalError(number, "words")) is ErrorKind.CONTENTION


@pytest.mark.parametrize("number", [1194, 1812, 1814, 1820, 1862, 1932, 3118, 3159, 4151])
def test_a_table_or_a_user_that_is_broken_costs_no_attempt(number: int) -> None:
    """A tablespace that is gone, an account that is locked: no message would do."""
    assert kind(OperationalError(number, "words")) is ErrorKind.EVERY_MESSAGE
