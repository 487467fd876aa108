"""A queue that does not answer is not taken for an empty one.

RabbitMQ answers "how many messages?" with 0 where the queue's leader does not tell it in a
quarter of a second: it is frozen, cut off, or busy.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from aioworker.addresses import BrokerAddress, Nodes
from aioworker.budget import tables
from aioworker.rabbitmq import lanes as taking
from aioworker.rabbitmq.connection import connected
from aioworker.rabbitmq.dead_letters import DeadLetters
from aioworker.rabbitmq.lanes import ANSWER_SECONDS
from aioworker.rabbitmq.publisher import Publisher
from aioworker.rabbitmq.queues import Queues
from support import servers
from tests.conftest import (
    DEADLINE_SECONDS,
    QUEUES,
    TASK,
    Lanes,
    Run,
    Worker,
    declare,
    eventually,
    simple_addons,
    summary,
)

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

Taken = tuple[taking.OpenLanes, list[float]]
_DO = """
{{ok, Queue}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<"/">>, queue, <<"{}">>)),
{{Leader, _}} = amqqueue:get_pid(Queue),
sys:{}(Leader)."""
PATIENCE_SECONDS = 10
SOON = {"AIOWORKER_CONNECT_TIMEOUT": "2"}
CHUNK = b"[[[1]], {}, null]"
SILENT = "RabbitMQ did not answer in time about queue {}, out of memory or disk perhaps;"


@contextmanager
def silent(broker: servers.Broker, queue: str) -> Iterator[None]:
    """Let a queue answer nothing, as one whose leader is frozen."""
    broker.control("eval", _DO.format(queue, "suspend"))
    try:
        yield
    finally:
        broker.control("eval", _DO.format(queue, "resume"))


async def lie(lanes: Lanes, queue: str) -> None:
    """Wait until a queue has its one message, also if a `get` that was given up took it."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while await lanes.count(queue) != 1:  # noqa: ASYNC110 - another process is waited for
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("queue", [QUEUES.retry, QUEUES.dead])
async def test_status_does_not_call_a_silent_queue_empty(
    run: Run, broker: servers.Broker, lanes: Lanes, shop: Connection[Cursor], queue: str
) -> None:
    """Whoever looks during a failover must not read that all is done."""
    await lanes.send(CHUNK, queue)

    with silent(broker, queue):
        assert await lanes.count(queue) == 0, "RabbitMQ tells the truth"
        done = await asyncio.to_thread(run, "status", **SOON)

    assert done.returncode == 1
    assert f"waits      broker unreachable: {SILENT.format(queue)}" in done.stdout
    assert f"broker     {SILENT.format(queue)}" in done.stdout
    assert "queued" not in done.stdout
    await lie(lanes, queue)


@pytest.fixture
async def other(lanes: Lanes, shop: Connection[Cursor]) -> str:
    """A second task, with a chunk in its bulk lane."""
    queues = Queues.of("other", "aioworker")
    await declare(lanes.connection, queues)
    await (await lanes.channel.get_queue(queues.bulk, ensure=False)).purge()
    await lanes.send(CHUNK, queues.bulk)
    with shop.cursor() as cursor:
        cursor.execute(tables.FIRST_ROW % {"task": "'other'"})
    shop.commit()
    return "other"


async def test_status_tells_of_the_tasks_beside_a_silent_queue(
    run: Run, broker: servers.Broker, lanes: Lanes, other: str
) -> None:
    """One queue made RabbitMQ unreachable for all of them."""
    with silent(broker, QUEUES.dead):
        done = await asyncio.to_thread(run, "status", "--json", **SOON)

    assert done.returncode == 1
    beside, found = (json.loads(line) for line in done.stdout.splitlines())
    assert (beside["task"], beside["broker_error"]) == (other, None)
    assert beside["queued"] == {"urgent": 0, "bulk": 1, "retry": 0, "dead": 0}
    assert beside["waits"] == "no worker is running: start one with `aioworker consume`"
    assert (found["task"], found["queued"]) == (TASK, None)
    assert found["broker_error"].startswith(SILENT.format(QUEUES.dead))


async def test_status_tells_of_the_tasks_beside_one_that_may_not_be_read(
    run: Run, broker: servers.Broker, lanes: Lanes, other: str
) -> None:
    broker.control("add_user", "reader", "s3cret")
    broker.control("set_permissions", "reader", "", "", rf"^aioworker\.{other}")
    try:
        address = {"AIOWORKER_AMQP_URL": broker.url("/", "reader", "s3cret")}
        done = await asyncio.to_thread(run, "status", "--json", **address)
    finally:
        broker.control("delete_user", "reader")

    assert done.returncode == 1
    beside, found = (json.loads(line) for line in done.stdout.splitlines())
    assert (beside["queued"]["bulk"], beside["broker_error"]) == (1, None)
    assert (found["task"], found["queued"]) == (TASK, None)
    assert found["waits"] == found["broker_error"]
    assert found["waits"].startswith(f"no permission for queue {QUEUES.urgent}: ACCESS_REFUSED")


async def test_a_burst_is_not_done_while_a_lane_is_silent(
    run: Run, broker: servers.Broker, lanes: Lanes, shop: Connection[Cursor]
) -> None:
    """It said `done 0 messages` and exited 0; whoever counts on that goes on too early."""
    simple_addons(shop, 1)
    await lanes.send(CHUNK)

    with silent(broker, QUEUES.bulk):
        done = await asyncio.to_thread(run, "consume", "--burst", **SOON)

    assert (done.returncode, done.stdout) == (1, "")
    assert f"aioworker: {SILENT.format(QUEUES.bulk)}" in done.stderr
    await lie(lanes, QUEUES.bulk)
    again = await asyncio.to_thread(run, "consume", "--burst")
    assert (again.returncode, again.stdout) == (0, summary(1))


async def test_no_sweep_begins_beside_one_in_a_silent_lane(
    run: Run, broker: servers.Broker, lanes: Lanes, shop: Connection[Cursor]
) -> None:
    """Its lane was called empty, and the queue would only grow."""
    simple_addons(shop, 1)
    await lanes.send(CHUNK)

    with silent(broker, QUEUES.bulk):
        done = await asyncio.to_thread(run, "publish-all", **SOON)

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"aioworker: {SILENT.format(QUEUES.bulk)}")
    await lie(lanes, QUEUES.bulk)


async def test_an_earlier_sweep_in_a_silent_lane_does_not_advance(
    start: Callable[..., Worker], broker: servers.Broker, lanes: Lanes, shop: Connection[Cursor]
) -> None:
    """It was said to, with exit status 0, though nothing moved."""
    await lanes.send(CHUNK)
    sweep = start("publish-all", **SOON)
    eventually(lambda: "watching for 35 s" in sweep.log, "it watches")

    with silent(broker, QUEUES.bulk):
        assert await asyncio.to_thread(sweep.process.wait, DEADLINE_SECONDS) == 1

    assert SILENT.format(QUEUES.bulk) in sweep.log
    assert "published nothing" not in sweep.log
    await lie(lanes, QUEUES.bulk)


@pytest.fixture
def writer(broker: servers.Broker) -> Iterator[dict[str, str]]:
    """Settings of a user who may publish and do nothing else."""
    broker.control("add_user", "writer", "s3cret")
    broker.control("set_permissions", "writer", "", r"^amq\.default$", "")
    yield {"AIOWORKER_AMQP_URL": broker.url("/", "writer", "s3cret")}
    broker.control("delete_user", "writer")


async def test_who_may_not_ask_a_lane_publishes_by_rabbitmqs_count(
    run: Run, writer: dict[str, str], lanes: Lanes, shop: Connection[Cursor]
) -> None:
    simple_addons(shop, 1)

    done = await asyncio.to_thread(run, "publish-all", **writer)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "published 1 chunk, 1 id, last confirmed id 1\n"


async def test_who_may_not_ask_a_lane_says_that_its_end_is_not_sure(
    start: Callable[..., Worker], writer: dict[str, str], lanes: Lanes, shop: Connection[Cursor]
) -> None:
    await lanes.send(CHUNK)
    sweep = start("publish-all", AIOWORKER_RATE_LIMIT="100/s", **writer)
    eventually(lambda: "watching for 2 s" in sweep.log, "it watches")

    await lanes.purge()

    assert await asyncio.to_thread(sweep.process.wait, DEADLINE_SECONDS) == 0
    assert sweep.log.endswith(
        "published nothing: an earlier sweep is still queued, 1 chunk, and perhaps advances:"
        " RabbitMQ counts none now, as in a lane that does not answer, and this user may not read"
        " it; --append publishes all the same\n"
    )


@pytest.mark.parametrize("command", ["list", "drop"])
async def test_no_command_calls_silent_dead_letters_none(
    run: Run, broker: servers.Broker, lanes: Lanes, shop: Connection[Cursor], command: str
) -> None:
    await lanes.send(CHUNK, QUEUES.dead)
    sure = ("--yes",) if command == "drop" else ()

    with silent(broker, QUEUES.dead):
        done = await asyncio.to_thread(run, "dead", command, *sure, **SOON)

    assert (done.returncode, done.stdout) == (1, "")
    assert SILENT.format(QUEUES.dead) in done.stderr
    await lie(lanes, QUEUES.dead)


@pytest.fixture
async def taken(
    lanes: Lanes, pair: servers.Servers, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Taken]:
    """The lanes as a worker has them, and for how long it waited for each `get` of theirs."""
    nodes = Nodes(BrokerAddress.parse_all(pair.amqp_url))
    publisher = Publisher(nodes, 10, "test")
    async with connected(nodes, 10, "test") as theirs:
        opened = await taking.OpenLanes.open(theirs, publisher, QUEUES, PATIENCE_SECONDS)
        asked: list[float] = []
        take = opened._take

        async def asking(seconds: float) -> object:
            asked.append(seconds)
            return await take(seconds)

        monkeypatch.setattr(opened, "_take", asking)
        yield opened, asked


async def test_an_idle_worker_does_not_ask_by_get_at_each_look(
    taken: Taken, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each `get` is an entry in the logs of the queue's members, on their disks."""
    lanes, asked = taken

    for _ in range(10):
        assert not await lanes.hold_something()
    assert asked == [ANSWER_SECONDS]
    monkeypatch.setattr(taking, "EMPTY_SECONDS", 0)
    assert not await lanes.hold_something()
    assert len(asked) == 2


async def test_the_end_of_a_burst_is_asked_for_by_get_each_time(
    taken: Taken,
) -> None:
    """Nobody else would find what is left; so the answer is waited for."""
    lanes, asked = taken

    for _ in range(3):
        assert not await lanes.hold_something(sure=True)

    assert asked == [PATIENCE_SECONDS] * 3


async def test_a_message_that_comes_between_count_and_get_is_given_back(
    taken: Taken, lanes: Lanes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not this worker's turn: nothing is held while it waits."""
    opened, _asked = taken
    take = opened._take

    async def late(seconds: float) -> object:
        await lanes.send(CHUNK)
        return await take(seconds)

    monkeypatch.setattr(opened, "_take", late)

    assert await opened.hold_something()

    assert (await lanes.take(QUEUES.bulk)).body == CHUNK


@pytest.fixture
def unforgiving(broker: servers.Broker) -> Iterator[None]:
    """A policy under which RabbitMQ ends a letter that is given back once."""
    pattern = QUEUES.dead.replace(".", "\\.")
    broker.control("set_policy", "once", f"^{pattern}$", '{"delivery-limit": 0}')
    yield
    broker.control("clear_policy", "once")


@pytest.fixture
def counter(broker: servers.Broker) -> Iterator[str]:
    """The address of a user who may do what `status` needs, and no more."""
    broker.control("add_user", "counter", "s3cret")
    broker.control("set_permissions", "counter", "", "", r"^aioworker\.")
    yield broker.url("/", "counter", "s3cret")
    broker.control("delete_user", "counter")


async def count_as_one_comes(lanes: Lanes, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Count the letters, of which one comes between RabbitMQ's count and the `get`."""
    nodes = Nodes(BrokerAddress.parse_all(address))
    async with (
        connected(nodes, 10, "test") as theirs,
        Publisher(nodes, 10, "test") as publisher,
    ):
        look = DeadLetters(QUEUES, {"guest"}, theirs, publisher, 10)
        counts = look._counts

        async def early() -> tuple[int, int]:
            found = await counts()
            monkeypatch.undo()
            await lanes.send(CHUNK, QUEUES.dead)
            return found

        await look.open()
        monkeypatch.setattr(look, "_counts", early)
        assert await look.count() == 1
        await look.close()


async def test_a_letter_that_comes_between_count_and_get_is_not_ended(
    pair: servers.Servers, lanes: Lanes, unforgiving: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No look ends a letter, that of `status` neither."""
    await count_as_one_comes(lanes, pair.amqp_url, monkeypatch)

    assert (await lanes.take(QUEUES.dead)).body == CHUNK


async def test_a_letter_that_comes_then_is_counted_by_who_may_publish_nothing(
    lanes: Lanes, counter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`status` said that it lacked a right, which `init --print` does not give it."""
    await count_as_one_comes(lanes, counter, monkeypatch)

    assert (await lanes.take(QUEUES.dead)).body == CHUNK
