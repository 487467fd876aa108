"""Real servers for the whole run; an empty site and empty queues for each test."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import aio_pika
import pytest

from aioworker.addons import update_current_version
from aioworker.addresses import BrokerAddress, DatabaseAddress
from aioworker.budget import schema, tables
from aioworker.budget.shared import SharedBudget
from aioworker.clock import Clock
from aioworker.consumer import Consumer
from aioworker.limits import RateLimit, TaskBudget, WorkerBudget
from aioworker.mysql.database import Database
from aioworker.producer import Producer
from aioworker.rabbitmq.queues import Queues
from aioworker.rabbitmq.queues import count as count_messages
from aioworker.rabbitmq.queues import declare as declare_queue
from aioworker.status.presence import Presence
from aioworker.words import count
from aioworker.worker.session import Worker as Served
from aioworker.worker.supervisor import Supervisor
from support import servers, site
from tests.fakes import FakeClock

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

    from aioworker.tasks.task import AnyTask

AIOWORKER = Path(sys.executable).parent / "aioworker"
TASK = "update_current_version"
PREFIX = "aioworker"
QUEUES = Queues.of(TASK, PREFIX)
COMMAND_SECONDS = 60
COMMANDS = "must command"  # why a test is not run on a server that runs already
DEADLINE_SECONDS = 45
# Each message fills a start: one id to write is enough for that.
ONE_A_START = {"AIOWORKER_CHUNK_SIZE": "1"}
T = TypeVar("T")
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def pair() -> Iterator[servers.Servers]:
    """The run's RabbitMQ and MariaDB."""
    with servers.servers() as started:
        yield started


@pytest.fixture(scope="session")
def broker(pair: servers.Servers) -> servers.Broker:
    """The run's RabbitMQ, which the test may command."""
    if pair.broker is None:
        pytest.skip(f"{COMMANDS} RabbitMQ, and AIOWORKER_AMQP_URL names one that runs already")
    return pair.broker


@pytest.fixture(scope="session")
def maria(pair: servers.Servers) -> servers.Maria:
    """The run's MariaDB, which the test may command."""
    if pair.maria is None:
        pytest.skip(f"{COMMANDS} MariaDB, and AIOWORKER_MYSQL_URL names a server that runs already")
    return pair.maria


@pytest.fixture(scope="session")
def private(pair: servers.Servers, broker: servers.Broker, maria: servers.Maria) -> servers.Servers:
    """The run's servers, where the test may command both."""
    return pair


def summary(messages: int, starts: int | None = None, *, dead_letters: int = 0) -> str:
    """Return what a burst says at its end, of one start for each message where none is given."""
    begun = messages if starts is None else starts
    return (
        f"done {count(messages, 'message')} in {count(begun, 'start')};"
        f" dead letters {dead_letters}, to retry 0, given back 0\n"
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List what was not run, since it must command a server that was not started for it."""
    left = {
        report.nodeid: report.longrepr[2].removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", [])
        if isinstance(report.longrepr, tuple) and COMMANDS in report.longrepr[2]
    }
    if left:
        terminalreporter.section(f"not run: {len(left)}")
    for reason in sorted(set(left.values())):
        terminalreporter.line(f"{reason}:")
        for test in sorted(test for test in left if left[test] == reason):
            terminalreporter.line(f"  {test}")


@pytest.fixture
async def clock() -> FakeClock:
    """The time of the test's event loop, moved by the test."""
    return FakeClock(asyncio.get_running_loop())


@pytest.fixture
def shop(pair: servers.Servers) -> Iterator[Connection[Cursor]]:
    """A connection to the site's database, its tables empty."""
    connection = servers.connect(pair.mysql_url, create=True)
    site.create(connection)
    with connection.cursor() as cursor:
        for statement in (*schema.STATEMENTS.values(), tables.FIRST_ROW % {"task": f"'{TASK}'"}):
            cursor.execute(statement)
    connection.commit()
    yield connection
    connection.close()


@pytest.fixture
async def lanes(pair: servers.Servers) -> AsyncIterator[Lanes]:
    """The main job's queues, declared and empty."""
    connection = await aio_pika.connect(pair.amqp_url, timeout=10)
    await declare(connection)
    found = Lanes(connection, await connection.channel())
    await found.purge()
    yield found
    await connection.close()


async def declare(
    connection: aio_pika.abc.AbstractConnection,
    queues: Queues = QUEUES,
    queue_type: str = "quorum",
) -> None:
    """Declare a task's queues, as `init` does but for its wait."""
    for name, arguments in queues.arguments(queue_type).items():
        await declare_queue(connection, name, arguments, 10)


class Lanes:
    """The main job's queues as a test looks at them."""

    def __init__(
        self, connection: aio_pika.abc.AbstractConnection, channel: aio_pika.abc.AbstractChannel
    ) -> None:
        self.connection = connection
        self.channel = channel

    async def purge(self) -> None:
        """Empty them."""
        for name in (QUEUES.bulk, QUEUES.urgent, QUEUES.retry, QUEUES.dead):
            await (await self.channel.get_queue(name, ensure=False)).purge()

    async def count(self, name: str) -> int:
        """Return how many messages wait in a queue."""
        return await count_messages(self.connection, name, 10) or 0

    async def holds(self, name: str, messages: int) -> bool:
        """Return whether so many messages wait in a queue: RabbitMQ counts them a moment later."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while await self.count(name) != messages:
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(0.02)
        return True

    async def send(self, body: bytes, lane: str = QUEUES.bulk, **properties: Any) -> None:
        """Publish bytes as they are, by default with the headers of a task's message."""
        properties.setdefault("headers", {"task": TASK, "id": "test"})
        message = aio_pika.Message(body, delivery_mode=2, **properties)
        await self.channel.default_exchange.publish(message, lane)

    async def take(self, name: str) -> aio_pika.abc.AbstractIncomingMessage:
        """Take one message for good."""
        queue = await self.channel.get_queue(name, ensure=False)
        return await queue.get(no_ack=True, timeout=10)


@pytest.fixture
async def stop() -> asyncio.Event:
    """What tells a consumer to stop; not set."""
    return asyncio.Event()


@pytest.fixture
async def database(pair: servers.Servers) -> AsyncIterator[Database]:
    """The database as the worker uses it."""
    made = make_database(pair)
    yield made
    made.close()


def make_database(
    pair: servers.Servers, kind: type[Database] = Database, timeout: float = 30.0
) -> Database:
    """Make a database, or one of a kind that does something in between."""
    address = DatabaseAddress.parse(pair.mysql_url)
    return kind(address, connect_timeout=10, timeout=timeout)


class InProcess(Supervisor):
    """A worker in the test's own event loop."""

    @property
    def consumer(self) -> Consumer:
        """What takes its deliveries through their lives."""
        return self.worker.consumer


def make_worker(  # noqa: PLR0913 - each has a default, and a test names what it is about
    pair: servers.Servers,
    database: Database,
    *,
    task: AnyTask = update_current_version,
    rate_limit: str | None = None,
    burst: bool = True,
    task_timeout: float = 30,
    clock: Clock | None = None,
    keeps_row: bool = False,
    max_retries: int = 5,
) -> InProcess:
    """Make a worker that ends once the lanes are empty."""
    budget: TaskBudget = WorkerBudget(None)
    if rate_limit is not None:
        budget = SharedBudget(database, task.name, RateLimit.parse(rate_limit), "test", clock)
    where = database if keeps_row else None
    presence = Presence(task.name, "test", 1, None, lambda _doing: None, where)
    nodes = BrokerAddress.parse_all(pair.amqp_url)
    worker = Served.of(
        "test",
        task,
        database,
        budget,
        presence,
        timeout=10,
        task_timeout=task_timeout,
        max_retries=max_retries,
        burst=burst,
    )
    return InProcess(worker, nodes, Queues.of(task.name, PREFIX), 10, f"test {task.name}")


def database_name(pair: servers.Servers) -> str:
    """Return the name of the tests' database."""
    return DatabaseAddress.parse(pair.mysql_url).database


def make_producer(pair: servers.Servers) -> Producer:
    """Make a producer."""
    return Producer(pair.amqp_url, timeout=10)


@pytest.fixture
def run(pair: servers.Servers, tmp_path: Path) -> Run:
    """Run the installed command in an empty folder and wait for its end."""

    def run_command(*arguments: str, text: str = "", **variables: str) -> Any:
        return subprocess.run(
            [AIOWORKER, *arguments],
            env=pair.environment | variables,
            cwd=tmp_path,
            input=text,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )

    return run_command


class Worker:
    """A running `aioworker`, its log in a file."""

    command: tuple[str, ...] = (str(AIOWORKER),)

    def __init__(self, pair: servers.Servers, folder: Path, *arguments: str, **variables: str):
        self.folder = folder
        self._log = folder / "worker.log"
        self._file = self._log.open("a")
        self.process = subprocess.Popen(
            [*self.command, *arguments],
            env=pair.environment | variables,
            cwd=folder,
            stdout=self._file,
            stderr=subprocess.STDOUT,
        )

    @property
    def log(self) -> str:
        """What it has printed so far."""
        return self._log.read_text()

    def end(self) -> None:
        """End it, whatever state it is in."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._file.close()


class ModuleWorker(Worker):
    """The same by `python -m aioworker`."""

    command = (sys.executable, "-m", "aioworker")


@pytest.fixture
def start(pair: servers.Servers, tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    """Start commands that are ended with the test."""
    workers: list[Worker] = []

    def start_worker(*arguments: str, kind: type[Worker] = Worker, **variables: str) -> Worker:
        folder = tmp_path / str(len(workers))
        folder.mkdir()
        workers.append(kind(pair, folder, *arguments, **variables))
        return workers[-1]

    yield start_worker
    for worker in workers:
        worker.end()


def importable(folder: Path) -> str:
    """Return a PYTHONPATH with which a command imports modules of a folder."""
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


def eventually(holds: Callable[[], T], what: str) -> T:
    """Wait until something holds, and return it; fail at the deadline."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (found := holds()):
        assert time.monotonic() < deadline, f"not within {DEADLINE_SECONDS} s: {what}"
        time.sleep(0.02)
    return found


def rows(connection: Connection[Cursor], statement: str, *args: object) -> list[tuple[Any, ...]]:
    """Read rows as they are now."""
    with connection.cursor() as cursor:
        cursor.execute(statement, args or None)
        found = list(cursor.fetchall())
    connection.commit()
    return found


# What each version of aioworker that had other tables made them by, and said to them.
EARLIER = sorted((Path(__file__).parent / "data/schema").iterdir())


def make_tables(connection: Connection[Cursor], version: Path) -> None:
    """Put the tables of an earlier version, empty, in the place of those that are there."""
    execute(connection, f"DROP TABLE {', '.join(schema.NAMES)}")
    execute(connection, *filter(str.strip, (version / "tables.sql").read_text().split(";\n")))


def execute(connection: Connection[Cursor], *statements: str) -> None:
    """Run statements and commit."""
    with connection.cursor() as cursor:
        for statement in statements:
            cursor.execute(statement)
    connection.commit()


def current_versions(connection: Connection[Cursor]) -> dict[int, int | None]:
    """Return every add-on's current version."""
    return dict(rows(connection, "SELECT id, current_version FROM addons ORDER BY id"))


def simple_addons(connection: Connection[Cursor], count: int) -> None:
    """Insert add-ons 1 to *count*, stale: each has public version id + 10000, none current."""
    values = [(n, n + 10_000) for n in range(1, count + 1)]
    with connection.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO addons (id, addontype_id, status, created, modified)"
            " VALUES (%s, 1, 4, '2009-01-01', '2010-05-25')",
            [value[:1] for value in values],
        )
        cursor.executemany(
            "INSERT INTO versions (addon_id, id, version, created, modified)"
            " VALUES (%s, %s, '1.0', '2010-01-01', '2010-01-01')",
            values,
        )
        cursor.executemany(
            "INSERT INTO files (version_id, status) VALUES (%s, 4)", [v[1:] for v in values]
        )
    connection.commit()
