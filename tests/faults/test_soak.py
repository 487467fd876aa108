"""Faults at random: nothing is lost, done twice or hurried, and nothing grows.

They last for two minutes, or SOAK_SECONDS; SOAK_SEED sets which they are. The seed is printed,
and how often each fault happened. The moments at which they strike are never quite the same.

What may happen twice is a dead letter: where RabbitMQ's confirm of a message was lost, it is
published again, and where the acknowledgement of one was lost, it is set aside again.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, pairwise

import aio_pika
import psutil
import pytest

from support import servers
from tests.conftest import (
    QUEUES,
    eventually,
    execute,
    make_database,
    make_worker,
    rows,
    simple_addons,
)
from tests.faults import mixture
from tests.faults.conftest import within
from tests.faults.soak import LASTING, PUBLISH_SECONDS, SESSIONS, Resources, Soak, connections
from tests.place import NOTHING, Place, chunk

SECONDS = float(os.environ.get("SOAK_SECONDS") or 120)
SEED = int(os.environ.get("SOAK_SEED") or random.randrange(2**32))
INTERVAL = 0.25  # of the rate
WARM = 20  # messages before the faults
DRAIN_SECONDS = 240
ROUNDS, FEW = 10, 3
SWAY = 2  # how many a connection needs differs from moment to moment
SAMPLES, SAMPLE_SECONDS = 40, 0.05
RIGHT = "SELECT id FROM addons WHERE current_version = id + 10000"
pytestmark = pytest.mark.timeout(SECONDS + DRAIN_SECONDS + 120)


@dataclass(frozen=True, slots=True)
class Aftermath:
    """What is there when all is mended and done.

    Args:
        soak: What happened.
        seconds: How long it took, by the database's clock.
        held: What each lasting worker held before the faults.
        dead: The ids of the dead letters, taken out of their queue.
    """

    soak: Soak
    seconds: float
    held: list[Resources]
    dead: list[str]

    @property
    def place(self) -> Place:
        """Where it happened."""
        return self.soak.place


@pytest.fixture(scope="module")
def aftermath(
    private: servers.Servers, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Aftermath]:
    """Let it all happen, mend it, and wait until nothing is left to do."""
    tell(f"SOAK_SEED={SEED} SOAK_SECONDS={SECONDS:g}")
    messages = mixture.draw(SEED, WARM + int(SECONDS / PUBLISH_SECONDS))
    soak = Soak(private, tmp_path_factory.mktemp("soak"), SEED, messages)
    try:
        began = now(soak.place)
        soak.warm_up(WARM)
        drain(soak)
        held = [Resources.of(worker) for worker in soak.lasting]
        soak.run(SECONDS)
        tell(f"\n{len(soak.published)} messages, {soak.unconfirmed} published again; faults:")
        for fault, times in sorted(soak.happened.items()):
            tell(f"{times:5} {fault}")
        drain(soak)
        seconds = now(soak.place) - began
        yield Aftermath(soak, seconds, held, asyncio.run(take_dead(soak.place)))
    finally:
        soak.end()


def tell(line: str) -> None:
    """Show a line to who runs it with -s, or sees it fail."""
    print(line)  # noqa: T201


def now(place: Place) -> float:
    """Return the time by the database's clock."""
    return float(rows(place.shop, "SELECT UNIX_TIMESTAMP(SYSDATE(6))")[0][0])


def drain(soak: Soak) -> None:
    """Wait until every row is right and every message settled."""
    place, doomed = soak.place, sum(message.doomed for message in soak.published)

    def settled() -> bool:
        queued = place.queued()
        dead, held = queued.pop(QUEUES.dead)
        return dead >= doomed and not held and not any(chain(*queued.values()))

    try:
        within(DRAIN_SECONDS, lambda: {*place.written()} >= to_write(soak), "every row is right")
        within(DRAIN_SECONDS, settled, "every message is settled")
    finally:
        tell(f"queued {place.queued()}; workers {place.reasons()}")


def to_write(soak: Soak) -> set[int]:
    """Return the add-ons that the published messages are to write."""
    return set(chain(*(message.writes for message in soak.published)))


async def take_dead(place: Place) -> list[str]:
    """Take the dead letters for good, and return their ids."""
    taken = []
    async with await aio_pika.connect(place.servers.amqp_url) as connection:
        channel = await connection.channel()
        queue = await channel.get_queue(QUEUES.dead, ensure=False)
        while (letter := await queue.get(no_ack=True, fail=False)) is not None:
            taken.append(str(letter.headers["id"]))
    return taken


def test_every_row_is_right_and_was_written_once(aftermath: Aftermath) -> None:
    place, expected = aftermath.place, to_write(aftermath.soak)

    assert Counter(place.written()) == Counter(expected)
    assert {row[0] for row in rows(place.shop, RIGHT)} >= expected


def test_every_message_is_done_or_set_aside(aftermath: Aftermath) -> None:
    """What was confirmed, no more and no less; none was set aside that could be done."""
    doomed = {message.id for message in aftermath.soak.published if message.doomed}
    place = aftermath.place

    tell(f"{len(doomed)} messages to be set aside, {len(aftermath.dead)} dead letters")
    assert set(aftermath.dead) == doomed
    assert place.queued() == NOTHING


def test_the_budget_is_kept(aftermath: Aftermath) -> None:
    """No two first writes nearer than the interval, nor more starts than there is time for."""
    starts = aftermath.soak.starts()

    assert min(other - one for one, other in pairwise(starts)) >= INTERVAL
    assert aftermath.place.charged() <= aftermath.seconds / INTERVAL + 1


def test_no_worker_ends_by_itself(aftermath: Aftermath) -> None:
    """And one that is asked to does so cleanly, whatever is broken at that moment."""
    soak = aftermath.soak

    assert [worker.process.poll() for worker in soak.lasting] == [None] * LASTING
    assert soak.stopped == [0] * soak.happened["worker stopped"]


def test_nothing_grows_in_a_worker_that_lives_long(aftermath: Aftermath) -> None:
    """A connection to the database and two to RabbitMQ, one of them to publish, are all."""
    soak = aftermath.soak

    for worker, held in zip(soak.lasting, aftermath.held, strict=True):
        left = Resources.of(worker)
        tell(f"{held} before, {left} after")
        assert left.files <= held.files + 1, "more than what it publishes on"
        assert left.threads <= held.threads
    assert soak.sessions() <= LASTING + 1
    assert soak.connections() <= 2 * (LASTING + 1)


# The same in one process, where asyncio tasks can be counted.


async def test_reconnecting_leaves_nothing_behind(place: Place, broker: servers.Broker) -> None:
    """No asyncio task, file or thread: each would be one more for every outage of a year."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    simple_addons(place.shop, ROUNDS)
    database, stop = make_database(place.servers), asyncio.Event()
    worker = make_worker(place.servers, database, rate_limit="20/s", burst=False)
    running = asyncio.create_task(worker.run(stop))
    held = []

    for number in range(1, ROUNDS + 1):
        await asyncio.to_thread(work, place, number)
        held.append(await least_held())
        await asyncio.to_thread(disconnect, place, broker, number)
    stop.set()
    assert not await running
    database.close()

    tell("\n".join(map(str, held)))
    # Less than one more for every second outage.
    for early, late in zip(zip(*held[:FEW], strict=True), held[-1], strict=True):
        assert late <= max(early) + SWAY, held
    assert asyncio.all_tasks() == {asyncio.current_task()}


def work(place: Place, number: int) -> None:
    """Have a chunk done, and a message set aside, over all three connections."""
    place.publish(chunk(number), b"no JSON")
    eventually(lambda: place.done() == number, "it is done")
    eventually(lambda: place.queued() == NOTHING | {QUEUES.dead: (number, 0)}, "all is settled")


def disconnect(place: Place, broker: servers.Broker, number: int) -> None:
    """End the connections to the database, or those to RabbitMQ, and see that others come."""
    if number % 2:
        ended = connections(broker, place)
        broker.control("close_all_connections", "--vhost", place.name, "soak")
        eventually(lambda: connections(broker, place) - ended, "there are others")
    else:
        sessions = rows(place.shop, SESSIONS)
        execute(place.shop, *(f"KILL {session}" for (session,) in sessions))
        eventually(lambda: {*rows(place.shop, SESSIONS)} - {*sessions}, "there are others")


async def least_held() -> tuple[int, int, int]:
    """Return how many asyncio tasks, files and threads this process has when it has least."""
    process, held = psutil.Process(), []
    for _ in range(SAMPLES):
        await asyncio.sleep(SAMPLE_SECONDS)
        held.append((len(asyncio.all_tasks()), process.num_fds(), process.num_threads()))
    tasks, files, threads = (min(numbers) for numbers in zip(*held, strict=True))
    return tasks, files, threads
