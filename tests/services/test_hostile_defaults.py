"""The defaults of a database are somebody else's: a session sets what it relies on.

A global variable holds for sessions that begin after it was set. The site is made before,
by a connection that also reads the answers; what is tested connects afterwards.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import pytest
from pymysql.constants import ER
from pymysql.err import MySQLError

from aioworker import Context
from aioworker.addons import update_current_version
from aioworker.budget import schema, tables
from aioworker.errors import DatabaseError
from aioworker.tasks.task import AnyTask, Task
from support import servers, site
from tests.conftest import (
    QUEUES,
    TASK,
    Lanes,
    Run,
    current_versions,
    database_name,
    execute,
    make_database,
    make_worker,
    rows,
    simple_addons,
)

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

STALE_ROWS, CHUNK = 500, 250  # several transactions a chunk
WORDS = 'it\'s 100 % \\ "✓" 😀'

# Variable, hostile value; a server that does not have it says so, and its test is skipped.
HARMLESS: tuple[tuple[str, str | int], ...] = (
    ("autocommit", 0),
    ("completion_type", "CHAIN"),
    ("completion_type", "RELEASE"),
    ("sql_mode", ""),
    ("sql_mode", "ANSI_QUOTES"),
    ("sql_mode", "NO_BACKSLASH_ESCAPES"),
    ("sql_mode", "PIPES_AS_CONCAT,HIGH_NOT_PRECEDENCE,IGNORE_SPACE,REAL_AS_FLOAT"),
    ("sql_mode", "TRADITIONAL"),
    ("sql_mode", "ONLY_FULL_GROUP_BY,NO_UNSIGNED_SUBTRACTION,PAD_CHAR_TO_FULL_LENGTH"),
    ("sql_safe_updates", 1),
    ("sql_select_limit", 1),
    ("sql_auto_is_null", 1),
    ("sql_big_selects", 0),
    ("max_join_size", 1),
    ("foreign_key_checks", 0),
    ("unique_checks", 0),
    ("group_concat_max_len", 4),
    ("div_precision_increment", 0),
    ("default_week_format", 6),
    ("lc_time_names", "fr_FR"),
    ("lc_messages", "fr_FR"),
    ("time_zone", "+13:00"),
    ("max_sort_length", 64),
    ("sort_buffer_size", 1024),  # MySQL's least is 32 KiB
    ("max_error_count", 0),
    ("character_set_server", "latin1"),
    ("character_set_client", "latin1"),
    ("character_set_results", "latin1"),
    ("collation_connection", "latin1_bin"),
    ("wait_timeout", 1),
    ("lock_wait_timeout", 1),
    ("innodb_lock_wait_timeout", 1),
    ("net_read_timeout", 1),
    ("net_write_timeout", 1),
    ("tmp_table_size", 1024),
    ("big_tables", 1),
    ("sql_buffer_result", 1),
    ("low_priority_updates", 1),
    ("updatable_views_with_limit", "NO"),
    ("explicit_defaults_for_timestamp", 0),
    # Of one server only, by that name.
    ("tx_isolation", "SERIALIZABLE"),
    ("tx_read_only", 1),
    ("transaction_isolation", "SERIALIZABLE"),
    ("transaction_read_only", 1),
    ("sql_mode", "ORACLE"),
    ("sql_mode", "MSSQL,EMPTY_STRING_IS_NULL"),
    ("check_constraint_checks", 0),
    ("max_statement_time", 1),
    ("idle_transaction_timeout", 1),
    ("idle_write_transaction_timeout", 1),
    ("system_versioning_asof", "2000-01-01"),
    ("max_session_mem_used", 8192),
    ("tmp_disk_table_size", 1024),
    ("max_execution_time", 1),
    ("range_optimizer_max_mem_size", 1),
    ("default_collation_for_utf8mb4", "utf8mb4_general_ci"),
    ("internal_tmp_mem_storage_engine", "MEMORY"),
    ("sql_require_primary_key", 1),
)


@contextmanager
def hostile(connection: Connection[Cursor], name: str, value: str | int) -> Iterator[bool]:
    """Set a global variable, and set it back; the value is whether this server has that."""
    before = has = None
    if rows(connection, f"SHOW GLOBAL VARIABLES LIKE '{name}'"):
        [[before]] = rows(connection, f"SELECT @@global.{name}")
        has = set_global(connection, name, value)
    try:
        yield bool(has)
    finally:
        if has:
            # This variable's default is no value of it.
            set_global(connection, name, None if name == "system_versioning_asof" else before)


def set_global(connection: Connection[Cursor], name: str, value: object) -> bool:
    """Set a global variable, None is what it was built with; return whether there is that value."""
    try:
        execute(connection, f"SET GLOBAL {name} = {'DEFAULT' if value is None else repr(value)}")
    except MySQLError as error:
        if error.args[0] != ER.WRONG_VALUE_FOR_VAR:
            raise
        return False
    return True


async def rate(ctx: Context, _number: int) -> None:
    """Write as a user's coroutine may: without a key, in double quotes, with a zero date."""
    async with ctx.transaction() as cursor:
        await cursor.execute("INSERT INTO ratings VALUES (1, %s, 0, '0000-00-00')", (WORDS,))
        await cursor.execute('INSERT INTO ratings VALUES (2, "two", 0, NOW())')
        await cursor.execute("UPDATE ratings SET n = n + 1")
        await cursor.execute("SELECT a.id FROM ratings AS a, ratings AS b ORDER BY 1")
        assert [row[0] for row in await cursor.fetchall()] == [1, 1, 2, 2]


def rate_in_a_thread(ctx: Context, _number: int) -> None:
    """The same from a thread."""
    with ctx.transaction() as cursor:
        cursor.execute("INSERT INTO ratings VALUES (1, %s, 0, '0000-00-00')", (WORDS,))
        cursor.execute('INSERT INTO ratings VALUES (2, "two", 0, NOW())')
        cursor.execute("UPDATE ratings SET n = n + 1")
        cursor.execute("SELECT a.id FROM ratings AS a, ratings AS b ORDER BY 1")
        assert [row[0] for row in cursor.fetchall()] == [1, 1, 2, 2]


@pytest.fixture(scope="module")
def ground(pair: servers.Servers) -> Iterator[Connection[Cursor]]:
    """A site of stale rows and a table of a user's, made once for all variables."""
    connection = servers.connect(pair.mysql_url, create=True)
    site.create(connection)
    simple_addons(connection, STALE_ROWS)
    execute(
        connection,
        *(*schema.STATEMENTS.values(), tables.FIRST_ROW % {"task": f"'{TASK}'"}),
        "CREATE TABLE ratings (id INT PRIMARY KEY, words VARCHAR(100) CHARACTER SET utf8mb4,"
        " n INT NOT NULL, at DATETIME NOT NULL)",
    )
    yield connection
    connection.close()


@pytest.fixture
def site_of_stale_rows(ground: Connection[Cursor]) -> Connection[Cursor]:
    """The same, as if nothing had run yet."""
    execute(ground, "UPDATE addons SET current_version = NULL", "DELETE FROM ratings")
    execute(ground, "UPDATE aioworker_budget SET last_start = '2000-01-01', paused = 0")
    return ground


async def run_everything(
    connection: Connection[Cursor], pair: servers.Servers, lanes: Lanes
) -> None:
    """Run the main job and a user's two tasks as new sessions; all they write is right."""
    await send_sweep(lanes)
    await burst(pair, update_current_version)
    right = {n: n + 10_000 for n in range(1, STALE_ROWS + 1)}
    assert current_versions(connection) == right
    users: tuple[AnyTask, ...] = (Task(TASK, rate), Task(TASK, rate_in_a_thread))
    for task in users:
        execute(connection, "DELETE FROM ratings")
        await lanes.send(json.dumps([[1], {}, None]).encode())
        await burst(pair, task)
        assert rows(connection, "SELECT id, words, n FROM ratings ORDER BY id") == [
            (1, WORDS, 1),
            (2, "two", 1),
        ]


async def send_sweep(lanes: Lanes) -> None:
    """Publish the chunks of a sweep."""
    for first in range(1, STALE_ROWS, CHUNK):
        ids = list(range(first, first + CHUNK))
        await lanes.send(json.dumps([[ids], {}, None]).encode())


async def burst(pair: servers.Servers, task: AnyTask) -> None:
    """Run what is queued, on a new session."""
    database = make_database(pair)
    try:
        worker = make_worker(pair, database, task=task, rate_limit="1000/s")
        assert await worker.run(asyncio.Event())
    finally:
        database.close()


@pytest.mark.parametrize(("name", "value"), HARMLESS)
async def test_a_default_of_somebody_else_s_changes_nothing(
    site_of_stale_rows: Connection[Cursor],
    pair: servers.Servers,
    lanes: Lanes,
    name: str,
    value: str | int,
) -> None:
    """Every row is written, as a second connection sees it."""
    with hostile(site_of_stale_rows, name, value) as has:
        if not has:
            pytest.skip(f"this server has no {name} of {value}")
        await run_everything(site_of_stale_rows, pair, lanes)


async def test_all_such_defaults_together_change_nothing(
    site_of_stale_rows: Connection[Cursor], pair: servers.Servers, lanes: Lanes
) -> None:
    with ExitStack() as stack:
        for name, value in HARMLESS:
            stack.enter_context(hostile(site_of_stale_rows, name, value))
        await run_everything(site_of_stale_rows, pair, lanes)


@pytest.mark.parametrize("value", ["CHAIN", "RELEASE"])
def test_a_sweep_is_written_whatever_a_commit_does_by_default(
    site_of_stale_rows: Connection[Cursor], lanes: Lanes, run: Run, value: str
) -> None:
    """CHAIN lost 400 of 500 rows that the log called changed; RELEASE ended every command."""
    with hostile(site_of_stale_rows, "completion_type", value):
        published = run("publish-all", "--chunk-size", str(CHUNK))
        done = run("consume", "--burst", "--rate-limit", "1000/s")

    assert (published.returncode, done.returncode) == (0, 0), published.stderr + done.stderr
    assert rows(site_of_stale_rows, "SELECT COUNT(*) FROM addons WHERE current_version > 0") == [
        (STALE_ROWS,)
    ]


def test_status_sorts_the_workers_whatever_room_there_is_by_default(
    site_of_stale_rows: Connection[Cursor], run: Run
) -> None:
    """The database was unreachable: `Out of sort memory` (1038)."""
    with hostile(site_of_stale_rows, "sort_buffer_size", 1024):
        done = run("status")

    assert "\ndatabase   reachable\n" in done.stdout


async def refused(pair: servers.Servers, lanes: Lanes) -> str:
    """Return why the main job does not run; its message lies in its lane."""
    await lanes.send(b"[[[1]], {}, null]")
    with pytest.raises(DatabaseError) as error:
        await burst(pair, update_current_version)
    assert await lanes.holds(QUEUES.bulk, 1)
    return str(error.value)


async def test_a_server_that_takes_no_chunk_is_refused_first(
    site_of_stale_rows: Connection[Cursor], pair: servers.Servers, lanes: Lanes
) -> None:
    with hostile(site_of_stale_rows, "max_allowed_packet", 1024):
        assert "max_allowed_packet of at least 262144 bytes" in await refused(pair, lanes)


@pytest.fixture
def plain(ground: Connection[Cursor], pair: servers.Servers) -> Iterator[servers.Servers]:
    """The servers as a user sees them who may do nothing but read and write the tables."""
    execute(ground, "CREATE USER plain@'%'")
    execute(ground, "GRANT SELECT, INSERT, UPDATE, DELETE ON *.* TO plain@'%'")
    yield servers.Servers(pair.amqp_url, pair.mysql_url.replace("root@", "plain@"))
    execute(ground, "DROP USER plain@'%'")


async def test_what_a_server_runs_first_in_a_session_changes_nothing(
    site_of_stale_rows: Connection[Cursor], plain: servers.Servers, lanes: Lanes
) -> None:
    first = (
        "SET autocommit = 0, completion_type = 1, sql_mode = 'ANSI_QUOTES', sql_select_limit = 1"
    )
    with hostile(site_of_stale_rows, "init_connect", first):
        await run_everything(site_of_stale_rows, plain, lanes)


@pytest.mark.parametrize("budget", ["shared", "worker"])
def test_a_transaction_that_a_server_opens_in_a_session_takes_no_write_back(
    site_of_stale_rows: Connection[Cursor],
    plain: servers.Servers,
    lanes: Lanes,
    run: Run,
    budget: str,
) -> None:
    """The log said `changed=250` twice, and not one row was written."""
    variables = {"AIOWORKER_MYSQL_URL": plain.mysql_url, "AIOWORKER_BUDGET": budget}
    with hostile(site_of_stale_rows, "init_connect", "START TRANSACTION"):
        published = run("publish-all", "--chunk-size", str(CHUNK), **variables)
        done = run("consume", "--burst", "--rate-limit", "1000/s", **variables)

    assert (published.returncode, done.returncode) == (0, 0), published.stderr + done.stderr
    assert rows(site_of_stale_rows, "SELECT COUNT(*) FROM addons WHERE current_version > 0") == [
        (STALE_ROWS,)
    ]


def test_a_pause_holds_if_a_server_opens_a_transaction_in_a_session(
    site_of_stale_rows: Connection[Cursor], plain: servers.Servers, run: Run
) -> None:
    with hostile(site_of_stale_rows, "init_connect", "START TRANSACTION"):
        done = run("pause", AIOWORKER_MYSQL_URL=plain.mysql_url)

    assert done.stdout.startswith(f"{TASK}: paused")
    assert rows(site_of_stale_rows, "SELECT paused FROM aioworker_budget") == [(1,)]


async def test_a_session_in_another_database_than_the_address_s_is_refused_first(
    site_of_stale_rows: Connection[Cursor], plain: servers.Servers, lanes: Lanes
) -> None:
    with hostile(site_of_stale_rows, "init_connect", "USE information_schema"):
        words = await refused(plain, lanes)

    assert words.endswith(
        f": expected a session in database {database_name(plain)!r}, got: 'information_schema';"
        " does the server's init_connect say USE?"
    )


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("read_only", 1, "(1290); this server only reads: is it a replica?"),
        ("init_connect", "no SQL", "init_connect"),
        ("offline_mode", 1, "offline mode (3032)"),
    ],
)
async def test_a_server_that_lets_this_user_do_nothing_is_refused_first(
    site_of_stale_rows: Connection[Cursor],
    plain: servers.Servers,
    lanes: Lanes,
    name: str,
    value: str | int,
    words: str,
) -> None:
    with hostile(site_of_stale_rows, name, value) as has:
        if not has:
            pytest.skip(f"this server has no {name}")
        assert words in await refused(plain, lanes)
