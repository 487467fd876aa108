"""Sweeps and single changes, as a person publishes them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable
from typing import TYPE_CHECKING

import aio_pika
import pytest

from aioworker.budget import tables
from aioworker.rabbitmq import queues
from support import servers, site
from tests.conftest import (
    AIOWORKER,
    QUEUES,
    Lanes,
    Run,
    Worker,
    current_versions,
    database_name,
    eventually,
    execute,
    importable,
    rows,
    simple_addons,
    summary,
)

if TYPE_CHECKING:
    from pathlib import Path

    from pymysql.connections import Connection
    from pymysql.cursors import Cursor


async def queued_ids(lanes: Lanes, queue: str = QUEUES.bulk) -> list[list[int]]:
    """Take all messages of a queue and return their chunks."""
    return [
        json.loads((await lanes.take(queue)).body)[0][0] for _ in range(await lanes.count(queue))
    ]


def many_ids(shop: Connection[Cursor], count: int, also: str = "TRUE") -> None:
    """Make a site of *count* add-ons to sweep out of nothing: a view over a table of numbers."""
    execute(shop, "SET foreign_key_checks = 0", "DROP TABLE IF EXISTS addons, numbers")
    with shop.cursor() as cursor:
        site.number_rows(cursor, count + 1)
    execute(
        shop,
        "CREATE OR REPLACE VIEW addons AS SELECT n AS id, 4 AS status, 0 AS inactive,"
        f" 1 AS addontype_id FROM numbers WHERE n > 0 AND {also}",
    )


@pytest.fixture
def endless(shop: Connection[Cursor]) -> None:
    """A sweep that takes long enough to be cut short: more than half a second a page."""
    many_ids(shop, 200_000, also="SLEEP(0.0001) = 0")


async def test_a_sweep_takes_what_is_valid_and_no_persona(
    run: Run, lanes: Lanes, shop: Connection[Cursor]
) -> None:
    """Add-ons without a current version are among them: they need it most."""
    public = (2010, "2010-01-01", "2010-01-01", [4])
    site.insert_addon(shop, (1, 1, 4, 0, None), [public])
    site.insert_addon(shop, (2, 1, 4, 0, 2010), [])
    for addon, (kind, status, inactive) in enumerate(
        [(9, 4, 0), (1, 0, 0), (1, 5, 0), (1, 4, 1), (2, 1, 0), (1, 7, 0), (1, 11, 0)], 3
    ):
        site.insert_addon(shop, (addon, kind, status, inactive, None), [])

    done = run("publish-all")

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "published 1 chunk, 4 ids, last confirmed id 8\n"
    assert await queued_ids(lanes) == [[1, 2, 7, 8]]


async def test_a_dry_run_counts_and_publishes_nothing(
    run: Run, lanes: Lanes, shop: Connection[Cursor]
) -> None:
    """It does not even need the broker."""
    simple_addons(shop, 25)

    done = run(
        "publish-all", "--dry-run", "--chunk-size", "10", AIOWORKER_AMQP_URL="amqp://127.0.0.1:1/"
    )

    assert (done.returncode, done.stdout) == (0, "would publish 3 chunks, 25 ids\n")
    assert await lanes.count(QUEUES.bulk) == 0


async def test_a_sweep_can_leave_out_what_is_right_already(
    run: Run, lanes: Lanes, shop: Connection[Cursor]
) -> None:
    """It is read without locks, and the starts are spent on what is stale."""
    simple_addons(shop, 2500)
    execute(shop, "UPDATE addons SET current_version = id + 10000 WHERE id % 2")

    dry = run("publish-all", "--only-needed", "--dry-run")
    done = run("publish-all", "--only-needed", "--chunk-size", "1000")

    assert dry.stdout == "would publish 2 chunks, 1250 ids\n"
    assert done.stdout == "published 2 chunks, 1250 ids, last confirmed id 2500\n"
    assert await queued_ids(lanes) == [list(range(2, 2001, 2)), list(range(2002, 2501, 2))]


async def test_a_sweep_can_begin_behind_an_id(
    run: Run, lanes: Lanes, shop: Connection[Cursor]
) -> None:
    """It is appended to what is queued: it goes on with a sweep that was cut short."""
    simple_addons(shop, 25)
    run("publish-all", "--chunk-size", "10", AIOWORKER_CONNECT_TIMEOUT="5")

    done = run("publish-all", "--chunk-size", "10", "--after", "10")

    assert done.stdout == "published 2 chunks, 15 ids, last confirmed id 25\n"
    ids = list(range(1, 26))
    assert await queued_ids(lanes) == [ids[:10], ids[10:20], ids[20:], ids[10:20], ids[20:]]


async def test_nothing_is_published_while_an_earlier_sweep_stands_still(
    run: Run, lanes: Lanes, shop: Connection[Cursor]
) -> None:
    """The queue would only grow, and cron would not say so."""
    simple_addons(shop, 5)
    run("publish-all")

    still = run("publish-all", AIOWORKER_RATE_LIMIT="100/s")
    paused = run("publish-all", AIOWORKER_RATE_LIMIT="0/m")

    assert (still.returncode, paused.returncode) == (1, 1)
    assert still.stdout == (
        "published nothing: an earlier sweep is still queued, 1 chunk, and stands still;"
        " --append publishes all the same\n"
    )
    assert await lanes.holds(QUEUES.bulk, 1)
    assert run("publish-all", "--append").returncode == 0
    assert await lanes.holds(QUEUES.bulk, 2)


async def test_an_earlier_sweep_that_advances_is_no_error(
    run: Run, lanes: Lanes, shop: Connection[Cursor], start: Callable[..., Worker]
) -> None:
    """Cron sends no mail while all is well."""
    simple_addons(shop, 900)
    run("publish-all", "--chunk-size", "10")
    start("consume", "--rate-limit", "2/s")

    done = run("publish-all", AIOWORKER_RATE_LIMIT="2/s")

    assert done.returncode == 0
    assert re.fullmatch(
        r"published nothing: an earlier sweep is still queued, \d+ chunks?, and advances;"
        r" --append publishes all the same\n",
        done.stdout,
    )


async def test_one_sweep_at_a_time_over_all_hosts(
    run: Run, lanes: Lanes, endless: None, start: Callable[..., Worker]
) -> None:
    first = start("publish-all")
    eventually(lambda: "published" in first.log, "the first sweep is under way")

    second = run("publish-all", "--append")

    assert (second.returncode, second.stdout) == (1, "")
    assert second.stderr.endswith(
        "another sweep of update_current_version is being published; nothing was done\n"
    )


ELSEWHERE = """
import itertools
import time
from aioworker import task

def every():
    for number in itertools.count(1):
        time.sleep(0.02)
        yield [number]

@task(keys=every)
def elsewhere(ids: list[int]) -> None: ...

@elsewhere.needed
def needed(ids: list[int]) -> list[int]:
    return ids
"""


@pytest.mark.parametrize("options", [(), ("--only-needed",)], ids=["all", "only needed"])
async def test_a_sweep_of_what_is_no_table_ends_with_the_lock_that_keeps_others_out(
    run: Run,
    pair: servers.Servers,
    shop: Connection[Cursor],
    start: Callable[..., Worker],
    tmp_path: Path,
    options: tuple[str, ...],
) -> None:
    """Nothing else uses a connection then that would miss it."""
    (tmp_path / "far.py").write_text(ELSEWHERE)
    variables = {"PYTHONPATH": importable(tmp_path), "AIOWORKER_APP": "far"}
    assert run("init", **variables).returncode == 0
    sweep = start("publish-all", "--append", "--chunk-size", "1", *options, **variables)
    eventually(lambda: "published" in sweep.log, "the sweep is under way")
    lock = tables.lock_name(database_name(pair), "elsewhere", "aioworker:sweep")
    [[holder]] = rows(shop, "SELECT IS_USED_LOCK(%s)", lock)

    execute(shop, f"KILL {holder}")

    assert sweep.process.wait(30) == 1
    again = f"publish-all elsewhere {' '.join(['--chunk-size', '1', *options])} --after "
    assert f"; go on with: aioworker {again}" in sweep.log


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_an_interrupted_sweep_says_how_to_go_on(
    run: Run,
    lanes: Lanes,
    endless: None,
    start: Callable[..., Worker],
    shop: Connection[Cursor],
    number: signal.Signals,
) -> None:
    """No id up to the one it names is missing."""
    sweep = start("publish-all", "--chunk-size", "500")
    eventually(lambda: "published" in sweep.log, "the sweep is under way")

    sweep.process.send_signal(number)

    assert sweep.process.wait(30) == 1
    last = re.search(
        rf"aioworker: stopped by {number.name}; confirmed \d+ chunks, (\d+) ids, last confirmed id"
        r" \1; go on with: aioworker publish-all update_current_version --chunk-size 500 --after"
        r" \1\n$",
        sweep.log,
    )
    assert last is not None, sweep.log
    confirmed = int(last[1])
    # What was under way may be there too.
    assert confirmed // 500 <= await lanes.count(QUEUES.bulk) <= confirmed // 500 + 64


async def test_a_sweep_that_loses_its_broker_goes_on_where_it_says(
    run: Run,
    lanes: Lanes,
    shop: Connection[Cursor],
    start: Callable[..., Worker],
    broker: servers.Broker,
) -> None:
    """It loses it while messages are under way, and nobody lets it in again."""
    many_ids(shop, 500_000)
    sweep = start("publish-all", "--chunk-size", "10")
    eventually(lambda: "published" in sweep.log, "the sweep is under way")

    broker.control("suspend_listeners")
    try:
        broker.control("close_all_connections", "test")
        assert sweep.process.wait(60) == 1
    finally:
        broker.control("resume_listeners")

    assert "aioworker: cannot connect to RabbitMQ" in sweep.log
    command = re.search(r"go on with: aioworker (.*)\n$", sweep.log)
    assert command is not None, sweep.log
    confirmed = int(command[1].split()[-1])
    many_ids(shop, confirmed + 3000)
    done = run(*command[1].split())
    assert done.stdout == f"published 300 chunks, 3000 ids, last confirmed id {confirmed + 3000}\n"


async def test_a_sweep_whose_connection_is_closed_goes_on_over_another_one(
    pair: servers.Servers,
    lanes: Lanes,
    shop: Connection[Cursor],
    start: Callable[..., Worker],
    broker: servers.Broker,
) -> None:
    """What was under way is published once more: each id is there at least once."""
    many_ids(shop, 100_000)
    sweep = start("publish-all", "--chunk-size", "10")
    eventually(lambda: "published" in sweep.log, "the sweep is under way")

    broker.control("close_all_connections", "test")

    assert sweep.process.wait(60) == 0
    assert "published 10000 chunks, 100000 ids, last confirmed id 100000\n" in sweep.log
    async with await aio_pika.connect(pair.amqp_url, timeout=10) as again:
        assert (await queues.count(again, QUEUES.bulk, 10) or 0) >= 10_000


async def test_single_changes_go_to_the_urgent_lane(run: Run, lanes: Lanes) -> None:
    done = run("publish", "3615", "55")

    assert (done.returncode, done.stdout) == (
        0,
        "published 2 ids in 1 message to the urgent lane of update_current_version\n",
    )
    assert await queued_ids(lanes, QUEUES.urgent) == [[3615, 55]]


async def test_ids_come_from_standard_input_too(run: Run, lanes: Lanes) -> None:
    """Each id once, in chunks of a thousand."""
    done = run("publish", "--bulk", "2000", "-", text="\n".join(map(str, [*range(1, 1001), 7])))

    assert done.stdout == (
        "published 1001 ids in 2 messages to the bulk lane of update_current_version\n"
    )
    assert [len(chunk) for chunk in await queued_ids(lanes)] == [1000, 1]


async def test_a_message_is_persistent_and_of_celerys_protocol(run: Run, lanes: Lanes) -> None:
    run("publish", "3615")

    message = await lanes.take(QUEUES.urgent)

    assert message.delivery_mode == 2
    assert (message.content_type, message.content_encoding) == ("application/json", "utf-8")
    assert message.correlation_id == message.message_id == message.headers["id"]
    assert message.headers["task"] == "update_current_version"


async def test_a_published_change_is_made(run: Run, lanes: Lanes, shop: Connection[Cursor]) -> None:
    """From the command to the row."""
    simple_addons(shop, 3)
    run("publish", "2")

    done = run("consume", "--burst")

    assert (done.returncode, done.stdout) == (0, summary(1))
    assert current_versions(shop) == {1: None, 2: 10_002, 3: None}


def peak_mebibytes(pair: servers.Servers) -> float:
    """Publish everything and return the most memory that it took."""
    process = subprocess.Popen(
        [AIOWORKER, "publish-all"],
        env=pair.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _pid, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss / 1024


async def test_memory_does_not_grow_with_the_table(
    pair: servers.Servers, shop: Connection[Cursor], lanes: Lanes
) -> None:
    """A million ids take what a hundred thousand take: one page, 64 chunks under way."""
    many_ids(shop, 100_000)
    small = peak_mebibytes(pair)
    assert await lanes.holds(QUEUES.bulk, 100)
    await lanes.purge()
    many_ids(shop, 1_000_000)

    large = peak_mebibytes(pair)

    assert await lanes.holds(QUEUES.bulk, 1000)
    assert large < small + 10
