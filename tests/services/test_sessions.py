"""A session and its server: found by its own lock, known by the server's own words."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pymysql
import pytest

from aioworker import repo
from aioworker.addresses import DatabaseAddress
from aioworker.budget import schema, tables
from aioworker.budget.shared import SharedBudget
from aioworker.errors import DatabaseError
from aioworker.limits import RateLimit
from aioworker.mysql.database import Database
from support import servers, site
from support.servers import HOST, Maria
from tests.conftest import TASK, Lanes, current_versions, execute, make_worker, rows, simple_addons
from tests.faults.proxy import Proxy

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor


@pytest.fixture(scope="module")
def blind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Maria]:
    """A server that is blind to the case of names, on pages of 4 KiB."""
    server = Maria(
        tmp_path_factory.mktemp("blind") / "private",
        "--lower-case-table-names=1",
        "--innodb-page-size=4k",
        "--innodb-default-row-format=compact",
        "--log-bin",
    )
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Maria]:
    """A server that says that it is a node of a Galera cluster."""
    server = Maria(tmp_path_factory.mktemp("node") / "private", "--wsrep-on=ON")
    server.start()
    yield server
    server.stop()


def at(url: str, *, timeout: float = 30, any_node: bool = False) -> Database:
    """Return a database by its address, not yet connected."""
    address = DatabaseAddress.parse(url)
    return Database(address, connect_timeout=10, timeout=timeout, any_node=any_node)


def number_of(connection: Connection[Cursor]) -> int:
    """Return the number of a session; a server counts its sessions one by one."""
    [[number]] = rows(connection, "SELECT CONNECTION_ID()")
    return int(number)


def numbered(server: Maria, number: int) -> Connection[Cursor]:
    """Return somebody's session of that number."""
    while True:
        connection = pymysql.connect(host=HOST, port=server.port, user="root")
        if (found := number_of(connection)) == number:
            return connection
        assert found < number
        connection.close()


async def test_a_cut_off_ends_no_statement_of_another_server(blind: Maria, node: Maria) -> None:
    """After a failover, or behind a proxy, the number of a session is somebody else's."""
    with pymysql.connect(host=HOST, port=node.port, user="root") as last:
        numbered(blind, number_of(last) + 10).close()
    with Proxy(blind.port) as proxy:
        database = at(f"mysql://root@{HOST}:{proxy.port}/mysql", timeout=0.5)
        [[number]] = await database.query("SELECT CONNECTION_ID()")
        theirs = numbered(node, number)
        sleeping = asyncio.create_task(asyncio.to_thread(rows, theirs, "SELECT SLEEP(2)"))
        proxy.redirect(node.port)

        with pytest.raises(TimeoutError):
            await database.query("SELECT SLEEP(60)")

        assert proxy.accepted == 2
        assert await sleeping == [(0,)]  # 1: it was ended
    theirs.close()


async def test_two_spellings_of_a_database_are_one_turn(blind: Maria) -> None:
    """Workers with `…/shop` and `…/SHOP` are workers of one table: never two at once."""
    servers.connect(blind.url("shop"), create=True).close()
    first, second = at(blind.url("shop")), at(blind.url("SHOP"))
    for name in schema.NAMES:
        await schema.settle(first, name)
    await tables.add_rows(first, [TASK])
    one, other = (
        SharedBudget(database, TASK, RateLimit.parse("1/h"), "worker")
        for database in (first, second)
    )
    await one.check()
    await other.check()

    async with one.turn() as wait:
        assert wait is None
        async with other.turn() as refused:
            assert refused is not None

    sweeps = {
        tables.lock_name(await db.schema(), TASK, "aioworker:sweep") for db in (first, second)
    }
    assert len(sweeps) == 1
    first.close()
    second.close()


async def test_a_lock_is_named_as_it_was_by_an_address_spelt_as_the_server_has_it(
    blind: Maria,
) -> None:
    """Workers of the version before take turns with those of this one."""
    servers.connect(blind.url("shop"), create=True).close()
    database = at(blind.url("shop"))

    name = tables.lock_name(await database.schema(), TASK)

    digest = hashlib.sha256(b"shop\0update_current_version").hexdigest()[:16]
    assert name == f"aioworker:{TASK}:{digest}"
    database.close()


async def test_small_pages_hold_the_tables_of_aioworker(
    blind: Maria, pair: servers.Servers, lanes: Lanes, stop: asyncio.Event
) -> None:
    """A page of 4 KiB holds half as much of a row, and another format may be the default."""
    small = servers.Servers(pair.amqp_url, blind.url("pages"))
    connection = servers.connect(small.mysql_url, create=True)
    site.create(connection)
    simple_addons(connection, 10)
    database = at(small.mysql_url)

    for name in schema.NAMES:
        await schema.settle(database, name)
    await tables.add_rows(database, [TASK])
    await lanes.send(json.dumps([[list(range(1, 11))], {}, None]).encode())
    done = await make_worker(small, database, rate_limit="100/s").run(stop)

    assert done
    assert current_versions(connection) == {n: n + 10_000 for n in range(1, 11)}
    database.close()
    connection.close()


async def test_a_binary_log_that_cannot_take_what_a_session_writes_is_refused_first(
    blind: Maria,
) -> None:
    """It takes READ COMMITTED by rows alone: the first write would fail with 1665."""
    with servers.connect(blind.url("mysql")) as connection:
        execute(connection, "SET GLOBAL binlog_format = 'STATEMENT'")
        try:
            with pytest.raises(DatabaseError) as refused:
                await at(blind.url("mysql")).ready()
        finally:
            execute(connection, "SET GLOBAL binlog_format = 'MIXED'")

    assert str(refused.value).endswith(
        "expected binlog_format MIXED or ROW, got: STATEMENT, which cannot log READ COMMITTED"
        " transactions; set it on the server"
    )


async def test_a_galera_node_is_refused_unless_its_user_vouches_for_one_writer(
    node: Maria,
) -> None:
    """Named locks hold on one node only: two workers on two nodes would both have the turn."""
    with pytest.raises(DatabaseError) as refused:
        await at(node.url("mysql")).ready()

    assert str(refused.value) == (
        f"cannot use MySQL at {node.url('mysql')}: it is a Galera node, whose named locks hold on"
        " one node only: set AIOWORKER_GALERA=single-writer if all workers write through this"
        " one, or AIOWORKER_BUDGET=worker"
    )
    vouched = at(node.url("mysql"), any_node=True)
    await vouched.ready()
    vouched.close()


async def test_a_wait_for_somebody_s_lock_tables_is_told_as_one(
    database: Database, shop: Connection[Cursor]
) -> None:
    """An ALTER or LOCK TABLES holds the table: the server is there, and says so itself."""
    with shop.cursor() as cursor:
        cursor.execute("LOCK TABLES addons WRITE")

    with pytest.raises(DatabaseError) as waited, database.explaining():
        await repo.refresh(database, [])

    assert not waited.value.unreachable
    assert str(waited.value) == (
        f"cannot use MySQL at {database.address.shown}: Lock wait timeout exceeded; try restarting"
        " transaction (1205); somebody else holds a lock that this waits for"
    )
