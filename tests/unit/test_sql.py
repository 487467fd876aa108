"""The package's SQL names nothing that a server has reserved."""

from __future__ import annotations

import pytest

from tests.sql import Statement, reserved, statements


def test_the_statements_of_every_module_with_sql_are_found() -> None:
    """Else the next test would hold nothing against anything."""
    found = {one.where.partition(":")[0] for one in statements()}

    assert found >= {
        *("budget.shared", "budget.deaths", "budget.tables", "budget.run_time"),
        *("budget.history", "budget.first_write", "commands.history"),
        *("commands.publish", "mysql.database", "repo", "status.presence", "status.read"),
    }


@pytest.mark.parametrize("statement", statements(), ids=lambda one: one.where)
@pytest.mark.parametrize("server", ["mariadb", "mysql"])
def test_no_statement_names_a_column_by_a_reserved_word(statement: Statement, server: str) -> None:
    """MySQL refuses `stored`, MariaDB does not: on one of them the whole job would not run."""
    assert statement.names & reserved(server) == set()
