"""A worker is killed or stopped at any moment, or gets what nobody should send.

Judged by the rows, by what triggers note of every write of them and of the budget's row, by
exit statuses, and by the queues themselves.
"""

from __future__ import annotations

import itertools
import json
import re
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import pytest

from support import servers
from tests.acceptance.test_worker import Manager
from tests.conftest import QUEUES, TASK, Worker, eventually, execute, rows, simple_addons
from tests.faults.conftest import MakePlace, within
from tests.faults.moments import (
    FAST,
    after_its_charge,
    after_its_get,
    assert_each_done_once,
    at_once,
    before_its_commit,
    hold,
    in_an_update,
    says,
)
from tests.faults.proxy import BASIC_ACK, Proxy
from tests.place import NOTHING, Place, chunk

if TYPE_CHECKING:
    from collections.abc import Iterator

RATE = ("--rate-limit", "30/m")
RARELY = ("--rate-limit", "1/h")
LEAST_GAP = 1.96  # seconds
TASK_TIMEOUT = 5
SHORTLY = 10  # seconds, of a busy machine
QUICKLY = {"AIOWORKER_TASK_TIMEOUT": str(TASK_TIMEOUT), "AIOWORKER_CONNECT_TIMEOUT": "2"}
NOTED = (
    "CREATE TABLE noted (charge DECIMAL(18, 6), wrote DECIMAL(18, 6), starts BIGINT)",
    "CREATE TRIGGER noted AFTER UPDATE ON aioworker_budget FOR EACH ROW INSERT INTO noted VALUES"
    " (UNIX_TIMESTAMP(NEW.last_charge), UNIX_TIMESTAMP(NEW.last_write), NEW.starts)",
    "CREATE TABLE counted (deaths INT)",
    "CREATE TRIGGER counted AFTER UPDATE ON aioworker_run FOR EACH ROW INSERT INTO counted"
    " SELECT NEW.deaths FROM DUAL WHERE NEW.deaths > OLD.deaths",
)
BEFORE_ALL = 1_000_000_000  # when a row that init made says that something was written


def gaps(place: Place, what: str) -> list[float]:
    """Return the seconds from each charge, or each first write that was noted, to the next."""
    noted = (
        f"SELECT DISTINCT {what} FROM noted WHERE starts > 0 AND {what} > {BEFORE_ALL} ORDER BY 1"
    )
    return [float(later - earlier) for [earlier], [later] in pairwise(rows(place.shop, noted))]


def deaths(place: Place) -> list[int]:
    """Return what was counted, each time: the deaths of a message."""
    return [count for [count] in rows(place.shop, "SELECT deaths FROM counted")]


# At any moment.


class Moment(NamedTuple):
    """Where a worker is, and what a death there costs.

    Args:
        reach: Bring the worker there, with a chunk that begins with add-on 1.
        charged: The starts in all, where it dies there.
        ran: Whether its message was running, as it is noted.
        add_ons: How many there are.
    """

    reach: Callable[[Place, Proxy], None]
    charged: int
    ran: bool
    add_ons: int = 3


def waiting(place: Place, _network: Proxy) -> None:
    """It holds nothing, and waits for its budget."""
    place.publish(chunk(1))
    eventually(lambda: says(place, "budget: next start"), "it waits")


def between_its_transactions(place: Place, network: Proxy) -> None:
    """The server has committed a hundred rows, and the other ones are to come."""
    hold(place, network, b"JSON_TABLE('[[102,", MANY)


def after_its_commit(place: Place, network: Proxy) -> None:
    """All is done but for the acknowledgement, which is under way."""
    hold(place, network, BASIC_ACK)
    note = "SELECT message FROM aioworker_run"
    eventually(lambda: rows(place.shop, note) == [], "its end is noted")


MANY = 150
MOMENTS = {
    "waiting": Moment(waiting, 3, ran=False),
    "after its get": Moment(after_its_get, 3, ran=False),
    "after its charge": Moment(after_its_charge, 4, ran=True),
    "in an update": Moment(in_an_update, 4, ran=True),
    "before its commit": Moment(before_its_commit, 4, ran=True),
    "between its transactions": Moment(between_its_transactions, 3, ran=True, add_ons=MANY),
    "after its commit": Moment(after_its_commit, 3, ran=False),
}
SILENT = ("after its get", "after its charge", "before its commit", "after its commit")


@contextmanager
def brought_to(
    moment: Moment, private: servers.Servers, make: MakePlace
) -> Iterator[tuple[Place, Worker, Proxy]]:
    """Bring a worker to a moment of its second start; a third message waits behind it.

    Each message fills a start.
    """
    assert private.broker is not None
    assert private.maria is not None
    with Proxy(private.maria.port) as database, Proxy(private.broker.port) as broker:
        place = make(amqp_port=broker.port, mysql_port=database.port, chunk_size=1)
        simple_addons(place.shop, moment.add_ons)
        execute(place.shop, *NOTED)
        rate = RARELY if moment.reach is waiting else RATE
        worker = place.worker(*rate, **QUICKLY)
        place.publish(chunk(2))
        eventually(lambda: place.done() == 1, "the first start is over")
        network = broker if moment.reach is after_its_commit else database
        moment.reach(place, network)
        place.publish(chunk(3))
        yield place, worker, network


def die(moment: Moment, private: servers.Servers, make: MakePlace) -> None:
    with brought_to(moment, private, make) as (place, worker, _network):
        worker.end()
        place.worker(*RATE)
        place.slow(0)

        assert_each_done_once(place, moment.add_ons)
        assert place.charged() == moment.charged
        assert deaths(place) == [1] * moment.ran
        charges, writes = gaps(place, "charge"), gaps(place, "wrote")
        assert len(charges) == moment.charged - 1
        assert min(charges) >= LEAST_GAP, charges
        assert min(writes) >= LEAST_GAP, writes


def stop(
    moment: Moment, private: servers.Servers, make: MakePlace, *, answered: bool = True
) -> None:
    with brought_to(moment, private, make) as (place, worker, network):
        worker.process.send_signal(signal.SIGTERM)
        if answered:
            network.release()
        status = worker.process.wait(TASK_TIMEOUT + SHORTLY)
        counts = place.queued()
        network.release()
        place.worker(*RATE)
        place.slow(0)

        assert status == 0
        assert [unsettled for _ready, unsettled in counts.values()] == [0] * 4
        if answered:
            left = 2 if moment.reach in (waiting, after_its_get) else 1
            assert counts == NOTHING | {QUEUES.bulk: (left, 0)}
        assert_each_done_once(place, moment.add_ons)
        assert deaths(place) == []


@pytest.fixture(scope="module")
def killed(
    private: servers.Servers, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Future[None]]:
    """Workers that are killed, at the same time."""
    plays = {name: partial(die, moment, private) for name, moment in MOMENTS.items()}
    return at_once(private, tmp_path_factory.mktemp("killed"), plays)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_worker_that_is_killed(killed: dict[str, Future[None]], moment: str) -> None:
    """Every row is written once, the budget holds over the restart, only what ran counts."""
    killed[moment].result()


@pytest.fixture(scope="module")
def stopped(
    private: servers.Servers, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Future[None]]:
    """Workers that are told to stop, at the same time."""
    plays = {name: partial(stop, moment, private) for name, moment in MOMENTS.items()}
    for name in SILENT:
        plays[f"{name}, unanswered"] = partial(stop, MOMENTS[name], private, answered=False)
    return at_once(private, tmp_path_factory.mktemp("stopped"), plays)


@pytest.mark.parametrize("moment", [*MOMENTS, *(f"{name}, unanswered" for name in SILENT)])
def test_a_worker_that_is_told_to_stop(stopped: dict[str, Future[None]], moment: str) -> None:
    """It finishes what it runs, or gives it up in time where a server does not answer; exits 0.

    What it holds for a start that has not begun goes back.
    """
    stopped[moment].result()


def test_a_worker_that_is_told_twice(place: Place) -> None:
    """It ends at once, and RabbitMQ has its message again."""
    simple_addons(place.shop, 2)
    manager = Manager()
    with manager.socket:
        worker = place.worker(*FAST, NOTIFY_SOCKET=manager.name)
        place.slow(5)
        place.publish(chunk(1), chunk(2))
        eventually(place.writing, "the write runs")

        worker.process.send_signal(signal.SIGTERM)
        manager.until("STOPPING=1")
        worker.process.send_signal(signal.SIGTERM)

        assert worker.process.wait(SHORTLY) == -signal.SIGTERM
    eventually(lambda: place.queued() == NOTHING | {QUEUES.bulk: (2, 0)}, "both are in the lane")
    place.slow(0)
    place.worker(*FAST)
    assert_each_done_once(place, 2)


@pytest.mark.parametrize("gather_seconds", [0, 20])
def test_two_workers_never_write_the_same_chunk(make_place: MakePlace, gather_seconds: int) -> None:
    """Each takes its part, in its turn."""
    place = make_place(gather_seconds=gather_seconds)
    simple_addons(place.shop, 60)
    for _ in range(2):
        place.worker("--rate-limit", "20/s")
    eventually(lambda: len(place.reasons()) == 2 and says(place, "nothing queued"), "both wait")

    place.publish(*(chunk(addon) for addon in range(1, 61)))

    assert_each_done_once(place, 60)
    assert place.charged() == 60 if gather_seconds == 0 else place.charged() < 60
    assert rows(place.shop, "SELECT COUNT(DISTINCT session) FROM audit") == [(2,)]


def test_a_chunk_that_comes_five_times(place: Place) -> None:
    """It costs one start, and all five are settled."""
    simple_addons(place.shop, 3)
    place.publish(*[chunk(1, 2, 3)] * 5)
    place.worker(*FAST)

    assert_each_done_once(place, 3)
    assert place.charged() == 1


# What nobody should send.

BAD = {
    "no JSON": b"\x80\x04nothing to unpickle",
    "protocol 1": json.dumps({"id": "1", "task": TASK, "args": [[1]], "kwargs": {}}).encode(),
    "too many": chunk(*range(1, 1002)),
    "huge": b"[[[" + b"1," * 5_000_000 + b"1]], {}, null]",
    "deep": b"[" * 100_000,
    "a keyword": b'[[[1]], {"ids": [1]}, null]',
    "a text": b'[["1; DROP TABLE addons"], {}, null]',
    "a text for an id": b'[[["1; DROP TABLE addons"]], {}, null]',
    "a fraction": b"[[[1.0]], {}, null]",
    "nothing": b"[[[null]], {}, null]",
    "true": b"[[[true]], {}, null]",
    "not a number": b"[[[NaN]], {}, null]",
    "zero": chunk(0),
    "below it": chunk(-1),
    "beyond an id": chunk(2**32),
}


def test_what_nobody_should_send_becomes_dead_letters(place: Place) -> None:
    """Each with its reason in a line; no start is charged, no table touched, the worker lives."""
    simple_addons(place.shop, 1)
    tables = "CHECKSUM TABLE addons, versions, files"
    before = rows(place.shop, tables)
    worker = place.worker(*FAST)

    place.publish(*BAD.values())
    eventually(lambda: place.queued() == NOTHING | {QUEUES.dead: (len(BAD), 0)}, "all are dead")

    assert (rows(place.shop, tables), place.written(), place.charged()) == (before, [], 0)
    listed = place.run("dead", "list", "--json").stdout.splitlines()
    reasons = [json.loads(letter)["reason"] for letter in listed]
    assert len(reasons) == len(BAD)
    assert [one for one in reasons if not re.fullmatch(r"expected [ -~…]{10,250}", one)] == []
    assert sorted(place.take(QUEUES.dead)) == sorted(BAD.values())
    place.publish(chunk(1))
    assert_each_done_once(place, 1)
    assert worker.process.poll() is None


# Again and again.

VIOLENT_SECONDS = 180
LIFE_SECONDS = 2
LEAST_GAP_OF_MANY = 0.49  # seconds


@pytest.mark.timeout(2 * VIOLENT_SECONDS + 120)
def test_healthy_chunks_through_three_minutes_of_kills(make_place: MakePlace) -> None:
    """No dead letter, however often their workers die; every row is right, the budget kept."""
    place = make_place(chunk_size=100)  # each is a start: they last as long as the kills
    place.backlog(300, 100)
    execute(place.shop, *NOTED)
    until = time.monotonic() + VIOLENT_SECONDS

    for life in itertools.count():
        if time.monotonic() >= until:
            break
        worker = place.worker("--rate-limit", "2/s")
        # How long it lives is what is tested: the deaths fall on all moments of an interval.
        time.sleep(LIFE_SECONDS + life % 10 * 0.05)
        worker.end()
    place.worker("--rate-limit", "2/s")

    within(VIOLENT_SECONDS, place.all_done, "the rest is done")
    assert_each_done_once(place, 30_000, killed_anywhere=True)
    assert deaths(place), "no worker died in a run: the test shows nothing"
    assert min(gaps(place, "charge")) >= LEAST_GAP_OF_MANY, gaps(place, "charge")
