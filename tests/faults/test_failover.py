"""The database's address leads to another server: the old one only reads, is dead, or frozen.

Two private servers with the same tables, and a proxy that switches. Nothing replicates: what
was written to the one is not on the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

import pymysql
import pytest

from aioworker.budget import schema, tables
from support import servers, site
from tests.conftest import QUEUES, TASK, eventually, execute, rows, simple_addons
from tests.faults.conftest import MakePlace
from tests.faults.proxy import Proxy
from tests.faults.test_database import RECOVERY_SECONDS, SLACK_SECONDS, frozen, ordinary
from tests.place import Place

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

CHUNKS = 1000  # more than run while a session of the same number is made on the other server
STEADY = ("--rate-limit", "5/s")
TIMEOUT = {"AIOWORKER_TASK_TIMEOUT": "15"}  # of a run that the server fell silent in
THEIRS_SECONDS = 20  # somebody else's query on the new server
Old = Callable[[Place, servers.Maria], AbstractContextManager[None]]


@pytest.fixture(scope="module")
def standby(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Maria]:
    """The server that takes over."""
    server = servers.Maria(tmp_path_factory.mktemp("standby") / "private")
    server.start()
    yield server
    server.stop()


@contextmanager
def only_reads(place: Place, _maria: servers.Maria) -> Iterator[None]:
    """It stays up, and keeps its connections."""
    execute(place.shop, "SET GLOBAL read_only = 1")
    try:
        yield
    finally:
        execute(place.shop, "SET GLOBAL read_only = 0")


@contextmanager
def dead(_place: Place, maria: servers.Maria) -> Iterator[None]:
    """It is gone with all its connections."""
    maria.kill()
    try:
        yield
    finally:
        maria.start()


@contextmanager
def silent(place: Place, _maria: servers.Maria) -> Iterator[None]:
    """It takes what is sent, and never answers."""
    with frozen(place):
        yield


def copy(place: Place, server: servers.Maria) -> Connection[Cursor]:
    """Make the place's tables on another server, its add-ons as stale as they were."""
    made = servers.connect(server.url(place.name), create=True)
    site.create(made)
    simple_addons(made, CHUNKS)
    execute(made, *schema.STATEMENTS.values(), tables.FIRST_ROW % {"task": f"'{TASK}'"})
    return made


def session(server: servers.Maria) -> tuple[int, Connection[Cursor]]:
    """Return somebody's new session and its number; a server counts its sessions one by one."""
    connection = pymysql.connect(host=servers.HOST, port=server.port, user="root")
    [[number]] = rows(connection, "SELECT CONNECTION_ID()")
    return number, connection


def number_on(server: servers.Maria, least: int) -> tuple[int, Connection[Cursor]]:
    """Return somebody's session whose number is no lower than *least*."""
    while True:
        number, connection = session(server)
        if number >= least:
            return number, connection
        connection.close()


def done(shop: Connection[Cursor]) -> int:
    return len(rows(shop, "SELECT 1 FROM addons WHERE current_version = id + 10000"))


@pytest.mark.parametrize("root", [False, True], ids=["a plain user", "one who may write"])
@pytest.mark.parametrize("old", [only_reads, dead, silent])
def test_a_worker_goes_on_at_the_server_that_took_over(
    make_place: MakePlace,
    maria: servers.Maria,
    standby: servers.Maria,
    old: Old,
    *,
    root: bool,
) -> None:
    """Whatever the old one does, and nobody else's statement is ended on the new one."""
    with Proxy(maria.port) as network, ThreadPoolExecutor() as pool:
        place = make_place(retry_ms=None, mysql_port=network.port, chunk_size=1)
        new = copy(place, standby)
        place.backlog(CHUNKS)
        user = {} if root else {"AIOWORKER_MYSQL_URL": ordinary(place)}
        if not root:
            name = f"{place.name}user"
            execute(new, f"CREATE OR REPLACE USER {name}", f"GRANT ALL ON *.* TO {name}")
        number, theirs = session(standby)
        number_on(maria, number + 10)[1].close()
        theirs.close()
        worker = place.worker(*STEADY, **TIMEOUT, **user)
        eventually(lambda: place.done() >= 3, "it works")
        [[number]] = rows(place.shop, "SELECT session FROM aioworker_worker")
        same, theirs = number_on(standby, number)
        assert same == number
        sleeping = pool.submit(rows, theirs, f"SELECT SLEEP({THEIRS_SECONDS})")

        with old(place, maria):
            network.redirect(standby.port)
            switched = time.monotonic()
            eventually(lambda: done(new) >= 3, "it works there")
            took = time.monotonic() - switched
            assert worker.process.poll() is None

        assert took < RECOVERY_SECONDS + SLACK_SECONDS
        assert sleeping.result() == [(0,)]  # 1: it was ended
        assert place.queued()[QUEUES.dead] == (0, 0)
        theirs.close()
        new.close()
