"""What this server says of its own words, and of every statement of the package."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pymysql.err import ProgrammingError

from tests.conftest import rows
from tests.sql import reserved

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor


def test_the_lists_hold_every_word_that_this_server_reserves(shop: Connection[Cursor]) -> None:
    """A newer server reserves more words: the list of its kind needs them."""
    [[version]] = rows(shop, "SELECT VERSION()")
    kind = "mariadb" if "MariaDB" in version else "mysql"
    found = rows(shop, "SELECT LOWER(word) FROM information_schema.keywords")
    names = {word for (word,) in found if word.isidentifier()}

    assert {word for word in names if not _may_name_a_column(shop, word)} <= reserved(kind)


def _may_name_a_column(connection: Connection[Cursor], word: str) -> bool:
    try:
        rows(connection, f"SELECT one.{word} FROM (SELECT 1 AS {word}) AS one")
    except ProgrammingError:
        return False
    return True
