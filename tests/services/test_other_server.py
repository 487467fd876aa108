"""A proxy that sends reads to a replica and writes to its primary: two real servers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from aioworker.budget import schema, tables
from aioworker.budget.shared import SharedBudget
from aioworker.limits import RateLimit
from aioworker.mysql.database import Answer, Database
from aioworker.reasons import ReasonKind
from support import servers
from tests.conftest import TASK, database_name, execute, make_database, rows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pymysql.connections import Connection
    from pymysql.cursors import Cursor


@pytest.fixture(scope="module")
def replica(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Maria]:
    """A server that has what the other one wrote, and is another one."""
    server = servers.Maria(tmp_path_factory.mktemp("replica") / "private")
    server.start()
    yield server
    server.stop()


class Splitting(Database):
    """What reads goes to the replica, but for what a transaction reads."""

    replica: Database

    async def each(self, *statements: str, args: object = None) -> list[Answer]:
        """Run statements by the replica, unless one of them writes."""
        reads = all(statement.startswith("SELECT") for statement in statements)
        if reads:
            return await self.replica.each(*statements, args=args)
        return await super().each(*statements, args=args)

    async def query(self, statement: str, args: object = None) -> list[tuple[Any, ...]]:
        """Read from the replica."""
        return await self.replica.query(statement, args)


async def test_reads_and_writes_that_go_to_different_servers_are_a_stall(
    pair: servers.Servers, shop: Connection[Cursor], replica: servers.Maria
) -> None:
    """It took over a row, every two seconds, that it had long had."""
    name = database_name(pair)
    copy = servers.connect(replica.url(name), create=True)
    execute(copy, *schema.STATEMENTS.values(), tables.FIRST_ROW % {"task": f"'{TASK}'"})
    database = make_database(pair, Splitting)
    assert isinstance(database, Splitting)
    database.replica = make_database(servers.Servers(pair.amqp_url, replica.url(name)))
    budget = SharedBudget(database, TASK, RateLimit.parse("100/s"), "test")
    [[there]] = rows(shop, f"SELECT {tables.SERVER}")
    [[here]] = rows(copy, f"SELECT {tables.SERVER}")
    execute(copy, f"UPDATE aioworker_budget SET server = '{there}'")

    for _ in range(2):
        wait = await budget.check()

        assert wait is not None
        assert wait.reason.kind is ReasonKind.TWO_SERVERS
        assert wait.reason.words == (
            f"reads and writes go to different servers, {here} and {there}: let the address lead"
            " to the one that is written to, without a proxy that splits them"
        )

    database.replica.close()
    database.close()
    copy.close()
