"""Starts that hold several messages, on real servers: what is spent, what is lost, whose fault."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from aioworker.budget import tables
from aioworker.budget.deaths import MOST_DEATHS
from support.servers import ROOT
from tests.conftest import (
    COMMAND_SECONDS,
    QUEUES,
    TASK,
    Lanes,
    Run,
    Worker,
    current_versions,
    database_name,
    eventually,
    execute,
    rows,
    simple_addons,
)
from tests.deadly import DEADLY_ADDON, STATUS

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

    from support.servers import Broker, Servers

Start = Callable[..., Worker]
GATHERING = {"AIOWORKER_GATHER_SECONDS": "20", "AIOWORKER_LOG_FORMAT": "json"}
STARTS = "SELECT starts FROM aioworker_budget"


async def send(lanes: Lanes, *chunk: int, lane: str = QUEUES.bulk) -> None:
    """Publish a message of some add-ons, whose id is the first of them."""
    headers: dict[str, Any] = {"task": "update_current_version", "id": f"chunk {chunk[0]}"}
    await lanes.send(json.dumps([[list(chunk)], {}, None]).encode(), lane, headers=headers)


def lines(worker: Worker, event: str) -> list[dict[str, Any]]:
    """Return what a worker has logged of an event."""
    found = [json.loads(line) for line in worker.log.splitlines() if line.startswith("{")]
    return [line for line in found if line["event"] == event]


def right(addons: int) -> dict[int, int | None]:
    """Return the versions that some simple add-ons have if all is done."""
    return {addon: addon + 10_000 for addon in range(1, addons + 1)}


async def test_fifty_single_changes_are_done_in_two_starts(
    start: Start, shop: Connection[Cursor], lanes: Lanes
) -> None:
    simple_addons(shop, 50)
    for addon in range(1, 51):
        await send(lanes, addon, lane=QUEUES.urgent)

    worker = start("consume", "--rate-limit", "30/m", **GATHERING)

    eventually(lambda: current_versions(shop) == right(50), "all are done")
    [[starts]] = rows(shop, STARTS)
    assert starts <= 2

    def told(number: str) -> int:
        """Return a number of all starts; one of a single message says of that."""
        several = [int(line[number]) for line in lines(worker, "start done")]
        return sum(several) + len(lines(worker, "chunk done"))

    eventually(lambda: told("messages") == told("changed") == 50, "they are logged")
    eventually(lambda: not rows(shop, "SELECT * FROM aioworker_run"), "no note is left")


async def test_a_sweep_of_which_little_is_stale_takes_three_starts_at_most(
    start: Start, run: Run, shop: Connection[Cursor], lanes: Lanes
) -> None:
    """Twenty chunks, in each of which one row in a hundred is stale."""
    simple_addons(shop, 2000)
    execute(shop, "UPDATE addons SET current_version = id + 10000 WHERE id % 100 <> 7")
    assert run("publish-all", "--chunk-size", "100").returncode == 0

    start("consume", "--rate-limit", "30/m", **GATHERING)

    eventually(lambda: current_versions(shop) == right(2000), "all are done")
    [[starts]] = rows(shop, STARTS)
    assert starts <= 3


@pytest.mark.parametrize("ends", [signal.SIGKILL, signal.SIGTERM])
async def test_what_a_worker_holds_that_ends_is_done_by_another(
    start: Start, shop: Connection[Cursor], lanes: Lanes, ends: signal.Signals
) -> None:
    simple_addons(shop, 21)
    await send(lanes, 21)
    worker = start("consume", "--rate-limit", "6/m", **GATHERING)
    eventually(lambda: current_versions(shop)[21], "its start is over")
    for addon in range(1, 21):
        await send(lanes, addon)
    kind = "SELECT kind FROM aioworker_worker"
    eventually(lambda: rows(shop, kind) == [("gathering",)], "it holds what came")
    [[before]] = rows(shop, STARTS)

    worker.process.send_signal(ends)
    worker.process.wait(30)

    assert rows(shop, STARTS) == [(before,)], "nothing was charged"
    start("consume", "--rate-limit", "6/m", **GATHERING)
    eventually(lambda: current_versions(shop) == right(21), "another one does it")
    assert rows(shop, STARTS) == [(before + 1,)]
    assert await lanes.count(QUEUES.dead) == 0


async def test_a_host_that_is_lost_while_it_gathers_holds_the_turn_for_ten_seconds(
    start: Start, shop: Connection[Cursor], lanes: Lanes, pair: Servers
) -> None:
    """The server ends its session, which is otherwise kept for a minute."""
    simple_addons(shop, 2)
    await send(lanes, 2)
    worker = start("consume", "--rate-limit", "2/m", **GATHERING)
    eventually(lambda: current_versions(shop)[2], "its start is over")
    await send(lanes, 1)
    lock = tables.lock_name(database_name(pair), TASK)
    held = f"SELECT IS_USED_LOCK('{lock}') IS NOT NULL"
    kind = "SELECT kind FROM aioworker_worker"
    eventually(lambda: rows(shop, kind) == [("gathering",)], "it holds a message")
    assert rows(shop, held) == [(1,)]

    worker.process.send_signal(signal.SIGSTOP)

    eventually(lambda: rows(shop, held) == [(0,)], "the turn is free")
    worker.process.send_signal(signal.SIGCONT)
    eventually(lambda: current_versions(shop) == right(2), "it goes on")
    assert rows(shop, STARTS) == [(2,)]


async def test_a_row_that_the_data_refuses_is_a_dead_letter_and_the_others_are_done(
    start: Start, run: Run, shop: Connection[Cursor], lanes: Lanes
) -> None:
    simple_addons(shop, 50)
    execute(
        shop,
        "CREATE TRIGGER refuse BEFORE UPDATE ON addons FOR EACH ROW IF NEW.id = 13 THEN"
        " SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'no 13'; END IF",
    )
    for addon in range(1, 51):
        await send(lanes, addon)

    start("consume", "--rate-limit", "30/m", **GATHERING)

    done = {addon: version for addon, version in right(50).items() if addon != 13}
    eventually(lambda: current_versions(shop) == {**done, 13: None}, "the others are done")
    eventually(lambda: run("dead", "list").stdout, "it is set aside")
    [letter] = run("dead", "list", "--json").stdout.splitlines()
    assert json.loads(letter)["id"] == "chunk 13"
    assert "no 13" in json.loads(letter)["reason"]
    [[starts]] = rows(shop, STARTS)
    assert starts <= 2


async def test_if_the_data_refuses_all_of_them_the_breaker_allows_few_starts(
    start: Start, shop: Connection[Cursor], lanes: Lanes
) -> None:
    """Three of many messages and one of a single message; then nothing for a minute."""
    simple_addons(shop, 300)
    execute(
        shop,
        "CREATE TRIGGER refuse BEFORE UPDATE ON addons FOR EACH ROW"
        " SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'none'",
    )
    for addon in range(1, 301):
        await send(lanes, addon)

    worker = start("consume", "--rate-limit", "60/m", **GATHERING)
    kind = "SELECT kind FROM aioworker_worker"
    eventually(lambda: rows(shop, kind) == [("breaker",)] and rows(shop, STARTS) >= [(4,)], "open")
    worker.process.send_signal(signal.SIGTERM)
    worker.process.wait(30)

    assert rows(shop, STARTS) == [(4,)]
    dead = await lanes.count(QUEUES.dead)
    assert dead <= 1
    assert dead + await lanes.count(QUEUES.bulk) + await lanes.count(QUEUES.retry) == 300


def live(pair: Servers) -> int:
    """Run a deadly worker until it dies, or the lanes are empty; return its exit status."""
    return subprocess.run(
        [sys.executable, "-m", "tests.deadly", "consume", "--burst", "--rate-limit", "20/s"],
        env=pair.environment | GATHERING,
        cwd=ROOT,
        capture_output=True,
        timeout=COMMAND_SECONDS,
        check=False,
    ).returncode


async def test_a_message_that_kills_its_worker_is_found_among_others(
    pair: Servers, run: Run, shop: Connection[Cursor], lanes: Lanes
) -> None:
    """Its neighbours are done, and its deaths count from when it is alone."""
    simple_addons(shop, 20)
    for addon in range(1, 21):
        await send(lanes, addon)

    lives = [live(pair)]
    while lives[-1] == STATUS and len(lives) < 3 * MOST_DEATHS:
        lives.append(live(pair))

    assert lives[-1] == 1, "a burst with a dead letter"
    assert len(lives) <= MOST_DEATHS + 5 + 1, "log2(20) rounds before it is alone"
    versions = current_versions(shop)
    assert versions.pop(DEADLY_ADDON) is None
    assert versions == {n: version for n, version in right(20).items() if n != DEADLY_ADDON}
    [letter] = run("dead", "list", "--json").stdout.splitlines()
    assert json.loads(letter)["id"] == f"chunk {DEADLY_ADDON}"
    assert rows(shop, "SELECT * FROM aioworker_run") == []


async def test_a_user_who_may_open_few_channels_has_all_done(
    run: Run, shop: Connection[Cursor], lanes: Lanes, broker: Broker
) -> None:
    """RabbitMQ ends the connection that opens one more, and all that is held goes back."""
    simple_addons(shop, 40)
    for addon in range(1, 41):
        await send(lanes, addon, lane=QUEUES.urgent)
    broker.control("set_user_limits", "guest", '{"max-channels": 6}')
    try:
        done = run("consume", "--burst", "--rate-limit", "none", **GATHERING)
    finally:
        broker.control("clear_user_limits", "guest", "max-channels")

    assert done.stdout == "done 40 messages in 1 start; dead letters 0, to retry 0, given back 0\n"
    assert current_versions(shop) == right(40)


async def test_without_a_rate_a_thousand_messages_of_one_id_are_a_few_runs(
    run: Run, shop: Connection[Cursor], lanes: Lanes
) -> None:
    simple_addons(shop, 1)
    for _ in range(1000):
        await send(lanes, 1, lane=QUEUES.urgent)

    done = run("consume", "--burst", "--rate-limit", "none", **GATHERING)

    assert done.stdout == (
        "done 1000 messages in 1 start; dead letters 0, to retry 0, given back 0\n"
    )
    assert current_versions(shop) == right(1)
