"""Ten thousand bad messages beside twenty good ones: each is set aside, and nothing else happens.

They are drawn at random; JUNK_SEED sets the seed, which is printed.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import Any

import aio_pika
import psutil
import pytest
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage
from pamqp.commands import Basic

from support import servers
from tests.conftest import QUEUES, TASK, Worker, eventually, simple_addons
from tests.faults import junk
from tests.faults.junk import Bad
from tests.place import NOTHING, Place, chunk

pytestmark = pytest.mark.timeout(900)  # ten thousand messages: minutes on an idle machine
SEED = int(os.environ.get("JUNK_SEED") or random.randrange(2**32))
COUNT = 10_000
FIRST = 1_000  # after so many, a worker has met what it needs memory for
HALF = COUNT // 2
GOOD, SIZE = 21, 10
LANES = (QUEUES.bulk, QUEUES.urgent)
AT_ONCE = 500
POLL_SECONDS = 0.5
LINE = re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+Z (INFO |ERROR) .* [a-z_]+=\S")
GROWTH_BYTES = 10_000_000
LARGE_GROWTH_BYTES = 30_000_000
SET_ASIDE = "no reason is noted"  # nobody set it aside: it was published there
HEAVY, HEAVY_BYTES = 32, 4_000_000
HEAVY_MOST_BYTES = 110_000_000


@dataclass(frozen=True, slots=True)
class Aftermath:
    """What is there when all is done.

    Args:
        place: Where it happened.
        worker: Who did it.
        bad: The bad messages; the index of each is its correlation id.
        dead: The dead letters, taken out of their queue.
        resident: The worker's bytes of memory after the first thousand, after half of them with
            the large ones, and after all.
    """

    place: Place
    worker: Worker
    bad: list[Bad]
    dead: list[AbstractIncomingMessage]
    resident: list[int]


@pytest.fixture(scope="module")
def aftermath(
    private: servers.Servers, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Aftermath]:
    """Let one worker meet them all."""
    print(f"JUNK_SEED={SEED}")  # noqa: T201 - who wants the same messages again needs it
    place = Place(private, tmp_path_factory.mktemp("bad"), chunk_size=1)  # a good one fills a start
    try:
        simple_addons(place.shop, junk.ADDONS[-1])
        yield asyncio.run(meet_all(place, place.worker("--rate-limit", "100/s")))
    finally:
        place.end()


async def meet_all(place: Place, worker: Worker) -> Aftermath:
    drawn, wide, large = junk.draw(SEED, COUNT), junk.wide(), junk.large()
    parts = [wide + drawn[:FIRST], large + drawn[FIRST:HALF], drawn[HALF:]]
    bad, good = list(chain(*parts)), [good_message(n) for n in range(GOOD)]
    resident = []
    async with await aio_pika.connect(place.servers.amqp_url) as connection:
        channel = await connection.channel()
        for begin, end in pairwise([0, *accumulate(map(len, parts))]):
            messages = [bad_message(n, bad[n]) for n in range(begin, end)]
            messages += [good.pop() for _ in range(GOOD // len(parts))]
            await publish(channel, random.Random(SEED), messages)
            while await count(channel, QUEUES.dead) < end:
                assert worker.process.poll() is None
                await asyncio.sleep(POLL_SECONDS)
            resident.append(psutil.Process(worker.process.pid).memory_info().rss)
        dead = [letter async for letter in take(channel)]
    return Aftermath(place, worker, bad, dead, resident)


def bad_message(index: int, bad: Bad) -> aio_pika.Message:
    """Make a bad message that its dead letter can be told by."""
    kind = junk.Nameless if bad.nameless else aio_pika.Message
    return kind(
        bad.body,
        headers=bad.headers,
        content_type=bad.content_type,
        correlation_id=str(index),
        delivery_mode=2,
    )


def good_message(index: int) -> aio_pika.Message:
    """Make the message of a good chunk."""
    body = chunk(*range(index * SIZE + 1, (index + 1) * SIZE + 1))
    return aio_pika.Message(body, headers={"task": TASK, "id": f"good-{index}"}, delivery_mode=2)


async def publish(
    channel: AbstractChannel,
    order: random.Random,
    messages: list[aio_pika.Message],
    lanes: Sequence[str] = LANES,
) -> None:
    """Publish messages in any order, each to any of the lanes, each confirmed."""
    order.shuffle(messages)
    for begin in range(0, len(messages), AT_ONCE):
        part = messages[begin : begin + AT_ONCE]
        await asyncio.gather(
            *(channel.default_exchange.publish(one, order.choice(lanes)) for one in part)
        )


async def count(channel: AbstractChannel, name: str) -> int:
    """Return how many messages wait in a queue."""
    queue = await channel.declare_queue(name, passive=True)
    return queue.declaration_result.message_count or 0


async def take(channel: AbstractChannel) -> AsyncIterator[AbstractIncomingMessage]:
    """Take all dead letters for good."""
    queue = await channel.get_queue(QUEUES.dead, ensure=False)
    while (letter := await queue.get(no_ack=True, fail=False)) is not None:
        yield letter


def test_every_bad_message_is_a_dead_letter_with_its_reason_in_one_line(
    aftermath: Aftermath,
) -> None:
    """Once, and with its body, so that a person can see what was wrong and who sent it."""
    bad, dead = aftermath.bad, aftermath.dead

    assert sorted(int(letter.correlation_id or -1) for letter in dead) == list(range(len(bad)))
    for letter in dead:
        sent = bad[int(letter.correlation_id or -1)]
        reason = letter.headers["x-aioworker-reason"]
        assert isinstance(reason, str)
        assert reason.startswith(sent.reason)
        assert reason.isprintable()
        assert letter.body == sent.body


def test_the_good_chunks_beside_them_are_done_and_nothing_else_is(aftermath: Aftermath) -> None:
    place = aftermath.place

    eventually(lambda: place.queued() == NOTHING, "all is settled")

    assert sorted(place.written()) == list(range(1, GOOD * SIZE + 1))
    assert place.done() == GOOD * SIZE
    assert place.charged() == GOOD


def test_the_worker_lives_on_and_needs_no_more_memory(aftermath: Aftermath) -> None:
    """What ten thousand cost would be what a month costs; a large body is given back."""
    first, half, end = aftermath.resident

    assert aftermath.worker.process.poll() is None
    assert end - half < GROWTH_BYTES, aftermath.resident
    assert end - first < LARGE_GROWTH_BYTES, aftermath.resident


def test_no_line_of_its_log_is_anybody_elses(aftermath: Aftermath) -> None:
    """One for each, whatever a message calls itself, and no traceback."""
    lines = aftermath.worker.log.removesuffix("\n").split("\n")

    assert len([line for line in lines if "message refused" in line]) == len(aftermath.bad)
    assert [line for line in lines if not (LINE.match(line) and line.isprintable())] == []


async def send(place: Place, headers: dict[str, Any]) -> None:
    """Publish something that is no message, and a good chunk behind it."""
    async with await aio_pika.connect(place.servers.amqp_url) as connection:
        channel = await connection.channel()
        bad = Bad((junk.NO_JSON,), b"no JSON", {"task": TASK} | headers)
        await publish(channel, random.Random(SEED), [bad_message(0, bad)], [QUEUES.bulk])
        await publish(channel, random.Random(SEED), [good_message(0)], [QUEUES.bulk])


@pytest.mark.parametrize("queue", [QUEUES.bulk, QUEUES.dead])
def test_properties_that_cannot_be_decoded(place: Place, queue: str) -> None:
    """The message is a dead letter like any other, with its body, and holds up nobody.

    In the dead letters too, where RabbitMQ itself may put one: the commands can be used.
    """
    simple_addons(place.shop, SIZE)
    asyncio.run(send_undecodable(place, queue))

    place.worker("--rate-limit", "100/s")

    count = len(junk.UNDECODABLE) + 1
    eventually(lambda: place.done() == SIZE, "the good chunk is done")
    eventually(lambda: place.queued() == NOTHING | {QUEUES.dead: (count, 0)}, "they are set aside")
    assert place.charged() == 1
    assert_told(place)
    letters = place.run("dead", "show", f"unknown-{hashlib.sha256(b'no JSON').hexdigest()[:16]}")
    assert letters.stdout.count("\n    body: no JSON\n") == len(junk.UNDECODABLE)
    assert place.run("dead", "requeue").returncode == 0
    eventually(lambda: place.queued() == NOTHING | {QUEUES.dead: (count, 0)}, "they are again")
    assert_told(place, requeued=True)
    assert place.run("dead", "drop", "--yes").returncode == 0
    assert place.queued() == NOTHING


def assert_told(place: Place, *, requeued: bool = False) -> None:
    """Each letter says what is wrong with it, also after it was tried again."""
    listed = place.run("dead", "list", "--json").stdout.splitlines()
    reasons = {json.loads(line)["reason"] for line in listed}
    expected = [f"properties cannot be decoded: {error}" for error in junk.UNDECODABLE]
    refused = [reason for reason in reasons if not reason.startswith(tuple(expected))]
    assert len(reasons) == len(expected) + 1
    assert refused in ([junk.NO_JSON + "Expecting value: line 1 column 1 (char 0)"], [SET_ASIDE])
    assert not (requeued and refused == [SET_ASIDE])


async def send_undecodable(place: Place, queue: str) -> None:
    """Publish messages whose properties pamqp cannot decode, and a good chunk behind them."""
    async with await aio_pika.connect(place.servers.amqp_url) as connection:
        channel = await connection.channel()
        underlay = await channel.get_underlay_channel()
        for properties in junk.UNDECODABLE.values():
            await underlay.basic_publish(
                b"no JSON", routing_key=queue, properties=junk.Properties(properties)
            )
        # RabbitMQ puts it where the header says, and passes the key on.
        await underlay.basic_publish(
            b"no JSON",
            routing_key=junk.Latin("caf\xe9"),
            properties=Basic.Properties(headers={"task": TASK, "CC": [queue]}, message_id="key"),
        )
        await publish(channel, random.Random(SEED), [good_message(0)], [QUEUES.bulk])


def test_a_dead_letter_goes_to_the_dead_letters_alone(place: Place) -> None:
    """RabbitMQ sends a message to all queues that its header CC names."""
    simple_addons(place.shop, SIZE)
    asyncio.run(send(place, {"CC": [QUEUES.urgent]}))

    place.worker("--rate-limit", "100/s")

    eventually(lambda: place.done() == SIZE, "the good chunk is done")
    eventually(lambda: place.queued() == NOTHING | {QUEUES.dead: (2, 0)}, "both copies are")


def test_the_bodies_of_refused_messages_are_let_go_one_by_one(place: Place) -> None:
    """A worker in a container of 128 MB is killed by the kernel where twenty are kept at once."""
    worker = place.worker("--rate-limit", "100/s")
    asyncio.run(send_heavy(place))

    eventually(lambda: place.queued() == NOTHING | {QUEUES.dead: (HEAVY, 0)}, "all are set aside")

    assert psutil.Process(worker.process.pid).memory_info().rss < HEAVY_MOST_BYTES


async def send_heavy(place: Place) -> None:
    """Publish bodies of nearly the size that is refused unread."""
    body = b" " * HEAVY_BYTES
    async with await aio_pika.connect(place.servers.amqp_url) as connection:
        messages = [bad_message(n, Bad((junk.NO_JSON,), body)) for n in range(HEAVY)]
        await publish(await connection.channel(), random.Random(SEED), messages)
