"""Many messages, few writes: changes of one id, single changes in a sweep, what needs nothing.

Judged by the rows, by triggers that note every write of them and of the budget's row, and by the
server's own log of statements. COALESCING_SEED sets what is drawn; it is printed.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
from contextlib import closing, contextmanager
from itertools import chain, pairwise
from typing import TYPE_CHECKING

from support import servers
from tests.acceptance.test_gathering import GATHERING, STARTS, Start, lines, right, send
from tests.conftest import (
    QUEUES,
    Lanes,
    Run,
    current_versions,
    eventually,
    execute,
    rows,
    simple_addons,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

SEED = int(os.environ.get("COALESCING_SEED") or random.randrange(2**32))
AUDIT = (
    "CREATE TABLE audit (addon INT, starts BIGINT)",
    "CREATE TRIGGER audited AFTER UPDATE ON addons FOR EACH ROW INSERT INTO audit"
    " SELECT NEW.id, starts FROM aioworker_budget",
)
READ = re.compile(r"FROM JSON_TABLE\('(\[[0-9, ]+\])'")
WRITES = re.compile(
    r"\s*(INSERT|UPDATE|DELETE|REPLACE|BEGIN|START|COMMIT|.*FOR UPDATE)\b", re.DOTALL
)
KIND = "SELECT kind FROM aioworker_worker"
CHANGES, FEW = 1000, 5
DRAWN, IDS = 200, range(1, 7)
SINGLE = 500
CHUNKS, SIZE = 8, 500


def change(shop: Connection[Cursor], addon: int, version: int) -> None:
    """Publish a newer version of an add-on."""
    execute(
        shop,
        "INSERT INTO versions (id, addon_id, version, created, modified)"
        f" VALUES ({version}, {addon}, '2.0', '2010-02-01', '2010-02-01')",
        f"INSERT INTO files (version_id, status) VALUES ({version}, 4)",
    )


async def test_an_id_that_is_published_a_thousand_times_is_written_twice_at_most(
    start: Start, run: Run, shop: Connection[Cursor], lanes: Lanes
) -> None:
    """It changes each time; the second start is due once all are published."""
    simple_addons(shop, 1)
    execute(shop, *AUDIT)
    start("consume", "--rate-limit", "1/h", **GATHERING)
    for number in range(CHANGES):
        change(shop, 1, 20_000 + number)
        await send(lanes, 1, lane=random.choice([QUEUES.urgent, QUEUES.bulk]))
        if number == FEW:
            eventually(lambda: current_versions(shop)[1], "the first start is over")

    assert run("rate-limit", "12/m").returncode == 0

    last = {1: 20_000 + CHANGES - 1}
    eventually(lambda: current_versions(shop) == last, "the last change is written")
    eventually(lambda: rows(shop, KIND) == [("empty",)], "nothing is left")
    assert len(rows(shop, "SELECT addon FROM audit")) == 2
    [[starts]] = rows(shop, STARTS)
    assert starts == 2


async def test_the_last_change_of_each_id_is_written(
    start: Start, shop: Connection[Cursor], lanes: Lanes
) -> None:
    """However changes and messages fall between the reads and writes of two workers."""
    print(f"COALESCING_SEED={SEED}")  # noqa: T201 - whoever sees it fail needs it
    chance = random.Random(SEED)
    simple_addons(shop, len(IDS))
    last = right(len(IDS))
    for _ in range(2):
        start("consume", "--rate-limit", "4/s", **GATHERING)
    for number in range(DRAWN):
        ids = chance.sample(IDS, chance.choice([1, 1, 3]))
        for addon in ids:
            last[addon] = 20_000 + len(IDS) * number + addon
            change(shop, addon, 20_000 + len(IDS) * number + addon)
        await send(lanes, *ids, lane=chance.choice([QUEUES.urgent, QUEUES.bulk]))
        await asyncio.sleep(chance.choice([0, 0, 0.05]))

    eventually(lambda: current_versions(shop) == last, "the last changes are written")
    assert await lanes.count(QUEUES.dead) == 0


async def test_single_changes_are_done_soon_and_do_not_stop_a_sweep(
    start: Start, run: Run, shop: Connection[Cursor], lanes: Lanes
) -> None:
    """Five hundred within two intervals, one id each, in the middle of a sweep.

    Two starts after their publication at the latest; a busy machine may not get to the last ones
    before their start is due.
    """
    swept = CHUNKS * SIZE
    simple_addons(shop, swept)
    assert run("publish-all", "--chunk-size", str(SIZE)).returncode == 0
    execute(shop, *AUDIT)
    # Those are of no sweep: they come to be, and are published, one after the other.
    single = range(swept + 1, swept + 1 + SINGLE)
    published: dict[int, int] = {}
    start("consume", "--rate-limit", "20/m", AIOWORKER_CHUNK_SIZE=str(SIZE), **GATHERING)
    eventually(lambda: rows(shop, STARTS) != [(0,)], "the sweep is on")

    for addon in single:
        add(shop, addon)
        [[published[addon]]] = rows(shop, STARTS)
        await send(lanes, addon, lane=QUEUES.urgent)
        await asyncio.sleep(6 / SINGLE)

    eventually(lambda: current_versions(shop) == right(swept + SINGLE), "all are done")
    written = dict(rows(shop, "SELECT addon, starts FROM audit"))
    late = {one: (at, written[one]) for one, at in published.items() if written[one] > at + 3}
    assert late == {}
    advances = sorted({at for addon, at in written.items() if addon <= swept})
    assert all(later - earlier <= 2 for earlier, later in pairwise(advances)), advances


def add(shop: Connection[Cursor], addon: int) -> None:
    """Insert an add-on that is stale."""
    execute(
        shop,
        "INSERT INTO addons (id, addontype_id, status, created, modified)"
        f" VALUES ({addon}, 1, 4, '2009-01-01', '2010-05-25')",
    )
    change(shop, addon, addon + 10_000)


# What needs nothing.


@contextmanager
def locked(pair: servers.Servers, *tables: str) -> Iterator[None]:
    """Inside, somebody else has locked every row of some tables."""
    with closing(servers.connect(pair.mysql_url)) as other, other.cursor() as cursor:
        cursor.execute("BEGIN")
        for table in tables:
            cursor.execute(f"SELECT * FROM {table} FOR UPDATE")
        yield


@contextmanager
def logged(shop: Connection[Cursor], session: int) -> Iterator[list[str]]:
    """Note what a session asks inside; the list has it at the end."""
    said: list[str] = []
    execute(
        shop,
        "TRUNCATE TABLE mysql.general_log",
        "SET GLOBAL log_output = 'TABLE'",
        "SET GLOBAL general_log = 1",
    )
    try:
        yield said
    finally:
        execute(shop, "SET GLOBAL general_log = 0")
        asked = "SELECT argument FROM mysql.general_log WHERE thread_id = %s AND command_type = %s"
        for [argument] in rows(shop, asked, session, "Query"):
            said.append(argument if isinstance(argument, str) else bytes(argument).decode())
        execute(shop, "TRUNCATE TABLE mysql.general_log")


async def test_chunks_that_need_nothing_write_nothing_and_lock_nothing(
    start: Start,
    pair: servers.Servers,
    maria: servers.Maria,
    shop: Connection[Cursor],
    lanes: Lanes,
) -> None:
    """Each is read once, and settled while somebody else has locked every row there is."""
    simple_addons(shop, 300)
    execute(shop, "UPDATE addons SET current_version = id + 10000")
    worker = start("consume", "--rate-limit", "30/m", **GATHERING)
    eventually(lambda: rows(shop, KIND) == [("empty",)], "it is idle")
    [[session]] = rows(shop, "SELECT session FROM aioworker_worker")

    def settled() -> int:
        several = [int(line["messages"]) for line in lines(worker, "nothing to write")]
        return sum(several) + len(lines(worker, "chunk done"))

    tables = ("addons", "versions", "files", "aioworker_budget", "aioworker_run")
    with logged(shop, session) as said, locked(pair, *tables):
        for first in range(1, 301, 10):
            await send(lanes, *range(first, first + 10))
        eventually(lambda: settled() == 30, "all are settled")

    asked = [json.loads(found[1]) for one in said if (found := READ.search(one))]
    assert sorted(chain(*asked)) == list(range(1, 301)), "each in one read"
    writes = {one.split("\n")[0] for one in said if WRITES.match(one)}
    assert {one for one in writes if "aioworker_worker" not in one} == set()
    assert rows(shop, STARTS) == [(0,)]
