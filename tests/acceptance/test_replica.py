"""`AIOWORKER_MYSQL_READ_URL`: what needs writing is read from a server that only reads."""

from __future__ import annotations

import json
import re
from datetime import datetime
from typing import TYPE_CHECKING

import pytest

from aioworker.budget import tables
from support import servers, site
from tests.conftest import (
    QUEUES,
    TASK,
    Lanes,
    Run,
    Worker,
    database_name,
    eventually,
    execute,
    importable,
    rows,
    simple_addons,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

SITE, USER, PASSWORD = "site", "reader", "s3cret"
READ_URL = "AIOWORKER_MYSQL_READ_URL"
# It only reads, logs in its own way, and has defaults that suit nobody.
OPTIONS = (
    *("--read-only=1", "--log-bin", "--binlog-format=STATEMENT", "--server-id=2"),
    *("--autocommit=0", "--completion-type=CHAIN", "--sql-mode=ANSI_QUOTES,ONLY_FULL_GROUP_BY"),
    *("--group-concat-max-len=4", "--default-time-zone=+13:00", "--wait-timeout=5"),
)
ON_SALE = """
from aioworker import Context, task

def every(ctx: Context):
    yield [1, 2, 3, 4]

@task(keys=every)
def on_sale(ctx: Context, ids: list[int]) -> None: ...

@on_sale.needed
def not_yet(ctx: Context, ids: list[int]) -> list[int]:
    with ctx.transaction() as cursor:
        cursor.execute("{statement}")
        return [one for (one,) in cursor.fetchall()]

@task
def other() -> None: ...
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Maria]:
    """A second server."""
    made = servers.Maria(tmp_path_factory.mktemp("replica") / "private", *OPTIONS)
    made.start()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def replica(server: servers.Maria) -> Connection[Cursor]:
    """A site on it of 2,500 add-ons, each second of them stale, and a user who may read it."""
    connection = servers.connect(server.url(SITE), create=True)
    site.create(connection)
    simple_addons(connection, 2500)
    execute(
        connection,
        "SET SESSION wait_timeout = 3600",
        "UPDATE addons SET current_version = id + 10000 WHERE id % 2",
        f"CREATE USER {USER} IDENTIFIED BY '{PASSWORD}'",
        *(f"GRANT SELECT ON {table} TO {USER}" for table in ("addons", "versions", "files")),
    )
    return connection


def reading(server: servers.Maria, user: str = USER, password: str = PASSWORD) -> dict[str, str]:
    """Return the variables by which a command reads from it."""
    return {READ_URL: server.url(SITE, user, password)}


def test_the_least_that_its_user_needs_is_printed(run: Run, server: servers.Maria) -> None:
    """The user of the tests has exactly that."""
    printed = run("init", "--print", **reading(server)).stdout.partition(f"user of {READ_URL}")[2]

    assert re.findall("^GRANT.*$", printed, re.MULTILINE) == [
        f"GRANT SELECT ON `{SITE}`.`{table}` TO '{USER}'@'%';"
        for table in ("addons", "versions", "files")
    ]
    assert READ_URL not in run("init", "--print").stdout


async def test_a_sweep_finds_what_is_stale_on_the_replica(
    run: Run,
    lanes: Lanes,
    shop: Connection[Cursor],
    server: servers.Maria,
    replica: Connection[Cursor],
) -> None:
    """Where the workers write, other rows are: what the replica does not know comes later."""
    simple_addons(shop, 3)

    dry = run("publish-all", "--only-needed", "--dry-run", **reading(server))
    done = run("publish-all", "--only-needed", **reading(server))
    whole = run("publish-all", "--append", **reading(server))

    assert (dry.stdout, dry.stderr) == ("would publish 2 chunks, 1250 ids\n", "")
    assert done.stdout == "published 2 chunks, 1250 ids, last confirmed id 2500\n"
    first = json.loads((await lanes.take(QUEUES.bulk)).body)[0][0]
    assert first == list(range(2, 2001, 2))
    assert whole.stdout == "published 1 chunk, 3 ids, last confirmed id 3\n"


def test_stale_rows_are_counted_on_the_replica(
    run: Run,
    lanes: Lanes,
    shop: Connection[Cursor],
    server: servers.Maria,
    replica: Connection[Cursor],
) -> None:
    simple_addons(shop, 3)

    there = run("status", "--stale", **reading(server))
    here = run("status", "--stale", "--json")
    unasked = run("status", "--json", **reading(server))

    assert (there.returncode, there.stderr) == (0, "")
    assert "\nstale      1250 rows of all that it sweeps\n" in there.stdout
    assert (json.loads(here.stdout)["stale"], here.returncode) == (3, 0)
    assert json.loads(unasked.stdout)["stale"] is None


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"port": "1"}, f"; is it running? check {READ_URL}"),
        ({PASSWORD: "wr0ng"}, f"; check user and password in {READ_URL}"),
        ({SITE: "nowhere"}, "(1044); `aioworker init --print` shows what the user needs"),
    ],
    ids=["away", "password", "database"],
)
async def test_a_replica_that_cannot_be_read_is_one_line_that_names_its_setting(
    run: Run,
    lanes: Lanes,
    shop: Connection[Cursor],
    server: servers.Maria,
    replica: Connection[Cursor],
    changed: dict[str, str],
    words: str,
) -> None:
    simple_addons(shop, 3)
    url = reading(server)[READ_URL]
    for old, new in changed.items():
        url = url.replace(str(server.port) if old == "port" else old, new)

    swept = run("publish-all", "--only-needed", **{READ_URL: url})
    shown = run("status", "--stale", **{READ_URL: url})

    assert (swept.returncode, swept.stdout, len(swept.stderr.splitlines())) == (1, "", 1)
    assert words in swept.stderr
    assert "cannot use MySQL at mysql://reader@127.0.0.1" in swept.stderr
    assert await lanes.count(QUEUES.bulk) == 0
    assert shown.returncode == 1
    assert "\nwaits      nothing queued\n" in shown.stdout
    [line] = re.findall(r"^stale .*$", shown.stdout, re.MULTILINE)
    assert words in line
    for text in (swept.stderr, shown.stdout, shown.stderr):
        assert PASSWORD not in text
        assert "wr0ng" not in text


def test_a_file_for_tls_is_named_with_the_replicas_setting(run: Run, shop: object) -> None:
    url = "mysql://reader:s3cret@127.0.0.1/site?ssl_ca=/nowhere.pem"

    done = run("publish-all", "--only-needed", **{READ_URL: url})

    assert done.returncode == 2
    assert done.stderr.startswith(f"aioworker: {READ_URL}: ")
    assert "/nowhere.pem" in done.stderr


@pytest.mark.parametrize(
    ("statement", "counted"),
    [
        ("SELECT 3", "would publish 1 chunk, 1 id\n"),
        ("DELETE FROM addons", ""),
        ("SET SESSION autocommit = 0", "would publish 0 chunks, 0 ids\n"),
    ],
)
def test_a_needed_that_writes_is_refused_by_the_server(
    run: Run,
    tmp_path: Path,
    shop: Connection[Cursor],
    server: servers.Maria,
    replica: Connection[Cursor],
    statement: str,
    counted: str,
) -> None:
    """Whatever its user may do there: here all, even on a server that only reads."""
    (tmp_path / "sale.py").write_text(ON_SALE.format(statement=statement))
    variables = {"PYTHONPATH": importable(tmp_path), "AIOWORKER_APP": "sale"}
    there = reading(server, "root", "")

    done = run("publish-all", "on_sale", "--only-needed", "--dry-run", **variables, **there)

    assert done.stdout == counted
    if not counted:
        assert done.returncode == 1
        assert done.stderr.endswith(
            f"(1792) at mysql://root@127.0.0.1:{server.port}/site: nothing is written by"
            f" {READ_URL}, keys and needed are to read only\n"
        )
    assert rows(replica, "SELECT COUNT(*) FROM addons") == [(2500,)]


def test_only_what_tells_what_it_needs_is_counted(
    run: Run, tmp_path: Path, shop: Connection[Cursor]
) -> None:
    (tmp_path / "sale.py").write_text(ON_SALE.format(statement="SELECT 3"))
    variables = {"PYTHONPATH": importable(tmp_path), "AIOWORKER_APP": "sale"}
    run("init", **variables)

    found = run("status", "--stale", "--json", **variables).stdout.splitlines()
    refused = run("status", "other", "--stale", **variables)
    watched = run("status", "--stale", "--watch", **variables)

    stale = {one["task"]: one["stale"] for one in map(json.loads, found)}
    assert stale == {TASK: None, "on_sale": 1, "other": None}
    assert (refused.returncode, refused.stderr) == (
        2,
        "aioworker: task 'other' has no keys: it cannot tell what is stale\n",
    )
    assert watched.returncode == 2


COUNTED = """
import time
from pathlib import Path
from aioworker import task

@task(keys=lambda: [[1]])
def counted(ids: list[int]) -> None: ...

@counted.needed
def needed(ids: list[int]) -> list[int]:
    Path("counted-at").write_text(str(time.time()))
    return ids
"""


def test_what_is_told_beside_what_is_stale_is_no_older(
    run: Run, tmp_path: Path, shop: Connection[Cursor]
) -> None:
    """To count may take minutes, in which starts begin."""
    (tmp_path / "stock.py").write_text(COUNTED)
    variables = {"PYTHONPATH": importable(tmp_path), "AIOWORKER_APP": "stock"}
    assert run("init", **variables).returncode == 0

    found = json.loads(run("status", "counted", "--stale", "--json", **variables).stdout)

    assert found["stale"] == 1
    told = datetime.fromisoformat(found["at"]).timestamp()
    assert told > float((tmp_path / "counted-at").read_text())


ENDLESS = """
import itertools
import time
from aioworker import Context, task

def every():
    for number in itertools.count(1):
        time.sleep(0.02)
        yield [number]

@task(keys=every)
def endless(ids: list[int]) -> None: ...

@endless.needed
def needed(ctx: Context, ids: list[int]) -> list[int]:
    with ctx.transaction() as cursor:
        cursor.execute("SELECT id FROM addons WHERE id = 1")
    return ids
"""


async def test_a_sweep_ends_with_the_lock_that_keeps_others_out(
    run: Run,
    start: Callable[..., Worker],
    pair: servers.Servers,
    tmp_path: Path,
    shop: Connection[Cursor],
    server: servers.Maria,
    replica: Connection[Cursor],
) -> None:
    """That is held where the workers write, while the replica is read."""
    (tmp_path / "far.py").write_text(ENDLESS)
    variables = {"PYTHONPATH": importable(tmp_path), "AIOWORKER_APP": "far"} | reading(server)
    assert run("init", **variables).returncode == 0
    options = ("--append", "--only-needed", "--chunk-size", "1")
    sweep = start("publish-all", *options, **variables)
    eventually(lambda: "published" in sweep.log, "the sweep is under way")
    lock = tables.lock_name(database_name(pair), "endless", "aioworker:sweep")
    [[holder]] = rows(shop, "SELECT IS_USED_LOCK(%s)", lock)

    execute(shop, f"KILL {holder}")

    assert sweep.process.wait(30) == 1
    again = "go on with: aioworker publish-all endless --chunk-size 1 --only-needed --after "
    assert again in sweep.log
