"""A worker that gathers is killed, stopped or cut off, at each step and many times.

Judged by the rows, by triggers that note every write of them and of the budget's row, by exit
statuses, and by the queues themselves.
"""

from __future__ import annotations

import asyncio
import math
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, NamedTuple

import aio_pika
import pytest

from aioworker.budget.deaths import MOST_DEATHS
from aioworker.rabbitmq.queues import DELIVERY_LIMIT
from support import servers
from tests.conftest import (
    DEADLINE_SECONDS,
    QUEUES,
    TASK,
    Worker,
    eventually,
    execute,
    rows,
    simple_addons,
)
from tests.deadly import DEADLY_ADDON, STATUS
from tests.faults.conftest import MakePlace, within
from tests.faults.moments import assert_each_done_once, at_once, says
from tests.faults.proxy import BASIC_ACK, BASIC_GET, Proxy
from tests.faults.soak import SESSIONS
from tests.faults.test_worker import NOTED, gaps
from tests.place import NOTHING, Place, chunk

LEAST_GAP = 0.98  # of an interval
# One attempt that counted would be the last.
TERMS = {"AIOWORKER_GATHER_SECONDS": "20", "AIOWORKER_MAX_RETRIES": "0"}
RETRY_MS = 200
ROUNDS = 4  # of each fault at each step
STOP_SECONDS = 40
LIFE_SECONDS = 120
# Those that it holds others with, halved each time; it is noted as of the fourth. Then those alone.
MOST_LIVES = 6 + MOST_DEATHS + 1
# One that began before all were there, the first that failed, those that others need further.
MOST_FOR_FIFTY = 2 + (2 * math.log2(50) + 2)
MOST_STARTS = 3  # of a round, on average: its messages would take seven, one by one
# The messages of a round, by lane and by number of add-on; the last round's last one is right.
ADD_ONS = 6
MESSAGES = (
    (QUEUES.urgent, [1]),
    (QUEUES.urgent, [2]),
    (QUEUES.bulk, [3, 4]),
    (QUEUES.bulk, [0]),
    (QUEUES.bulk, [4, 2]),
    (QUEUES.bulk, [5]),
    (QUEUES.bulk, [6]),
    (QUEUES.bulk, [6]),
)
ALONE = {"timelimit": [20, None]}  # a time limit of its own


class Step(NamedTuple):
    """Where a worker is, with messages in hand.

    Args:
        server: To which one it is held.
        pattern: At what, before the server has it.
        times: How often it sends that until then.
        charged: Whether their start is charged by then, or about to be.
        waits: Whether their start is not due: another one was just before.
        interval: Seconds between two starts.
    """

    server: str
    pattern: bytes
    times: int = 1
    charged: bool = False
    waits: bool = False
    interval: float = 1.2


BULK_GET = BASIC_GET + bytes([0, 0, len(QUEUES.bulk)]) + QUEUES.bulk.encode()
STEPS = {
    "after the first take": Step("broker", BULK_GET, times=2),
    "in the read": Step("database", b"FROM JSON_TABLE('["),
    "waiting for more": Step("database", b"SET SESSION wait_timeout = 10", waits=True, interval=3),
    "before the charge": Step("database", b"starts = starts + 1", charged=True),
    "in the run": Step("database", b"JSON_TABLE('[[", charged=True),
    "before the acknowledgements": Step("broker", BASIC_ACK, times=3, charged=True),
}


class Gathering:
    """A place with one worker, behind networks that hold it at a step.

    Args:
        private: The run's servers.
        make: Makes the place.
        networks: What lies between the worker and its servers.
        step: The step.
        rounds: How many there will be.

    Attributes:
        place: The place.
        worker: The worker that lives.
        done: The last add-on that is to be right; all before it are, too.
    """

    def __init__(
        self,
        private: servers.Servers,
        make: MakePlace,
        networks: dict[str, Proxy],
        step: Step,
        rounds: int,
    ) -> None:
        assert private.broker is not None
        self._broker, self._networks, self._step = private.broker, networks, step
        self._charged = 0
        self.place = make(
            retry_ms=RETRY_MS,
            amqp_port=networks["broker"].port,
            mysql_port=networks["database"].port,
        )
        simple_addons(self.place.shop, 1 + rounds * ADD_ONS)
        execute(self.place.shop, *NOTED)
        self.worker = self._start()
        self.place.publish(chunk(1))
        self.done = 1
        self.settle()

    def _start(self) -> Worker:
        """Start a worker in the place of one that has ended."""
        execute(self.place.shop, "DELETE FROM aioworker_worker")
        rate = f"{60 / self._step.interval:g}/m"
        return self.place.worker("--rate-limit", rate, **TERMS)

    def settle(self) -> None:
        """Wait until all is done."""
        eventually(lambda: self.place.done() == self.done, "all is done")
        eventually(lambda: says(self.place, "nothing queued"), "it is idle")

    def reach(self) -> None:
        """Hold the worker at the step, for the messages of the next round."""
        step = self._step
        held = self._networks[step.server].hold_at(step.pattern, step.times)
        asyncio.run(self._publish())
        self.done += ADD_ONS
        assert held.wait(DEADLINE_SECONDS)
        self._charged = self.place.charged()
        if step.waits:
            self.release()  # the wait begins with that

    async def _publish(self) -> None:
        waits = self._step.waits
        async with await aio_pika.connect(self.place.servers.amqp_url) as connection:
            channel = await connection.channel()
            for number, (lane, add_ons) in enumerate(MESSAGES):
                # The first one has a start to itself, if another one is to wait.
                before, lane = waits and number == 0, QUEUES.bulk if waits else lane
                headers: dict[str, Any] = {"task": TASK, "id": f"{self.done}.{number}"}
                message = aio_pika.Message(
                    chunk(*(self.done + add_on for add_on in add_ons)),
                    delivery_mode=2,
                    headers=headers | (ALONE if before else {}),
                )
                await channel.default_exchange.publish(message, lane)

    def release(self) -> None:
        """Let the worker go on, if it lives."""
        for network in self._networks.values():
            network.release()

    def _assert_uncharged(self) -> None:
        """No start was charged, if the worker has died before that."""
        if not self._step.charged:
            assert self.place.charged() == self._charged

    # What strikes it.

    def kill(self) -> None:
        """End it by `kill -9`; another one begins."""
        self.worker.end()
        self.release()
        self._assert_uncharged()
        self.worker = self._start()

    def terminate(self) -> None:
        """Ask it to end; another one begins."""
        self.worker.process.send_signal(signal.SIGTERM)
        self.release()
        assert self.worker.process.wait(STOP_SECONDS) == 0
        self._assert_uncharged()
        self.worker = self._start()

    def reload(self) -> None:
        """Ask it to replace itself."""
        lives = self.worker.log.count("worker started")
        self.worker.process.send_signal(signal.SIGHUP)
        self.release()
        within(
            STOP_SECONDS, lambda: self.worker.log.count("worker started") > lives, "it is replaced"
        )

    def close_connections(self) -> None:
        """Have RabbitMQ close its connections."""
        self._broker.control("close_all_connections", "--vhost", self.place.name, "a fault")
        self.release()

    def end_sessions(self) -> None:
        """Have the database end its session."""
        for (session,) in rows(self.place.shop, SESSIONS):
            execute(self.place.shop, f"KILL {session}")
        self.release()


FAULTS: tuple[Callable[[Gathering], None], ...] = (
    Gathering.kill,
    Gathering.terminate,
    Gathering.reload,
    Gathering.close_connections,
    Gathering.end_sessions,
)


def strike(step: Step, private: servers.Servers, make: MakePlace) -> None:
    """Let each fault happen at a step, again and again."""
    assert private.broker is not None
    assert private.maria is not None
    rounds = ROUNDS * len(FAULTS)
    with Proxy(private.maria.port) as database, Proxy(private.broker.port) as broker:
        networks = {"database": database, "broker": broker}
        gathering = Gathering(private, make, networks, step, rounds)
        place = gathering.place
        for fault in FAULTS * ROUNDS:
            gathering.reach()
            fault(gathering)
            gathering.settle()

        assert_each_done_once(place, gathering.done, killed_anywhere=True)
        assert place.charged() <= 1 + MOST_STARTS * rounds
        charges, writes = gaps(place, "charge"), gaps(place, "wrote")
        assert len(charges) == place.charged() - 1
        assert min(charges) >= LEAST_GAP * step.interval, charges
        assert min(writes) >= LEAST_GAP * step.interval, writes


@pytest.fixture(scope="module")
def struck(
    private: servers.Servers, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Future[None]]:
    """Workers that are struck at their steps, at the same time."""
    plays = {name: partial(strike, step, private) for name, step in STEPS.items()}
    return at_once(private, tmp_path_factory.mktemp("struck"), plays)


@pytest.mark.timeout(600)  # the first of them waits for all
@pytest.mark.parametrize("step", STEPS)
def test_a_worker_that_gathers_is_struck_again_and_again(
    struck: dict[str, Future[None]], step: str
) -> None:
    """Each row is written once, nothing is lost, no innocent is set aside, the rate holds."""
    struck[step].result()


async def come_back(place: Place, messages: int, times: int) -> None:
    """Have RabbitMQ take back messages so many times from who holds them, as from a dead worker."""
    async with await aio_pika.connect(place.servers.amqp_url) as connection:
        for _ in range(times):
            async with await connection.channel() as channel:
                lane = await channel.get_queue(QUEUES.bulk, ensure=False)
                for _ in range(messages):
                    await lane.get()


def test_what_came_back_a_hundred_times_is_set_aside_by_nobody(place: Place) -> None:
    """RabbitMQ would do so when a worker dies once more that holds it."""
    simple_addons(place.shop, 20)
    place.publish(*(chunk(addon) for addon in range(1, 21)))
    asyncio.run(come_back(place, 20, DELIVERY_LIMIT))
    execute(place.shop, "UPDATE aioworker_budget SET last_start = SYSDATE(6)")
    worker = place.worker("--rate-limit", "4/m", **TERMS)
    eventually(lambda: says(place, "gathering: 20 messages, 20 ids"), "it holds all")

    worker.end()
    execute(place.shop, "DELETE FROM aioworker_worker")
    place.worker("--rate-limit", "4/m", **TERMS)

    assert_each_done_once(place, 20)
    assert place.charged() <= 5


# One of them ends its process, or fails.


def live(place: Place, deadly: str) -> int:
    """Run a deadly worker until it dies, or the lanes are empty; return its exit status."""
    return subprocess.run(
        [sys.executable, "-m", "tests.deadly", "consume", "--burst", "--rate-limit", "40/m"],
        env=place.servers.environment | TERMS | {"DEADLY": deadly},
        cwd=servers.ROOT,
        capture_output=True,
        timeout=LIFE_SECONDS,
        check=False,
    ).returncode


@pytest.mark.timeout(400)
@pytest.mark.parametrize("deadly", ["run", "raise", "read"])
def test_one_of_fifty_ends_its_process_or_fails(place: Place, deadly: str) -> None:
    """It is set aside once it has done so often enough alone, and the others are done."""
    simple_addons(place.shop, 50)
    place.publish(*(chunk(addon) for addon in range(1, 51)))
    lives = [live(place, deadly)]
    while lives[-1] == STATUS and len(lives) < MOST_LIVES:
        lives.append(live(place, deadly))

    assert lives[-1] == 1, "a burst with a dead letter"
    assert sorted(place.written()) == [n for n in range(1, 51) if n != DEADLY_ADDON]
    assert place.take(QUEUES.dead) == [chunk(DEADLY_ADDON)]
    assert place.queued() == NOTHING
    assert rows(place.shop, "SELECT message FROM aioworker_run") == []
    if deadly != "read":  # whoever may have ended the process by that is read alone
        assert place.charged() <= MOST_FOR_FIFTY + (MOST_DEATHS if deadly == "run" else 1)
