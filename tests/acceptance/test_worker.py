"""The worker as it runs: started, stopped, watched by a service manager."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import aio_pika
import psutil
import pytest

from aioworker.logs import ConsoleFormatter, JournalFormatter
from aioworker.worker.session import IDLE_SECONDS
from support import servers
from tests.conftest import (
    AIOWORKER,
    COMMAND_SECONDS,
    ONE_A_START,
    QUEUES,
    Lanes,
    Run,
    Worker,
    current_versions,
    eventually,
    execute,
    importable,
    rows,
    simple_addons,
)

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

Start = Callable[..., Worker]


def running_writes(shop: Connection[Cursor]) -> int:
    """Count the worker's writes that the server is running."""
    statement = (
        "SELECT COUNT(*) FROM information_schema.processlist"
        " WHERE info LIKE 'UPDATE /* aioworker update_current_version */ JSON_TABLE(''[[%'"
    )
    return int(rows(shop, statement)[0][0])


async def slow_chunk(shop: Connection[Cursor], lanes: Lanes, milliseconds: int) -> None:
    """Queue a chunk whose one write takes a while, and another behind it."""
    simple_addons(shop, 2)
    execute(
        shop,
        "CREATE TRIGGER slow BEFORE UPDATE ON addons FOR EACH ROW"
        f" SET NEW.modified = IF(SLEEP({milliseconds / 1000}), NEW.modified, NEW.modified)",
    )
    await lanes.send(json.dumps([[[1]], {}, None]).encode())
    await lanes.send(json.dumps([[[2]], {}, None]).encode())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_lets_the_running_chunk_finish(
    start: Start, shop: Connection[Cursor], lanes: Lanes, number: signal.Signals
) -> None:
    """No new one is begun, nothing is left unsettled, and the exit status is 0."""
    await slow_chunk(shop, lanes, 1500)
    worker = start("consume", "--rate-limit", "100/s", **ONE_A_START)
    eventually(lambda: running_writes(shop), "the write runs")

    worker.process.send_signal(number)

    assert worker.process.wait(30) == 0
    assert current_versions(shop) == {1: 10_001, 2: None}
    assert await lanes.holds(QUEUES.bulk, 1)
    assert "Traceback" not in worker.log


async def test_a_second_signal_ends_it_at_once_and_loses_nothing(
    start: Start, run: Run, shop: Connection[Cursor], lanes: Lanes
) -> None:
    await slow_chunk(shop, lanes, 60_000)
    worker = start("consume", "--rate-limit", "100/s", **ONE_A_START)
    eventually(lambda: running_writes(shop), "the write runs")

    worker.process.send_signal(signal.SIGTERM)
    eventually(lambda: "draining" in worker.log, "it drains")
    worker.process.send_signal(signal.SIGTERM)

    assert worker.process.wait(30) == -signal.SIGTERM
    eventually(lambda: not running_writes(shop), "the server ended the write")
    execute(shop, "DROP TRIGGER slow")
    assert run("consume", "--burst", AIOWORKER_RATE_LIMIT="100/s").returncode == 0
    assert current_versions(shop) == {1: 10_001, 2: 10_002}


async def test_a_chunk_that_outlasts_the_shutdown_timeout_is_given_back(
    start: Start, run: Run, shop: Connection[Cursor], lanes: Lanes
) -> None:
    """Its statement is ended on the server too, and the exit status says that not all is well."""
    await slow_chunk(shop, lanes, 30_000)
    hurried = {"AIOWORKER_SHUTDOWN_TIMEOUT": "1"} | ONE_A_START
    worker = start("consume", "--rate-limit", "100/s", **hurried)
    eventually(lambda: running_writes(shop), "the write runs")

    worker.process.send_signal(signal.SIGTERM)

    assert worker.process.wait(30) == 1
    assert running_writes(shop) == 0
    assert await lanes.holds(QUEUES.bulk, 2)
    assert current_versions(shop) == {1: None, 2: None}


async def test_a_run_that_takes_too_long_is_cut_off_and_put_off(
    start: Start, shop: Connection[Cursor], lanes: Lanes
) -> None:
    """It waits a minute in the retry queue, and its next attempt is counted."""
    await slow_chunk(shop, lanes, 3000)
    hurried = {"AIOWORKER_TASK_TIMEOUT": "1"} | ONE_A_START
    worker = start("consume", "--rate-limit", "100/s", **hurried)

    eventually(lambda: worker.log.count('was cut off" of=6') == 2, "both runs are cut off")

    copies = [await lanes.take(QUEUES.retry) for _ in range(2)]
    assert [copy.headers["retries"] for copy in copies] == [1, 1]
    assert await lanes.count(QUEUES.bulk) == 0
    assert current_versions(shop) == {1: None, 2: None}


async def test_an_idle_worker_notices_a_message_within_a_second(
    start: Start, run: Run, shop: Connection[Cursor], lanes: Lanes
) -> None:
    simple_addons(shop, 1)
    worker = start("consume")
    eventually(lambda: "nothing queued" in worker.log, "it is idle")

    await lanes.send(json.dumps([[[1]], {}, None]).encode())
    sent = time.monotonic()
    eventually(lambda: current_versions(shop)[1], "the change is made")

    assert time.monotonic() - sent < 5  # a busy machine may be late; the worker itself is not
    assert IDLE_SECONDS <= 1
    assert worker.process.poll() is None


async def test_a_rate_of_nothing_pauses_it_and_a_signal_still_ends_it(
    start: Start, run: Run, shop: Connection[Cursor], lanes: Lanes
) -> None:
    """Nothing is taken; a burst does not wait for what may never come."""
    simple_addons(shop, 1)
    await lanes.send(json.dumps([[[1]], {}, None]).encode())

    worker = start("consume", "--rate-limit", "0/m")
    eventually(lambda: "paused: rate limit 0/m" in worker.log, "it says so")
    burst = run("consume", "--burst", "--rate-limit", "0/m")
    worker.process.send_signal(signal.SIGTERM)

    assert worker.process.wait(30) == 0
    assert (burst.returncode, burst.stdout) == (1, "")
    assert burst.stderr.endswith("aioworker: paused: rate limit 0/m\n")
    assert await lanes.holds(QUEUES.bulk, 1)
    assert current_versions(shop) == {1: None}


async def test_it_waits_for_servers_that_are_not_there_and_says_so(start: Start) -> None:
    """What is down at three in the morning may come back."""
    no_broker = start("consume", AIOWORKER_AMQP_URL="amqp://127.0.0.1:1/")

    eventually(lambda: "cannot connect to RabbitMQ" in no_broker.log, "it says so")
    assert no_broker.process.poll() is None
    no_broker.process.send_signal(signal.SIGTERM)

    assert no_broker.process.wait(30) == 0


async def test_it_waits_for_its_queues_and_goes_on_when_they_are_declared(
    start: Start, run: Run, broker: servers.Broker, shop: Connection[Cursor]
) -> None:
    simple_addons(shop, 1)
    broker.control("add_vhost", "later")
    broker.control("set_permissions", "-p", "later", "guest", ".*", ".*", ".*")
    url = broker.url("later")
    try:
        worker = start("consume", AIOWORKER_AMQP_URL=url)
        eventually(lambda: "run `aioworker init`" in worker.log, "it says what is missing")
        assert run("init", AIOWORKER_AMQP_URL=url).returncode == 0
        assert run("publish", "1", AIOWORKER_AMQP_URL=url).returncode == 0

        eventually(lambda: current_versions(shop)[1], "the change is made")
        worker.process.send_signal(signal.SIGTERM)
        assert worker.process.wait(30) == 0
    finally:
        broker.control("delete_vhost", "later")


async def test_it_survives_its_connections_being_closed(
    start: Start,
    pair: servers.Servers,
    broker: servers.Broker,
    shop: Connection[Cursor],
    lanes: Lanes,
) -> None:
    """The broker's and the database's: it says so, connects again and goes on."""
    simple_addons(shop, 1)
    worker = start("consume", "--rate-limit", "100/s")
    eventually(lambda: "nothing queued" in worker.log, "it is idle")

    broker.control("close_all_connections", "test")
    for [thread] in rows(
        shop,
        "SELECT id FROM information_schema.processlist"
        " WHERE id <> CONNECTION_ID() AND command <> 'Daemon'",
    ):
        execute(shop, f"KILL {thread}")
    eventually(lambda: "connection to RabbitMQ lost" in worker.log, "it says so")
    worker_publish = await _again(pair)
    await worker_publish.send(json.dumps([[[1]], {}, None]).encode())

    eventually(lambda: current_versions(shop)[1], "the change is made")
    assert "Traceback" not in worker.log
    await worker_publish.connection.close()


async def _again(pair: servers.Servers) -> Lanes:
    """Connect anew: the test's own connection was closed too."""
    connection = await aio_pika.connect(pair.amqp_url, timeout=10)
    return Lanes(connection, await connection.channel())


class Manager:
    """Plays systemd: the socket that `NOTIFY_SOCKET` names, an abstract one."""

    def __init__(self) -> None:
        self.name = f"@aioworker-test-{os.getpid()}"
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.address)
        self.socket.settimeout(20)
        self.states: list[str] = []

    @property
    def address(self) -> str:
        """The name as sockets take it."""
        return "\0" + self.name[1:]

    def receive(self) -> None:
        """Receive the next states."""
        self.states += self.socket.recv(4096).decode().splitlines()

    def until(self, state: str) -> None:
        """Receive states up to one that begins so."""
        while not any(line.startswith(state) for line in self.states):
            self.receive()


@pytest.fixture
def manager() -> Iterator[Manager]:
    """A service manager."""
    played = Manager()
    yield played
    played.socket.close()


async def test_a_service_manager_is_told_ready_status_and_stopping(
    start: Start, manager: Manager, shop: Connection[Cursor], lanes: Lanes
) -> None:
    """What `systemctl status` shows while it works, waits and gathers."""
    simple_addons(shop, 2)
    await lanes.send(json.dumps([[[1]], {}, None]).encode())

    worker = start("consume", NOTIFY_SOCKET=manager.name)
    manager.until("STATUS=waiting: nothing queued")
    await lanes.send(json.dumps([[[2]], {}, None]).encode())
    manager.until("STATUS=waiting: budget: next start at ")
    manager.until("STATUS=waiting: gathering: ")
    worker.process.send_signal(signal.SIGTERM)
    manager.until("STOPPING=1")

    assert worker.process.wait(30) == 0
    kinds = [line.partition(" at ")[0] for line in manager.states]
    assert kinds == [
        "READY=1",
        "STATUS=starting",
        "STATUS=running: update_current_version, 1 id",
        "STATUS=waiting: nothing queued",
        "STATUS=waiting: budget: next start",
        "STATUS=waiting: gathering: 1 message, 1 id to write",
        "STOPPING=1",
        "STATUS=finishing the running chunk",
    ]


SLEEPER = """
    import time
    from aioworker import task

    @task(rate_limit="100/s")
    async def nap() -> None:
        time.sleep(2)
"""


async def test_a_watchdog_hears_of_the_event_loop_while_it_runs(
    start: Start, manager: Manager, shop: Connection[Cursor], lanes: Lanes, tmp_path: Path
) -> None:
    """Not while a run blocks it, ten times as long as the watchdog is patient."""
    (tmp_path / "sleeper.py").write_text(textwrap.dedent(SLEEPER))
    app = {"AIOWORKER_APP": "sleeper", "PYTHONPATH": importable(tmp_path)}
    initialised = start("init", **app)
    assert initialised.process.wait(30) == 0, initialised.log

    start("consume", **app, NOTIFY_SOCKET=manager.name, WATCHDOG_USEC="200000")
    while manager.states.count("WATCHDOG=1") < 10:
        manager.receive()
    await lanes.send(b"[[], {}, null]", "aioworker.nap", headers={"task": "nap"})
    manager.until("STATUS=running: nap")
    while manager.states[-1].startswith(("STATUS=running: nap", "WATCHDOG=1")):
        manager.receive()

    running = manager.states.index("STATUS=running: nap")
    # In 2 s an event loop that is not blocked says so twenty times; some before it is.
    assert manager.states[running:].count("WATCHDOG=1") < 10


def test_another_processs_watchdog_hears_nothing(start: Start, manager: Manager) -> None:
    watchdog = {"NOTIFY_SOCKET": manager.name, "WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}

    worker = start("consume", **watchdog)
    manager.until("STATUS=waiting: ")
    worker.process.send_signal(signal.SIGTERM)
    manager.until("STOPPING=1")

    assert "WATCHDOG=1" not in manager.states


def into_journal(log: Path, environment: dict[str, str], *arguments: str) -> int:
    """Run a command whose standard error is, as it is told, the journal; return its status."""
    with log.open("w") as stream:
        opened = os.fstat(stream.fileno())
        return subprocess.run(
            [AIOWORKER, *arguments],
            env=environment | {"JOURNAL_STREAM": f"{opened.st_dev}:{opened.st_ino}"},
            stderr=stream,
            stdout=subprocess.DEVNULL,
            timeout=COMMAND_SECONDS,
            check=False,
        ).returncode


async def test_lines_in_the_journal_have_their_priority(
    pair: servers.Servers, tmp_path: Path, lanes: Lanes
) -> None:
    log, scope = tmp_path / "log", {"AIOWORKER_BUDGET": "worker"}

    assert into_journal(log, pair.environment | scope, "consume", "--burst") == 0

    marks = [(line[:3], line[3:].split()[1]) for line in log.read_text().splitlines()]
    assert set(marks) == {("<6>", "INFO"), ("<4>", "WARNING")}


def test_an_error_in_the_journal_is_one_in_each_of_its_lines() -> None:
    """So that `journalctl -p err` shows all of a traceback."""
    try:
        int("two")
    except ValueError:
        record = logging.makeLogRecord({"levelno": logging.ERROR, "exc_info": sys.exc_info()})

    lines = JournalFormatter(ConsoleFormatter()).format(record).splitlines()

    assert len(lines) > 3
    assert {line[:3] for line in lines} == {"<3>"}


def test_the_line_of_a_command_that_fails_is_an_error_in_the_journal(
    pair: servers.Servers, tmp_path: Path
) -> None:
    log, wrong = tmp_path / "log", {"AIOWORKER_RATE_LIMIT": "2/min"}

    assert into_journal(log, pair.environment | wrong, "consume") == 2

    assert log.read_text().startswith("<3>aioworker: AIOWORKER_RATE_LIMIT: expected ")


def test_a_hangup_while_it_starts_is_heard_when_it_listens(
    start: Start, tmp_path: Path, shop: Connection[Cursor]
) -> None:
    """Its default action would end the worker."""
    (tmp_path / "slow_start.py").write_text(
        "import pathlib, time\npathlib.Path('importing').touch()\ntime.sleep(1)\n"
        "from aioworker import task\n\n@task\ndef f() -> None: ...\n"
    )
    worker = start("consume", "--app", "slow_start", PYTHONPATH=importable(tmp_path))
    eventually(lambda: [*tmp_path.glob("*/importing")], "it starts")

    worker.process.send_signal(signal.SIGHUP)

    eventually(lambda: worker.log.count("worker started") == 2, "it reloads")


class FirstProcess(Worker):
    """The first process of a container of its own."""

    contained = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child")
    command = (*contained, str(AIOWORKER))


def test_the_first_process_of_a_container_can_be_stopped_while_it_starts(
    start: Start, tmp_path: Path
) -> None:
    """The kernel drops a signal that such a process has not asked for."""
    if subprocess.run([*FirstProcess.contained, "true"], check=False).returncode:
        pytest.skip("no namespaces here")
    (tmp_path / "large.py").write_text(
        "import pathlib, time\npathlib.Path('importing').touch()\ntime.sleep(60)\n"
    )
    worker = start("consume", "--app", "large", kind=FirstProcess, PYTHONPATH=importable(tmp_path))
    eventually(lambda: [*tmp_path.glob("*/importing")], "it starts")

    [first] = psutil.Process(worker.process.pid).children()
    first.send_signal(signal.SIGTERM)

    assert worker.process.wait(30) == 128 + signal.SIGTERM


@pytest.mark.parametrize("kind", ["absent", "full"])
async def test_a_service_manager_that_does_not_listen_stops_nothing(
    kind: str, run: Run, manager: Manager, lanes: Lanes, shop: Connection[Cursor]
) -> None:
    simple_addons(shop, 1)
    await lanes.send(json.dumps([[[1]], {}, None]).encode())
    if kind == "absent":
        manager.socket.close()
    else:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            with pytest.raises(BlockingIOError):
                while True:
                    sender.sendto(b"x", manager.address)

    done = run("consume", "--burst", NOTIFY_SOCKET=manager.name)

    assert done.returncode == 0
    assert current_versions(shop) == {1: 10_001}


def test_as_a_module_it_is_the_same_command(pair: servers.Servers) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "aioworker", "publish", "7", "x"],
        env=pair.environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )

    assert (done.returncode, done.stderr) == (
        2,
        "aioworker: expected ids as whole numbers, got: 'x'\n",
    )


async def test_waiting_for_the_budget_it_holds_nothing(
    start: Start, lanes: Lanes, shop: Connection[Cursor], broker: servers.Broker
) -> None:
    """RabbitMQ keeps what waits: no delivery is unacknowledged, no row locked."""
    simple_addons(shop, 3)
    worker = start("consume", "--rate-limit", "1/h")
    await lanes.send(json.dumps([[[1]], {}, None]).encode())
    eventually(lambda: current_versions(shop)[1], "its start is over")

    for addon in (2, 3):
        await lanes.send(json.dumps([[[addon]], {}, None]).encode())
    eventually(lambda: "budget: next start at" in worker.log, "it waits for its budget")

    # The broker's own counts lag some seconds behind; one that is held would stay so for an hour.
    listing = ("list_queues", "name", "messages_ready", "messages_unacknowledged")
    eventually(
        lambda: (
            [QUEUES.bulk, "2", "0"]
            in [line.split() for line in broker.control(*listing).splitlines()]
        ),
        "two are ready and none is held",
    )
    assert rows(shop, "SELECT COUNT(*) FROM information_schema.innodb_trx") == [(0,)]
