"""Faults at random, on all sides of a few workers, while messages keep coming."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from itertools import chain
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, NamedTuple

import psutil

from aioworker.addresses import BrokerAddress
from aioworker.errors import BrokerError
from aioworker.mysql.session import LOCK_WAIT_SECONDS
from aioworker.rabbitmq.publisher import Publisher
from support import servers
from tests.conftest import Worker, execute, rows, simple_addons
from tests.faults.conftest import alarmed, away, frozen, within
from tests.faults.mixture import SIZE, Message
from tests.faults.proxy import Proxy
from tests.place import Place

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

RATE = ("--rate-limit", "4/s")
TERMS = {
    "AIOWORKER_CONNECT_TIMEOUT": "3",
    "AIOWORKER_TASK_TIMEOUT": "6",
    "AIOWORKER_MAX_RETRIES": "50",  # a fault may cost attempts, never a message
}
LASTING = 2  # workers that live through it all
PUBLISH_SECONDS = 0.4
PUBLISHER_SECONDS = 3
ROW_SECONDS = 0.002  # so that faults strike in the middle of a write
LULL_SECONDS = 4.0
LONGEST_SECONDS = 8.0
STOP_SECONDS = 60
DELAY_SECONDS = 0.1
LOCKED = 5  # messages

SESSIONS = (
    "SELECT id FROM information_schema.processlist WHERE db = DATABASE() AND id <> CONNECTION_ID()"
)

_REFUSE = (
    "CREATE TABLE refused (id INT PRIMARY KEY)",
    "CREATE TRIGGER refuse BEFORE UPDATE ON addons FOR EACH ROW"
    " IF EXISTS (SELECT 1 FROM refused WHERE id = NEW.id)"
    " THEN SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'not this one'; END IF",
)
_STARTS = f"SELECT MIN(at) FROM audit GROUP BY session, (addon - 1) DIV {SIZE} ORDER BY 1"
Fault = Callable[[float], None]


class Resources(NamedTuple):
    """What a process holds."""

    files: int
    threads: int

    @classmethod
    def of(cls, worker: Worker) -> Resources:
        """Count a worker's."""
        process = psutil.Process(worker.process.pid)
        return cls(process.num_fds(), process.num_threads())


class Soak:
    """A place with three workers, two of them behind networks of their own; `end` ends it.

    Args:
        private: The run's servers.
        folder: Where it happens.
        seed: Of the faults.
        messages: What is published, as far as time allows.

    Attributes:
        place: The place.
        lasting: The workers that live through it all.
        happened: How often each fault did.
        published: The messages that RabbitMQ confirmed.
        unconfirmed: How often one was not confirmed, and published again.
        stopped: How workers that were asked to stop ended.
    """

    def __init__(
        self, private: servers.Servers, folder: Path, seed: int, messages: list[Message]
    ) -> None:
        assert private.broker is not None
        assert private.maria is not None
        self._broker, self._maria = private.broker, private.maria
        self._seed = seed
        self._messages = messages
        self._over = Event()
        self._stack = ExitStack()
        self.happened: Counter[str] = Counter()
        self.published: list[Message] = []
        self.unconfirmed = 0
        self.stopped: list[int] = []
        self._networks = [
            tuple(self._stack.enter_context(Proxy(port)) for port in self._ports)
            for _ in range(LASTING)
        ]
        self.place = Place(private, folder, chunk_size=1)  # each message fills a start
        self._stack.callback(self.place.end)
        self._fill()
        self.lasting = [self._start_behind(*networks) for networks in self._networks]
        self._mortal = self._start()

    def end(self) -> None:
        """End the workers, the place and the networks."""
        self._stack.close()

    @property
    def _ports(self) -> tuple[int, int]:
        return self._broker.port, self._maria.port

    def _fill(self) -> None:
        """Make the add-ons of all messages, some of them right, some to be refused."""
        shop, messages = self.place.shop, self._messages
        simple_addons(shop, len(messages) * SIZE)
        self.place.slow(0)
        right = ", ".join(map(str, chain(*(message.right for message in messages))))
        execute(
            shop,
            f"UPDATE addons SET current_version = id + 10000 WHERE id IN ({right})",
            "DELETE FROM audit",
            *_REFUSE,
            *(f"INSERT INTO refused VALUES ({m.refused})" for m in messages if m.refused),
        )
        self.place.slow(ROW_SECONDS)

    def _start(self, **variables: str) -> Worker:
        return self.place.worker(*RATE, **TERMS, **variables)

    def _start_behind(self, broker: Proxy, database: Proxy) -> Worker:
        urls, ports = self.place.servers, self._ports
        return self._start(
            AIOWORKER_AMQP_URL=urls.amqp_url.replace(f":{ports[0]}/", f":{broker.port}/"),
            AIOWORKER_MYSQL_URL=urls.mysql_url.replace(f":{ports[1]}/", f":{database.port}/"),
        )

    def warm_up(self, count: int) -> None:
        """Publish the first messages, before any fault."""
        asyncio.run(self._publish(count))

    def run(self, seconds: float) -> None:
        """Publish and let faults happen, on each side one at a time; mend everything."""
        with ThreadPoolExecutor() as pool:
            busy = [pool.submit(asyncio.run, self._publish(len(self._messages)))]
            busy += [pool.submit(self._strike, *side) for side in enumerate(self._sides())]
            self._over.wait(seconds)
            self._over.set()
            for one in busy:
                one.result()
        self.place.shop = self._connect()

    async def _publish(self, count: int) -> None:
        """Publish the next messages until it is over, each until it is confirmed."""
        addresses = BrokerAddress.parse_all(self.place.servers.amqp_url)
        async with Publisher(addresses, PUBLISHER_SECONDS, "soak") as publisher:
            for message in self._messages[len(self.published) :][:count]:
                while not await self._confirmed(publisher, message):
                    self.unconfirmed += 1
                self.published.append(message)
                if self._over.is_set():
                    return

    async def _confirmed(self, publisher: Publisher, message: Message) -> bool:
        await asyncio.sleep(PUBLISH_SECONDS)
        try:
            await publisher.publish(message.lane, message.outgoing())
        except BrokerError:
            return False
        return True

    def _strike(self, number: int, side: dict[str, Fault]) -> None:
        chance = random.Random(f"{self._seed} {number}")
        while not self._over.wait(chance.uniform(0, LULL_SECONDS)):
            name = chance.choice(list(side))
            side[name](chance.uniform(1, LONGEST_SECONDS))
            self.happened[name] += 1

    def _sides(self) -> list[dict[str, Fault]]:
        broker: dict[str, Fault] = {
            "broker killed": self._kill_broker,
            "broker frozen": self._freeze_broker,
            "connections closed": self._close_connections,
            "memory alarm": self._raise_alarm,
        }
        database: dict[str, Fault] = {
            "database killed": self._kill_database,
            "database frozen": self._freeze_database,
            "session killed": self._kill_session,
            "rows locked": self._lock_rows,
        }
        workers: dict[str, Fault] = {
            "worker killed": self._kill_worker,
            "worker stopped": self._stop_worker,
            "worker frozen": self._freeze_worker,
            "task paused": self._pause,
        }
        for n, (to_broker, to_database) in enumerate(self._networks):
            broker |= _network_faults(f"broker's network {n}", to_broker)
            database |= _network_faults(f"database's network {n}", to_database)
        return [broker, database, workers]

    # On RabbitMQ's side.

    def _kill_broker(self, seconds: float) -> None:
        with away(self._broker, self._broker.kill):
            time.sleep(seconds)

    def _freeze_broker(self, seconds: float) -> None:
        with frozen(self._broker):
            time.sleep(seconds)

    def _close_connections(self, _seconds: float) -> None:
        self._broker.control("close_all_connections", "--vhost", self.place.name, "soak")

    def _raise_alarm(self, seconds: float) -> None:
        with alarmed(self._broker):
            time.sleep(seconds)

    # On the database's side.

    def _connect(self) -> Connection[Cursor]:
        return servers.connect(self.place.servers.mysql_url)

    def _kill_database(self, seconds: float) -> None:
        self._maria.kill()
        time.sleep(seconds)
        self._maria.start()

    def _freeze_database(self, seconds: float) -> None:
        with closing(self._connect()) as connection:
            pid = int(Path(rows(connection, "SELECT @@pid_file")[0][0]).read_text())
        os.kill(pid, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(pid, signal.SIGCONT)

    def _kill_session(self, _seconds: float) -> None:
        with closing(self._connect()) as connection:
            for (session,) in rows(connection, f"{SESSIONS} ORDER BY RAND() LIMIT 1"):
                execute(connection, f"KILL {session}")

    def _lock_rows(self, seconds: float) -> None:
        """Lock what is published next."""
        soon = self._messages[len(self.published) :][:LOCKED]
        ids = ", ".join(map(str, chain(*(message.names for message in soon)))) or "0"
        with closing(self._connect()) as connection, connection.cursor() as cursor:
            cursor.execute(f"SELECT id FROM addons WHERE id IN ({ids}) FOR UPDATE SKIP LOCKED")
            time.sleep(LOCK_WAIT_SECONDS + seconds)  # at least one attempt fails

    # On the workers' side.

    def _kill_worker(self, _seconds: float) -> None:
        assert self._mortal.process.poll() is None
        self._mortal.process.kill()
        self._mortal.process.wait()
        self._mortal = self._start()

    def _stop_worker(self, _seconds: float) -> None:
        within(STOP_SECONDS, lambda: "worker started" in self._mortal.log, "it can be asked to")
        self._mortal.process.send_signal(signal.SIGTERM)
        self.stopped.append(self._mortal.process.wait(STOP_SECONDS))
        self._mortal = self._start()

    def _freeze_worker(self, seconds: float) -> None:
        self._mortal.process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        self._mortal.process.send_signal(signal.SIGCONT)

    def _pause(self, seconds: float) -> None:
        """Pause, as far as the database is there, and resume as soon as it is."""
        self.place.run("pause", "--reason", "soak")
        time.sleep(seconds)
        while self.place.run("resume").returncode != 0:
            time.sleep(1)

    # What is left.

    def starts(self) -> list[float]:
        """Return the moment of each start's first write, by the database's clock."""
        return [float(row[0]) for row in rows(self.place.shop, _STARTS)]

    def sessions(self) -> int:
        """Return how many connections the workers have to the database."""
        return len(rows(self.place.shop, SESSIONS))

    def connections(self) -> int:
        """Return how many they have to RabbitMQ."""
        return len(connections(self._broker, self.place))


def connections(broker: servers.Broker, place: Place) -> set[str]:
    """Return the connections to a place, by their processes in RabbitMQ."""
    listed = broker.control("list_connections", "vhost", "pid").splitlines()
    return {pid for name, pid in map(str.split, listed) if name == place.name}


def _network_faults(name: str, network: Proxy) -> dict[str, Fault]:
    def play(begin: Callable[[], None], seconds: float) -> None:
        begin()
        time.sleep(seconds)
        network.forward()

    return {
        f"{name} vanishes": partial(play, network.black_hole),
        f"{name} resets": partial(play, network.reset),
        f"{name} is slow": partial(play, partial(network.delay, DELAY_SECONDS)),
    }
