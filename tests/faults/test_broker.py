"""RabbitMQ dies, stands still, is cut off, refuses or is full: nothing is lost or done twice.

Judged by the rows, by what a trigger notes of every write, by the budget's row, by what the
worker says in its own row, and by the queues themselves.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from subprocess import CompletedProcess

import pytest

from aioworker.rabbitmq.queues import SAFE_AFTER_SECONDS
from aioworker.worker.session import ALARM_SECONDS
from support import servers
from tests.acceptance.test_worker import Manager
from tests.conftest import DEADLINE_SECONDS, QUEUES, eventually, simple_addons
from tests.faults.conftest import MakePlace, alarmed, away, frozen, within
from tests.faults.moments import FAST, assert_each_done_once, says
from tests.faults.proxy import BASIC_ACK, Proxy
from tests.place import NOTHING, Place, chunk

STEADY = ("--rate-limit", "10/s")
CHUNKS = 30
RECOVERY_SECONDS = 10
TOLD_SECONDS = 15
FROZEN_SECONDS = 25
WATCHED_SECONDS = 6
ALARM_LASTS_SECONDS = 60
SWEPT = 300
SWEEP = {f"[[[{addon}".encode() for addon in range(1, SWEPT + 1)}


@pytest.fixture
def make_place(make_place: MakePlace) -> MakePlace:
    """Places in which each message fills a start: what a fault costs is counted in starts."""
    return partial(make_place, chunk_size=1)


@pytest.fixture
def proxy(broker: servers.Broker) -> Iterator[Proxy]:
    """A network between a worker and the broker."""
    with Proxy(broker.port) as made:
        yield made


def assert_one_start_each(place: Place, chunks: int) -> None:
    """Nothing is left to do or to settle, and no chunk cost more than its one start."""
    assert_each_done_once(place, chunks)
    assert place.charged() == chunks


def messages(place: Place) -> dict[str, int]:
    """Return how many messages the queues have that have any, ready or not."""
    return {name: sum(counts) for name, counts in place.queued().items() if sum(counts)}


@pytest.mark.timeout(180)
@pytest.mark.parametrize("end", [servers.Broker.kill, servers.Broker.stop])
def test_a_broker_that_ends_and_comes_back(
    make_place: MakePlace, broker: servers.Broker, end: Callable[[servers.Broker], None]
) -> None:
    """A write goes on to its commit without it; the message that comes again costs no start."""
    idle, busy = places = make_place(), make_place()
    time.sleep(SAFE_AFTER_SECONDS)  # until the queues outlive a crash
    for place in places:
        simple_addons(place.shop, 2)
        place.worker(*FAST)
    busy.slow(5)
    idle.publish(chunk(1))
    busy.publish(chunk(1), chunk(2))
    eventually(lambda: idle.done() == 1 and says(idle, "nothing queued"), "one is idle")
    eventually(busy.writing, "the other one writes")

    with away(broker, partial(end, broker)) as served:
        assert busy.writing()
        eventually(lambda: busy.done() == 1, "the write is committed")
        busy.slow(0)
        for place in places:
            eventually(partial(says, place, "broker unreachable since"), "it says so")
    idle.publish(chunk(2))

    for place in places:
        assert_one_start_each(place, 2)
        assert place.starts()[1].first - served[0] < RECOVERY_SECONDS


@pytest.mark.timeout(180)
def test_a_broker_that_stands_still(place: Place, broker: servers.Broker) -> None:
    """Its port accepts and nobody answers: said soon, and over when it moves again."""
    place.backlog(CHUNKS)
    place.worker(*STEADY, AIOWORKER_CONNECT_TIMEOUT="2")
    eventually(lambda: place.done() >= 3, "it works")

    with frozen(broker):
        told = within(TOLD_SECONDS, lambda: says(place, "broker unreachable since"), "it says so")
        time.sleep(FROZEN_SECONDS - told)  # the time itself is what is tested

    assert_one_start_each(place, CHUNKS)


def test_a_broker_that_is_not_there_at_the_start(make_place: MakePlace, proxy: Proxy) -> None:
    """The service manager sees a worker that is ready, and why it waits."""
    place = make_place(amqp_port=proxy.port)
    place.backlog(1)
    proxy.reset()
    manager = Manager()

    with manager.socket:
        place.worker(*FAST, NOTIFY_SOCKET=manager.name)
        manager.until("STATUS=waiting: broker unreachable since")
    assert manager.states[:2] == ["READY=1", "STATUS=starting"]
    proxy.forward()

    assert_one_start_each(place, 1)


def test_connections_that_an_operator_closes(place: Place, broker: servers.Broker) -> None:
    place.backlog(CHUNKS)
    place.slow(1)
    place.worker(*STEADY)
    eventually(lambda: place.done() >= 3, "it works")

    broker.control("close_all_connections", "--vhost", place.name, "maintenance")

    assert place.done() < CHUNKS
    place.slow(0)
    assert_one_start_each(place, CHUNKS)


def test_a_broker_that_is_silent_for_longer_than_its_heartbeat_allows(
    make_place: MakePlace, proxy: Proxy
) -> None:
    """What aiormq does then cancels whoever waits for an answer: no worker may end by it."""
    place = make_place(amqp_port=proxy.port)
    place.backlog(3)
    address = f"amqp://guest:guest@{servers.HOST}:{proxy.port}/{place.name}?heartbeat=1"
    patient = {"AIOWORKER_AMQP_URL": address, "AIOWORKER_CONNECT_TIMEOUT": "30"}
    worker = place.worker("--rate-limit", "1/s", **patient)
    eventually(place.done, "it works")

    proxy.black_hole()
    eventually(lambda: "it has sent nothing for too long" in worker.log, "it notices")
    proxy.forward()

    assert_one_start_each(place, 3)


# A network that breaks, each time while an acknowledgement is under way.


def vanishes(proxy: Proxy) -> None:
    """Nothing passes any more."""
    proxy.black_hole()


def is_half_open(proxy: Proxy) -> None:
    """The broker lost the connection, and the worker is told nothing."""
    proxy.black_hole()
    proxy.half_close("server")


def is_reset(proxy: Proxy) -> None:
    """Both are told, and new connections are refused."""
    proxy.reset()


def ends_for_the_worker(proxy: Proxy) -> None:
    """The worker is told that the broker sends nothing more."""
    proxy.half_close("client")


def ends_for_the_broker(proxy: Proxy) -> None:
    """The broker is told that the worker sends nothing more."""
    proxy.half_close("server")


def is_slow(proxy: Proxy) -> None:
    """A question and its answer take two seconds."""
    proxy.delay(1)


NETWORKS = (vanishes, is_half_open, is_reset, ends_for_the_worker, ends_for_the_broker, is_slow)


@pytest.fixture(scope="module")
def broken(
    private: servers.Servers, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[None]]]:
    """All that happens to networks, at the same time, each in a place of its own."""
    assert private.broker is not None
    port, folder = private.broker.port, tmp_path_factory.mktemp("networks")

    def play(what: Callable[[Proxy], None]) -> None:
        with Proxy(port) as proxy:
            place = Place(private, folder, amqp_port=proxy.port, chunk_size=1)
            try:
                break_and_mend(what, place, proxy)
            finally:
                place.end()

    with ThreadPoolExecutor(len(NETWORKS)) as pool:
        yield {what.__name__: pool.submit(play, what) for what in NETWORKS}


def break_and_mend(what: Callable[[Proxy], None], place: Place, proxy: Proxy) -> None:
    """Let a worker lose an acknowledgement to its network, and find back."""
    place.backlog(CHUNKS)
    place.worker(*STEADY, AIOWORKER_CONNECT_TIMEOUT="5")
    eventually(lambda: place.done() >= 3, "it works")
    acknowledging = proxy.hold_at(BASIC_ACK)
    assert acknowledging.wait(DEADLINE_SECONDS)

    what(proxy)
    proxy.release()
    if what is is_slow:
        slowly = place.done()
        eventually(lambda: place.done() > slowly, "it works on, slowly")
        assert proxy.accepted == 1
    elif what in (ends_for_the_worker, ends_for_the_broker):
        eventually(lambda: proxy.accepted > 1, "it connects anew")
    else:
        eventually(lambda: says(place, "broker unreachable since"), "it says so")
    proxy.forward()

    assert_one_start_each(place, CHUNKS)


@pytest.mark.parametrize("network", [what.__name__ for what in NETWORKS])
def test_a_network_that(broken: dict[str, Future[None]], network: str) -> None:
    """Said or survived; the chunk whose acknowledgement was lost is not written again."""
    broken[network].result(2 * DEADLINE_SECONDS)


# RabbitMQ is out of memory, and confirms nothing.


def test_an_alarm_is_nothing_to_a_worker_that_only_takes(
    place: Place, broker: servers.Broker
) -> None:
    place.backlog(CHUNKS)
    place.slow(1)  # raising an alarm takes seconds
    place.worker(*STEADY)
    eventually(lambda: place.done() >= 3, "it works")

    with alarmed(broker):
        assert place.done() < CHUNKS
        place.slow(0)
        assert_one_start_each(place, CHUNKS)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("resource", ["memory", "disk"])
def test_an_alarm_of_a_minute(
    make_place: MakePlace, broker: servers.Broker, proxy: Proxy, resource: str
) -> None:
    """A sweep ends in bounded time, with the command that goes on, and no chunk is missing then.

    What is to be set aside, or put off, stays in its lane, and goes where it should when the
    alarm is over. Its copy may be there twice: what was under way arrives after the alarm.
    """
    swept, refused, failing = make_place(amqp_port=proxy.port), make_place(), make_place()
    simple_addons(swept.shop, SWEPT)
    simple_addons(failing.shop, 1)
    failing.slow(5)
    failing.publish(chunk(1))
    refused.publish(b"no JSON")
    sweep = partial(
        swept.run,
        *("publish-all", "--chunk-size", "1"),
        AIOWORKER_AMQP_URL=swept.through.amqp_url,
        AIOWORKER_CONNECT_TIMEOUT="3",
    )
    halfway = proxy.hold_at(b"[[[150]]")

    with ThreadPoolExecutor() as pool:
        sweeping = pool.submit(sweep)
        assert halfway.wait(DEADLINE_SECONDS)
        with alarmed(broker, resource):
            ends = time.monotonic() + ALARM_LASTS_SECONDS
            proxy.release()
            for place in (refused, failing):
                place.worker(*FAST, AIOWORKER_CONNECT_TIMEOUT="2", AIOWORKER_TASK_TIMEOUT="1")
            cut = sweeping.result(2 * RECOVERY_SECONDS)
            for place in (refused, failing):
                eventually(partial(says, place, "copy not confirmed"), "it says so")
            while time.monotonic() < ends:
                for place in (refused, failing):
                    assert messages(place) == {QUEUES.bulk: 1}
                time.sleep(1)

    assert 0 < go_on(swept, cut) < 150
    assert {body.partition(b"]")[0] for body in swept.take(QUEUES.bulk)} == SWEEP
    soon = ALARM_SECONDS + DEADLINE_SECONDS
    within(soon, lambda: refused.queued()[QUEUES.bulk] == (0, 0), "it is set aside")
    assert set(refused.take(QUEUES.dead)) == {b"no JSON"}
    within(soon, lambda: QUEUES.retry in messages(failing), "the other one waits for its retry")
    failing.slow(0)
    eventually(lambda: failing.done() == 1, "it is done")
    eventually(lambda: not messages(failing), "all is settled")


def go_on(place: Place, cut: CompletedProcess[str]) -> int:
    """Go on with a sweep that was cut short, as it says; return how many it had confirmed."""
    told = re.fullmatch(
        r"aioworker: [^\n]+; confirmed (\d+) chunks?, [^\n]+; go on with: aioworker ([^\n]+)\n",
        cut.stderr,
    )
    assert told is not None, cut.stderr
    assert (cut.returncode, cut.stdout) == (1, "")
    rest = place.run(*told[2].split())
    assert rest.returncode == 0, rest.stderr
    return int(told[1])


# Queues that are gone, different or full.


def test_a_queue_that_is_deleted(make_place: MakePlace) -> None:
    """It is said, and the queue made anew by nobody but `init`; then the work goes on."""
    idle, waiting = places = make_place(), make_place(gather_seconds=0)
    idle.worker(*FAST)
    waiting.worker("--rate-limit", "20/m")
    for place in places:
        simple_addons(place.shop, 2)
    idle.publish(chunk(1))
    waiting.publish(chunk(1), chunk(2))
    eventually(lambda: idle.done() == 1 and says(idle, "nothing queued"), "one is idle")
    eventually(lambda: says(waiting, "budget: next start at"), "the other waits for its budget")

    for place in places:
        place.delete(QUEUES.bulk)

    missing = f"queue {QUEUES.bulk} does not exist: run `aioworker init`"
    for place in places:
        eventually(partial(says, place, missing), "it says so")
        assert QUEUES.bulk not in place.queued()
    with ThreadPoolExecutor() as pool:
        assert [done.returncode for done in pool.map(lambda p: p.run("init"), places)] == [0, 0]
    for place in places:
        place.publish(chunk(2))
    for place in places:
        assert_one_start_each(place, 2)


def test_a_queue_that_somebody_made_anew_with_other_arguments(place: Place) -> None:
    """Workers take from it, old and new; `init` names the difference and changes nothing."""
    simple_addons(place.shop, 2)
    old = place.worker(*FAST)
    eventually(lambda: says(place, "nothing queued"), "it is idle")

    place.delete(QUEUES.bulk)
    place.declare(QUEUES.bulk, {"x-queue-type": "quorum"})

    place.publish(chunk(1))
    assert_one_start_each(place, 1)  # settled too: its end is no death in the middle of a run
    old.end()
    place.worker(*FAST)
    place.publish(chunk(2))
    assert_one_start_each(place, 2)
    refused = place.run("init")
    assert (refused.returncode, refused.stdout, refused.stderr) == (
        1,
        "",
        f"aioworker: queue {QUEUES.bulk} differs: expected x-dead-letter-exchange '', got: none;"
        " nothing was changed. Empty and delete the queue, then run `aioworker init` again\n",
    )


def test_a_dead_letter_without_a_queue_to_lie_in(place: Place) -> None:
    """The message is kept, and becomes one when the queue is there again."""
    place.worker(*FAST)
    eventually(lambda: says(place, "nothing queued"), "it is idle")
    place.delete(QUEUES.dead)

    place.publish(b"no JSON")

    eventually(lambda: says(place, "copy not confirmed"), "it says so")
    assert messages(place) == {QUEUES.bulk: 1}
    assert QUEUES.dead not in place.queued()
    assert place.run("init").returncode == 0
    eventually(lambda: place.queued() == NOTHING | {QUEUES.dead: (1, 0)}, "it is set aside")


def test_a_sweep_into_a_queue_that_is_full(place: Place) -> None:
    """It ends in one line, with the command that goes on, and no chunk is missing then."""
    simple_addons(place.shop, SWEPT)
    place.limit(QUEUES.bulk, "max-length", 100)

    full = place.run("publish-all", "--chunk-size", "1")
    place.limit(QUEUES.bulk, "max-length", SWEPT * 2)

    assert 0 < go_on(place, full) < SWEPT
    assert {body.partition(b"]")[0] for body in place.take(QUEUES.bulk)} == SWEEP


# A user who may not.


def test_a_wrong_password_that_is_corrected(
    place: Place, broker: servers.Broker, proxy: Proxy
) -> None:
    """It is tried again, ever more slowly, and the worker needs no restart."""
    place.backlog(1)
    broker.control("add_user", place.name, "wrong")
    broker.control("set_permissions", "-p", place.name, place.name, "", ".*", ".*")
    url = f"amqp://{place.name}:right@{servers.HOST}:{proxy.port}/{place.name}"
    try:
        place.worker(*FAST, AIOWORKER_AMQP_URL=url)
        eventually(lambda: proxy.accepted, "it tries")
        time.sleep(WATCHED_SECONDS)  # how often it tries in that time is what is tested
        tried = proxy.accepted
        reasons = place.reasons()
        broker.control("change_password", place.name, "right")

        assert_one_start_each(place, 1)
    finally:
        broker.control("delete_user", place.name)
    assert 1 < tried <= 2 * WATCHED_SECONDS
    assert ["user or password refused" in reason for reason in reasons] == [True]
