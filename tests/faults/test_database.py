"""The database dies, stands still, is locked, refuses, or its clock steps.

Judged by the rows, by what a trigger notes of every write, by the budget's row, by the
server's list of processes, and by the queues themselves.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pymysql
import pytest

from aioworker.mysql.database import KILL_SECONDS
from support import servers
from tests.acceptance.test_worker import Manager
from tests.conftest import QUEUES, eventually, execute, rows, simple_addons
from tests.faults.conftest import MakePlace
from tests.faults.moments import (
    FAST,
    assert_each_done_once,
    at_once,
    before_its_commit,
    before_its_stamp,
    idle,
    in_an_update,
)
from tests.faults.proxy import Proxy
from tests.place import NOTHING, Place, chunk

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

STEADY = ("--rate-limit", "10/s")
CHUNKS = 30
RECOVERY_SECONDS = 10  # the worker's own share is one wait between two tries, up to 3 s
TIMEOUT = 2
QUICKLY = {"AIOWORKER_TASK_TIMEOUT": str(TIMEOUT), "AIOWORKER_CONNECT_TIMEOUT": str(TIMEOUT)}
SLACK_SECONDS = 15  # of a busy machine: a look at the queues alone takes seconds there
INTERVAL = 3
LEAST_GAP = 2.94
UNREACHABLE = "STATUS=waiting: database unreachable since"


@pytest.fixture
def make_place(make_place: MakePlace) -> MakePlace:
    """Places in which each message fills a start: work is left when a fault comes."""
    return partial(make_place, chunk_size=1)


@pytest.fixture
def network(maria: servers.Maria) -> Iterator[Proxy]:
    """What lies between a worker and the database."""
    with Proxy(maria.port) as made:
        yield made


@pytest.fixture
def manager() -> Iterator[Manager]:
    """Who is told what a worker waits for, also while the database is away."""
    played = Manager()
    with played.socket:
        yield played


# It dies.


@pytest.mark.parametrize(
    ("moment", "charged"),
    [(idle, 2), (in_an_update, 3), (before_its_stamp, 3), (before_its_commit, 3)],
)
def test_a_database_that_is_killed(
    make_place: MakePlace,
    maria: servers.Maria,
    network: Proxy,
    moment: Callable[[Place, Proxy], None],
    charged: int,
) -> None:
    """Each row is written once, and no attempt is counted: a retry would wait for a minute."""
    place = make_place(retry_ms=None, mysql_port=network.port)
    simple_addons(place.shop, 2)
    place.worker(*FAST)
    moment(place, network)

    killed, tried = time.time(), network.accepted
    maria.kill()
    try:
        eventually(lambda: network.accepted >= tried + 4, "it tries more and more slowly")
    finally:
        maria.start()
    opened = time.time()
    place.shop = servers.connect(place.servers.mysql_url)
    place.slow(0)
    place.publish(chunk(2))

    assert_each_done_once(place, 2)
    first = min(start.first for start in place.starts() if start.first > killed)
    assert first - opened < RECOVERY_SECONDS
    assert place.charged() == charged


# It stands still.


@contextmanager
def frozen(place: Place) -> Iterator[None]:
    """Let the database stand still: its port accepts, and nobody answers."""
    pid = int(Path(rows(place.shop, "SELECT @@pid_file")[0][0]).read_text())
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize(("moment", "charged"), [(in_an_update, 2), (before_its_commit, 1)])
def test_a_database_that_stands_still_in_a_run(
    make_place: MakePlace,
    network: Proxy,
    moment: Callable[[Place, Proxy], None],
    charged: int,
) -> None:
    """The run is given up in time; whether its commit was made, the next attempt finds out."""
    # A counted attempt would wait in the retry queue for longer than any deadline here.
    place = make_place(mysql_port=network.port, retry_ms=None)
    simple_addons(place.shop, 1)
    place.worker(*FAST, **QUICKLY)
    moment(place, network)

    with frozen(place):
        network.release()
        began = time.monotonic()
        eventually(lambda: held(place) == 0, "it is given up")
        took = time.monotonic() - began
    place.slow(0)

    assert_each_done_once(place, 1)
    assert place.charged() == charged
    assert took < TIMEOUT + KILL_SECONDS + SLACK_SECONDS


def held(place: Place) -> int:
    """Return how many messages are unacknowledged."""
    return sum(unsettled for _ready, unsettled in place.queued().values())


@pytest.mark.parametrize("connected", [False, True])
def test_a_database_that_stands_still_before_a_run(
    make_place: MakePlace, network: Proxy, manager: Manager, *, connected: bool
) -> None:
    """It is said in time, no message is taken, and the work begins when it moves again."""
    place = make_place(retry_ms=None, mysql_port=network.port)
    simple_addons(place.shop, 1)
    if connected:
        place.worker(*FAST, **QUICKLY, NOTIFY_SOCKET=manager.name)
        manager.until("STATUS=waiting: nothing queued")

    with frozen(place):
        if not connected:
            place.worker(*FAST, **QUICKLY, NOTIFY_SOCKET=manager.name)
            eventually(lambda: network.accepted, "it connects")
        began, tried = time.monotonic(), network.accepted
        place.publish(chunk(1))
        manager.until(UNREACHABLE)
        took = time.monotonic() - began
        eventually(lambda: network.accepted > tried, "it tries again")
        assert place.queued() == NOTHING | {QUEUES.bulk: (1, 0)}

    assert_each_done_once(place, 1)
    assert took < TIMEOUT + KILL_SECONDS + SLACK_SECONDS


# Others have the rows.


@contextmanager
def other_writer(place: Place) -> Iterator[Connection[Cursor]]:
    """A connection of somebody else; what it did not commit is rolled back at the end."""
    with closing(servers.connect(place.servers.mysql_url)) as connection:
        yield connection


def lock(connection: Connection[Cursor], addon: int) -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT id FROM addons WHERE id = %s FOR UPDATE", (addon,))


def test_rows_that_somebody_locks(make_place: MakePlace) -> None:
    """They are put off and the others done meanwhile; a lock without end is a dead letter."""
    place = make_place()
    with other_writer(place) as patient, other_writer(place) as stubborn:
        place.backlog(10)
        lock(patient, 1)
        lock(stubborn, 2)
        place.worker(*FAST, AIOWORKER_MAX_RETRIES="1")
        eventually(lambda: place.charged() == 11, "the second attempt for add-on 1 began")
        meanwhile = place.written()
        patient.rollback()
        eventually(lambda: place.queued() == NOTHING | {QUEUES.dead: (1, 0)}, "all is settled")

    assert meanwhile == list(range(3, 11))
    assert sorted(place.written()) == [1, *meanwhile]
    assert place.charged() == 12
    [letter] = map(json.loads, place.run("dead", "list", "--json").stdout.splitlines())
    assert letter["reason"].startswith("database, contention: Lock wait timeout exceeded")
    assert letter["reason"].endswith("(1205); attempt 2 of 2")
    [body] = place.take(QUEUES.dead)
    assert json.loads(body)[0] == [[2]]


def test_a_deadlock_with_another_writer(make_place: MakePlace) -> None:
    """The server ends our transaction; the same start writes the rows, and theirs stand too."""
    place = make_place(retry_ms=None)
    simple_addons(place.shop, 100)
    deadlocks = "SHOW GLOBAL STATUS LIKE 'Innodb_deadlocks'"
    waiting = "SHOW GLOBAL STATUS LIKE 'Innodb_row_lock_current_waits'"
    [[_, before]] = rows(place.shop, deadlocks)
    touch = "UPDATE addons SET modified = '2010-06-01' WHERE id"

    with other_writer(place) as other, other.cursor() as cursor:
        cursor.execute(f"{touch} > 1")  # so many rows that ours is the cheaper one to end
        place.publish(chunk(1, 2))
        place.worker(*FAST)
        eventually(lambda: rows(place.shop, waiting)[0][1] == "1", "it waits for add-on 2")
        cursor.execute(f"{touch} = 1")
        other.commit()
        [[theirs]] = rows(other, "SELECT CONNECTION_ID()")

    eventually(lambda: place.done() == 2, "both are right")
    eventually(lambda: place.queued() == NOTHING, "all is settled")
    written = rows(place.shop, "SELECT addon FROM audit WHERE session <> %s ORDER BY at", theirs)
    touched = rows(place.shop, "SELECT COUNT(*) FROM addons WHERE modified = '2010-06-01'")
    assert (written, touched) == ([(1,), (2,)], [(100,)])
    assert place.charged() == 1
    assert int(rows(place.shop, deadlocks)[0][1]) == int(before) + 1


def test_a_write_beyond_the_task_timeout(make_place: MakePlace) -> None:
    """It is ended on the server too, no row or lock of it stays, and its message is put off."""
    place = make_place(retry_ms=None)
    simple_addons(place.shop, 100)
    place.slow(2)  # after 5 s of one sleep the server would see that nobody waits for it
    place.worker(*FAST, AIOWORKER_TASK_TIMEOUT="1")

    place.publish(chunk(*range(1, 101)))
    eventually(place.writing, "the write runs")

    eventually(lambda: not place.writing(), "no thread runs it")
    eventually(lambda: place.queued() == NOTHING | {QUEUES.retry: (1, 0)}, "it is put off")
    assert len(rows(place.shop, "SELECT id FROM addons FOR UPDATE NOWAIT")) == 100
    assert (place.done(), place.written(), place.charged()) == (0, [], 1)


# It refuses.


def ordinary(place: Place) -> str:
    """Make a user with the least that a worker needs; return the database's address for it."""
    user = f"{place.name}user"
    shown = place.run("init", "--print", AIOWORKER_MYSQL_URL=_for(user, place.servers)).stdout
    grants = re.findall("^(GRANT .+);$", shown, re.MULTILINE)
    execute(place.shop, f"CREATE USER {user}", *grants)
    return _for(user, place.through)


def _for(user: str, pair: servers.Servers) -> str:
    return pair.mysql_url.replace("root@", f"{user}@")


# What breaks, what mends it, and what is said meanwhile.
REFUSALS = {
    "a table is gone": ("RENAME TABLE addons TO gone", "RENAME TABLE gone TO addons", "(1146)"),
    "a table that is only read is gone": (
        "RENAME TABLE files TO gone",
        "RENAME TABLE gone TO files",
        "(1146)",
    ),
    "a column is gone": (
        "ALTER TABLE addons RENAME COLUMN current_version TO gone",
        "ALTER TABLE addons RENAME COLUMN gone TO current_version",
        "(1054)",
    ),
    "it may not write": (
        "REVOKE UPDATE (current_version) ON addons FROM {}",
        "GRANT UPDATE (current_version) ON addons TO {}",
        "(1142)",
    ),
    "it may not read": (
        "REVOKE SELECT ON versions FROM {}",
        "GRANT SELECT ON versions TO {}",
        "(1142)",
    ),
    "the budget is gone": (
        "RENAME TABLE aioworker_budget TO gone",
        "RENAME TABLE gone TO aioworker_budget",
        "run `aioworker init`",
    ),
    "it may not charge the budget": (
        "REVOKE UPDATE ON aioworker_budget FROM {}",
        "GRANT UPDATE ON aioworker_budget TO {}",
        "(1142)",
    ),
}


@pytest.fixture(scope="module")
def refused(
    private: servers.Servers, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Future[None]]:
    """All that a database refuses."""
    plays = {name: partial(refuse_and_mend, *what) for name, what in REFUSALS.items()}
    return at_once(private, tmp_path_factory.mktemp("refused"), plays)


def refuse_and_mend(fault: str, cure: str, reason: str, make: MakePlace) -> None:
    place = make(retry_ms=None, chunk_size=1)
    execute(place.shop, "SET GLOBAL userstat = 1")
    place.backlog(CHUNKS)
    place.worker(*STEADY, AIOWORKER_MYSQL_URL=ordinary(place))
    eventually(lambda: len(place.written()) >= 3, "it works")
    user = f"{place.name}user"

    execute(place.shop, fault.format(user))
    eventually(lambda: any(reason in told for told in place.reasons()), "it says so")
    asked = statements(place, user)
    eventually(lambda: statements(place, user) > asked, "it tries again")
    left = CHUNKS - len(place.written())
    assert place.queued() == NOTHING | {QUEUES.bulk: (left, 0)}
    execute(place.shop, cure.format(user))

    assert 0 < left < CHUNKS
    assert_each_done_once(place, CHUNKS)


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_database_that_refuses_every_message(
    refused: dict[str, Future[None]], refusal: str
) -> None:
    """The queue is not drained into retries or dead letters; mended, all goes on by itself."""
    refused[refusal].result()


def statements(place: Place, user: str) -> int:
    """Return how many statements a user has sent, over connections that are closed too."""
    found = (
        "SELECT SUM(select_commands + update_commands + other_commands)"
        " FROM information_schema.user_statistics WHERE user = %s"
    )
    return int(rows(place.shop, found, user)[0][0] or 0)


@pytest.mark.parametrize("writes", [False, True], ids=["a plain user", "one who may write"])
def test_a_database_that_only_reads(
    make_place: MakePlace, manager: Manager, *, writes: bool
) -> None:
    """As one that is away: nothing is counted, and nothing taken until it writes again."""
    place = make_place(retry_ms=None)
    place.backlog(CHUNKS)
    user = {} if writes else {"AIOWORKER_MYSQL_URL": ordinary(place)}  # root may
    place.worker(*STEADY, **user, NOTIFY_SOCKET=manager.name)
    eventually(lambda: place.done() >= 3, "it works")

    execute(place.shop, "SET GLOBAL read_only = 1")
    try:
        manager.until(UNREACHABLE)
        left = CHUNKS - place.done()
        assert place.queued() == NOTHING | {QUEUES.bulk: (left, 0)}
    finally:
        execute(place.shop, "SET GLOBAL read_only = 0")

    assert 0 < left < CHUNKS
    assert_each_done_once(place, CHUNKS)


def test_a_database_without_a_free_connection(
    make_place: MakePlace, network: Proxy, manager: Manager
) -> None:
    """As one that is away, for whoever lost a connection and finds all of them taken."""
    place = make_place(retry_ms=None, mysql_port=network.port)
    place.backlog(CHUNKS)
    url = ordinary(place)  # the server keeps one connection more for root
    place.worker(*STEADY, AIOWORKER_MYSQL_URL=url, NOTIFY_SOCKET=manager.name)
    eventually(lambda: place.done() >= 3, "it works")

    network.reset()
    manager.until(UNREACHABLE)
    with all_connections(place, f"{place.name}user"):
        network.forward()
        while not re.match(f"{UNREACHABLE} .+Too many connections", manager.states[-1]):
            manager.states += manager.socket.recv(4096).decode().splitlines()
        left = CHUNKS - place.done()
        given_back = place.queued()

    # One more than is left, if the reset took the answer to a commit: its message comes again.
    assert given_back in [NOTHING | {QUEUES.bulk: (left + lost, 0)} for lost in (0, 1)]
    assert 0 < left < CHUNKS
    assert_each_done_once(place, CHUNKS)


@contextmanager
def all_connections(place: Place, user: str) -> Iterator[None]:
    """Use up the connections of the server."""
    execute(place.shop, "SET GLOBAL max_connections = 10")
    taken: list[Connection[Cursor]] = []
    try:
        with pytest.raises(pymysql.OperationalError, match="Too many connections"):
            while True:
                taken.append(servers.connect(place.servers.mysql_url.replace("root", user)))
        yield
    finally:
        execute(place.shop, "SET GLOBAL max_connections = DEFAULT")
        for connection in taken:
            connection.close()


@pytest.fixture
def cramped(private: servers.Servers, tmp_path: Path) -> Iterator[Place]:
    """A place in a database server whose tables may have 24 MB together."""
    tablespace = "--innodb-data-file-path=ibdata1:12M:autoextend:max:24M"
    maria = servers.Maria(tmp_path / "cramped", "--innodb-file-per-table=0", tablespace)
    try:
        maria.start()
        place = Place(dataclasses.replace(private, maria=maria), tmp_path)
        yield place
        place.end()
    finally:
        maria.stop()


def test_a_database_without_room(cramped: Place) -> None:
    """What InnoDB says of a full disk too: what was tried goes behind, and nothing is counted."""
    cramped.backlog(CHUNKS, 100)
    cramped.slow(0.01)  # each chunk a second: there is work left when the disk is full
    cramped.worker(*STEADY, AIOWORKER_MAX_RETRIES="0")  # the first that counts is a dead letter
    eventually(lambda: cramped.done() >= 300, "it works")

    execute(cramped.shop, "CREATE TABLE ballast (text VARCHAR(2000))")
    with pytest.raises(pymysql.OperationalError, match="The table 'ballast' is full"):
        while True:
            execute(cramped.shop, "INSERT INTO ballast VALUES (REPEAT('x', 2000))")
    eventually(lambda: cramped.charged() >= cramped.done() / 100 + 2, "two starts failed")
    execute(cramped.shop, "DROP TABLE ballast")
    cramped.slow(0)

    assert_each_done_once(cramped, CHUNKS * 100)


# Its clock steps: for the budget, as if the last start had been an hour earlier or later.


# The step, the workers, and how many starts may come early for it.
STEPS = {
    "forward": ("- INTERVAL 1 HOUR", 1, 0),
    "forward, two workers": ("- INTERVAL 1 HOUR", 2, 1),
    "back": ("+ INTERVAL 1 HOUR", 1, 0),
    "back, two workers": ("+ INTERVAL 1 HOUR", 2, 0),
}


@pytest.fixture(scope="module")
def stepped(
    private: servers.Servers, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Future[None]]:
    """All steps of the clock."""
    plays = {name: partial(step_once, *what) for name, what in STEPS.items()}
    return at_once(private, tmp_path_factory.mktemp("stepped"), plays)


def step_once(step: str, workers: int, early: int, make: MakePlace) -> None:
    place = make(retry_ms=None, chunk_size=1)
    place.backlog(4)
    for _ in range(workers):
        place.worker("--rate-limit", "20/m")
    eventually(lambda: place.done() == 2, "it works")

    execute(place.shop, f"UPDATE aioworker_budget SET last_start = last_start {step}")

    assert_each_done_once(place, 4)
    gaps = [other.first - one.first for one, other in pairwise(place.starts())]
    assert len([gap for gap in gaps if gap < LEAST_GAP]) <= early, gaps
    assert max(gaps) < 2 * INTERVAL + SLACK_SECONDS, gaps


@pytest.mark.parametrize("step", STEPS)
def test_a_clock_that_steps(stepped: dict[str, Future[None]], step: str) -> None:
    """Another worker may start early once; no start comes more than an interval late."""
    stepped[step].result()
