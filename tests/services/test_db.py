"""The connection: bounded in time, whole transactions, nothing left running."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from pymysql.err import OperationalError

from aioworker.addresses import DatabaseAddress
from aioworker.errors import DatabaseError, RunStoppedError
from aioworker.mysql import session
from aioworker.mysql.database import KILL_SECONDS, OWN_SECONDS, Database
from aioworker.mysql.errors import ErrorKind, kind
from support.servers import Maria, Servers
from tests.conftest import current_versions, eventually, execute, make_database, rows, simple_addons
from tests.faults.proxy import Proxy

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor


async def test_a_statement_that_takes_too_long_is_ended_on_the_server_too(
    pair: Servers, shop: Connection[Cursor]
) -> None:
    """The server would finish it otherwise, and hold its locks until then."""
    database = make_database(pair, timeout=0.5)

    with pytest.raises(TimeoutError):
        await database.query("SELECT SLEEP(60)")

    statement = (
        "SELECT COUNT(*) FROM information_schema.processlist WHERE info LIKE 'SELECT SLEEP%'"
    )
    eventually(lambda: rows(shop, statement) == [(0,)], "the server ended it")
    assert await database.query("SELECT 1") == [(1,)]
    database.close()


async def test_a_transaction_cut_off_leaves_nothing_of_it(
    pair: Servers, shop: Connection[Cursor]
) -> None:
    simple_addons(shop, 2)
    database = make_database(pair, timeout=0.5)

    with pytest.raises(TimeoutError):
        async with database.transaction() as cursor:
            await cursor.execute("UPDATE addons SET current_version = id + 10000")
            await asyncio.sleep(60)

    assert current_versions(shop) == {1: None, 2: None}
    execute(shop, "SET SESSION innodb_lock_wait_timeout = 1", "UPDATE addons SET status = 1")
    database.close()


async def test_after_a_refused_statement_the_transaction_is_rolled_back(
    database: Database, shop: Connection[Cursor]
) -> None:
    """A lock wait that ends keeps the transaction open: a commit would write half of it."""
    simple_addons(shop, 2)
    with shop.cursor() as cursor:
        cursor.execute("SELECT id FROM addons WHERE id = 2 FOR UPDATE")

    with pytest.raises(OperationalError) as refused:
        async with database.transaction() as writing:
            await writing.execute("SET SESSION innodb_lock_wait_timeout = 1")
            await writing.execute("UPDATE addons SET current_version = 10001 WHERE id = 1")
            await writing.execute("UPDATE addons SET current_version = 10002 WHERE id = 2")

    assert kind(refused.value) is ErrorKind.CONTENTION
    shop.rollback()
    async with database.transaction():
        pass
    assert current_versions(shop) == {1: None, 2: None}


async def test_a_connection_that_the_server_ended_is_opened_again(
    database: Database, shop: Connection[Cursor]
) -> None:
    [[thread]] = await database.query("SELECT CONNECTION_ID()")
    execute(shop, f"KILL {thread}")

    await database.ready()

    assert await database.query("SELECT 1") == [(1,)]


async def test_a_session_is_as_documented(database: Database) -> None:
    """Whatever the server's defaults are: see the table in docs/operations.md."""
    expected = session.EVERYWHERE | dict.fromkeys(session.TIMEOUTS_EVERYWHERE, 60)
    [found] = await database.query("SELECT " + ", ".join(f"@@{name}" for name in expected))
    levels = "SHOW VARIABLES WHERE variable_name IN ('tx_isolation', 'transaction_isolation')"

    assert dict(zip(expected, found, strict=True)) == expected
    assert {level for _name, level in await database.query(levels)} == {"READ-COMMITTED"}


async def test_a_session_sets_what_only_its_kind_of_server_has(database: Database) -> None:
    [[version]] = await database.query("SELECT VERSION()")
    expected = session.MARIADB if "MariaDB" in version else session.MYSQL
    [found] = await database.query("SELECT " + ", ".join(f"@@{name}" for name in expected))

    assert dict(zip(expected, found, strict=True)) == expected


async def test_a_database_that_does_not_answer_is_given_up_in_time() -> None:
    """A connection that is accepted and never served: aiomysql itself would wait for ever."""
    accepted: list[asyncio.StreamWriter] = []

    async def silent(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.append(writer)

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    database = Database(
        DatabaseAddress.parse(f"mysql://me:s3cret@127.0.0.1:{port}/site"),
        connect_timeout=0.3,
        timeout=5,
    )

    with pytest.raises(DatabaseError) as error:
        await database.ready()

    assert str(error.value) == (
        f"cannot use MySQL at mysql://me@127.0.0.1:{port}/site: no answer in time;"
        " check AIOWORKER_MYSQL_URL"
    )
    for writer in accepted:
        writer.close()
    server.close()


async def test_a_server_that_stands_still_is_left_before_a_task_would_have_to_end(
    maria: Maria, pair: Servers, shop: Connection[Cursor]
) -> None:
    """Its address may lead to another one by then; a run may take minutes."""
    with Proxy(maria.port) as network:
        through = Servers(
            pair.amqp_url, pair.mysql_url.replace(f":{maria.port}/", f":{network.port}/")
        )
        database = make_database(through, timeout=600)
        await database.ready()
        network.black_hole()

        async with asyncio.timeout(3 * (OWN_SECONDS + KILL_SECONDS)):
            with pytest.raises(TimeoutError):
                await database.each("SELECT 1")

        network.forward()
        assert not database.is_open
        assert [one.rows for one in await database.each("SELECT 1")] == [[(1,)]]
        database.close()


async def test_a_run_that_is_stopped_ends_its_open_transaction_and_begins_no_other(
    database: Database, shop: Connection[Cursor]
) -> None:
    """Reads are no transactions of their own; another run's statements are not this one's."""
    simple_addons(shop, 4)
    write = "UPDATE addons SET current_version = id + 10000 WHERE id = %s"
    stopped = False

    async def go_on() -> None:
        if stopped:
            raise RunStoppedError("paused")

    async with asyncio.timeout(None) as limit:
        with database.bounded(limit, None, go_on):
            async with database.transaction() as cursor:
                await cursor.execute(write, (1,))
                stopped = True
                await cursor.execute(write, (2,))
                await database.execute(write, (3,))
            for change in (database.execute, database.query):
                with pytest.raises(RunStoppedError):
                    await change(write, (4,))
            with pytest.raises(RunStoppedError):
                async with database.transaction():
                    pytest.fail("begun")
            read = await database.query("SELECT current_version FROM addons WHERE id = 3")
    await database.execute(write, (4,))

    assert read == [(10003,)]
    assert current_versions(shop) == {1: 10001, 2: 10002, 3: 10003, 4: 10004}
