"""Private RabbitMQ and MariaDB servers on loopback, in a folder of the checkout.

One that `AIOWORKER_AMQP_URL` or `AIOWORKER_MYSQL_URL` names is used instead. Other servers are
never touched: ports are free ones, data is new, and what was started here is ended here.
`python -m support.servers` keeps a pair up for a developer.
"""

from __future__ import annotations

import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import psutil
import pymysql
from mirakuru import TCPExecutor

from aioworker.addresses import DatabaseAddress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

ROOT = Path(__file__).parent.parent
HOST = "127.0.0.1"
PORTS = (20_000, 32_000)  # below what Linux and macOS give to outgoing connections
START_SECONDS = 90
STOP_SECONDS = 20
SCRATCH = "aioworker_scratch"  # a database with this table was made here and may be emptied
# Debian's command `rabbitmq-server` changes the user; the scripts behind it do not.
RABBITMQ_FOLDERS = (
    "/usr/lib/rabbitmq/bin",
    "/opt/homebrew/opt/rabbitmq/sbin",
    "/usr/local/opt/rabbitmq/sbin",
)
PROGRAM_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/opt/homebrew/sbin"])


_dice = random.SystemRandom()  # tests of properties seed the other one


def free_port() -> int:
    """Return a port of loopback that nobody listens on, and none that outgoing connections get.

    A server that is killed leaves its port free for a while: a connection, even one that
    tries to reach that very server, might be given it, and the server could not come back.
    """
    while True:
        port = _dice.randrange(*PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind((HOST, port))
            return port


def named(server: str) -> str:
    """Return the URL of a server (`AMQP`, `MYSQL`) that the environment names, or nothing."""
    return os.environ.get(f"AIOWORKER_{server}_URL", "")


def program(*names: str) -> str:
    """Return the path of the first program that is installed."""
    for name in names:
        if found := shutil.which(name, path=PROGRAM_PATH):
            return found
    raise FileNotFoundError(f"expected one of {', '.join(names)} to be installed")


def rabbitmq_scripts() -> Path:
    """Return the folder of RabbitMQ's commands."""
    known = (Path(path) for path in RABBITMQ_FOLDERS)
    return next((p for p in known if p.is_dir()), Path(program("rabbitmq-server")).parent)


def _user() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


class Broker:
    """A RabbitMQ node.

    Args:
        folder: Where all of it is.
        configuration: More of its `rabbitmq.conf`.
        beside: A node of the same cluster, whose epmd and cookie it uses; None for its own.
        erlang: More arguments of Erlang's.
    """

    def __init__(
        self, folder: Path, *configuration: str, beside: Broker | None = None, erlang: str = ""
    ) -> None:
        self.port = free_port()
        self.name = f"private{self.port}@localhost"
        self._folder = folder
        self._epmd_port: int = free_port() if beside is None else beside._epmd_port
        self.home: Path = folder / "home" if beside is None else beside.home
        self._scripts = rabbitmq_scripts()
        folder.mkdir(parents=True)
        self.home.mkdir(exist_ok=True)
        (folder / "enabled_plugins").write_text("[].")
        (folder / "rabbitmq.conf").write_text(
            f"listeners.tcp.default = {HOST}:{self.port}\n"
            "vm_memory_high_watermark.absolute = 512MB\n"
            "disk_free_limit.absolute = 50MB\n" + "".join(f"{line}\n" for line in configuration)
        )
        self._environment = os.environ | {
            "HOME": str(self.home),
            "RABBITMQ_NODENAME": self.name,
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(folder / "data"),
            "RABBITMQ_LOG_BASE": str(folder / "log"),
            "RABBITMQ_PID_FILE": str(folder / "pid"),
            "RABBITMQ_DIST_PORT": str(free_port()),
            "ERL_EPMD_ADDRESS": HOST,
            "ERL_EPMD_PORT": str(self._epmd_port),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": (
                "-kernel inet_dist_use_interface {127,0,0,1}"
                f" +sbwt none +sbwtdcpu none +sbwtdio none {erlang}"
            ),
        }
        # The node would start one that outlives it.
        self.epmd: TCPExecutor = (
            self._executor(
                [program("epmd"), "-address", HOST, "-port", str(self._epmd_port)], self._epmd_port
            )
            if beside is None
            else beside.epmd
        )
        self._node = self._executor([str(self._scripts / "rabbitmq-server")], self.port)

    def _executor(self, command: list[str], port: int) -> TCPExecutor:
        return TCPExecutor(
            command,
            HOST,
            port,
            timeout=START_SECONDS,
            envvars=self._environment,
            cwd=str(self._folder),  # where a node that crashes leaves its core
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            expected_returncode=-signal.SIGTERM,
        )

    def know(self, nodes: Sequence[Broker]) -> None:
        """Have it form a cluster with these nodes when it first starts."""
        with (self._folder / "rabbitmq.conf").open("a") as file:
            file.write("cluster_formation.peer_discovery_backend = classic_config\n")
            for number, node in enumerate(nodes, 1):
                file.write(f"cluster_formation.classic_config.nodes.{number} = {node.name}\n")

    def url(self, vhost: str = "", user: str = "guest", password: str = "guest") -> str:
        """Return the node's address."""
        return f"amqp://{user}:{password}@{HOST}:{self.port}/{vhost}"

    def start(self) -> None:
        """Start the node and wait until it serves."""
        if not self.epmd.running():
            self.epmd.start()
        self._node.start()
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                self.control("await_startup")
            except subprocess.SubprocessError:  # the node does not answer rabbitmqctl yet
                if time.monotonic() > deadline or not self._node.running():
                    raise
                time.sleep(1)
            else:
                return

    def stop(self) -> None:
        """Stop the node and its epmd."""
        for executor in (self._node, self.epmd):
            _end(executor)

    def kill(self) -> None:
        """End the node as a crash does; its queues stay on the disk."""
        _end(self._node, crash=True)

    def control(self, *arguments: str) -> str:
        """Run rabbitmqctl and return what it prints.

        Raises:
            SubprocessError: It failed, or did not end; a note has what it said.
        """
        try:
            return subprocess.run(
                [self._scripts / "rabbitmqctl", "--quiet", *arguments],
                env=self._environment,
                cwd=self._folder,  # where one that crashes leaves its core
                check=True,
                capture_output=True,
                text=True,
                timeout=60,
            ).stdout
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            error.add_note(str(error.stderr))
            raise


class Cluster:
    """Three RabbitMQ nodes that form a cluster, by RabbitMQ's own defaults but for one.

    A node that stands still is noticed after *tick_seconds* (RabbitMQ's default is 60), give or
    take a quarter.
    """

    def __init__(self, folder: Path, tick_seconds: int) -> None:
        first: Broker | None = None
        self.nodes: list[Broker] = []
        for number in range(1, 4):
            erlang = f"-kernel net_ticktime {tick_seconds}"
            self.nodes.append(Broker(folder / str(number), beside=first, erlang=erlang))
            first = self.nodes[0]
        for node in self.nodes:
            node.know(self.nodes)

    def start(self) -> None:
        """Start all nodes, and wait until they serve together."""
        first = self.nodes[0]
        cookie = first.home / ".erlang.cookie"
        cookie.write_text(uuid.uuid4().hex)
        cookie.chmod(0o400)
        first.epmd.start()
        with ThreadPoolExecutor() as pool:
            list(pool.map(Broker.start, self.nodes))

    def stop(self) -> None:
        """End all nodes, and their epmd."""
        for node in self.nodes:
            node.kill()
        self.nodes[0].stop()


class Maria:
    """A MariaDB server; `root` has no password."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.port = free_port()
        data = folder / "data"
        (folder / "tmp").mkdir(parents=True)
        subprocess.run(
            [
                program("mariadb-install-db", "mysql_install_db"),
                "--no-defaults",
                f"--datadir={data}",  # no --user: with it, a folder with a space is refused
                "--auth-root-authentication-method=normal",
                "--skip-test-db",
                # What its data are made with.
                *(one for one in options if one.startswith("--innodb-page-size")),
            ],
            check=True,
            capture_output=True,
            # In /tmp one that begins clears away the temporary tables of another.
            env=os.environ | {"TMPDIR": str(folder / "tmp")},
        )
        command = [
            program("mariadbd"),
            "--no-defaults",
            f"--user={_user()}",
            f"--datadir={data}",
            "--socket=private.sock",  # in the data folder: a path may have 107 characters
            f"--pid-file={folder / 'pid'}",
            f"--port={self.port}",
            f"--bind-address={HOST}",
            f"--tmpdir={folder / 'tmp'}",
            "--skip-log-bin",
            "--innodb-buffer-pool-size=256M",
            "--performance-schema=OFF",
            "--skip-name-resolve",
            f"--log-error={folder / 'log'}",
            *options,
        ]
        self._server = TCPExecutor(
            command,
            HOST,
            self.port,
            timeout=START_SECONDS,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def url(self, database: str, user: str = "root", password: str = "") -> str:
        """Return a database's address."""
        secret = f":{password}" if password else ""
        return f"mysql://{user}{secret}@{HOST}:{self.port}/{database}"

    def start(self) -> None:
        """Start the server and wait until it serves."""
        self._server.start()

    def stop(self) -> None:
        """Stop the server."""
        _end(self._server)

    def kill(self) -> None:
        """End the server as a crash does."""
        _end(self._server, crash=True)


def _end(executor: TCPExecutor, *, crash: bool = False) -> None:
    """End a server and whatever it started, by their process ids; with *crash*, at once."""
    process = executor.process
    if process is None:
        return
    with suppress(psutil.NoSuchProcess):
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(True)]
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill() if crash else member.terminate()
        _gone, left = psutil.wait_procs(family, timeout=STOP_SECONDS)
        for member in left:
            member.kill()
    executor.kill(wait=True)


@dataclass(frozen=True, slots=True)
class Servers:
    """The servers of a run: private ones, or those that the environment names.

    Args:
        amqp_url: RabbitMQ.
        mysql_url: A database that may be emptied.
        broker: The private node; None where the environment names one.
        maria: The private server; None where the environment names one.
    """

    amqp_url: str
    mysql_url: str
    broker: Broker | None = None
    maria: Maria | None = None

    @property
    def environment(self) -> dict[str, str]:
        """The environment in which `aioworker` uses these servers, and no other setting."""
        kept = {k: v for k, v in os.environ.items() if not k.upper().startswith("AIOWORKER_")}
        return kept | {
            "AIOWORKER_AMQP_URL": self.amqp_url,
            "AIOWORKER_MYSQL_URL": self.mysql_url,
        }


@contextmanager
def cluster(tick_seconds: int) -> Iterator[Cluster]:
    """Start a cluster of RabbitMQ, and end it."""
    folder = ROOT / ".private" / f"{os.getpid()}-cluster"
    made = Cluster(folder, tick_seconds)
    try:
        made.start()
        yield made
    finally:
        made.stop()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def servers(*maria_options: str) -> Iterator[Servers]:
    """Start a private server for each that the environment does not name, and end it."""
    amqp_url, mysql_url = named("AMQP"), named("MYSQL")
    folder = ROOT / ".private" / str(os.getpid())
    # Whoever ends this run, or closes its terminal, ends the servers too.
    before = {
        number: signal.signal(number, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGHUP)
    }
    broker = maria = None
    try:
        with ThreadPoolExecutor() as pool:
            if not amqp_url:
                broker = Broker(folder / "rabbitmq")
                amqp_url = broker.url()
                ready = pool.submit(broker.start)
            if not mysql_url:
                maria = Maria(folder / "mariadb", *maria_options)
                mysql_url = maria.url("aioworker")
                maria.start()
            if broker:
                ready.result()
        yield Servers(amqp_url, mysql_url, broker, maria)
    finally:
        for server in (broker, maria):
            if server:
                server.stop()
        shutil.rmtree(folder, ignore_errors=True)
        for number, handler in before.items():
            signal.signal(number, handler)


def login(address: DatabaseAddress) -> Connection[Cursor]:
    """Connect to a database server, and to none of its databases."""
    return pymysql.connect(
        host=address.host,
        port=address.port,
        user=address.user,
        password=address.password.get_secret_value(),
        charset="utf8mb4",
    )


def connect(mysql_url: str, *, create: bool = False) -> Connection[Cursor]:
    """Connect to a database by its URL; with *create*, make it anew and empty."""
    address = DatabaseAddress.parse(mysql_url)
    connection = login(address)
    with connection.cursor() as cursor:
        if create:
            _refuse_foreign(cursor, address.database)
            cursor.execute(f"DROP DATABASE IF EXISTS `{address.database}`")
            cursor.execute(f"CREATE DATABASE `{address.database}` CHARACTER SET utf8mb4")
            cursor.execute(f"CREATE TABLE `{address.database}`.{SCRATCH} (id INT)")
    connection.select_db(address.database)
    return connection


def _refuse_foreign(cursor: Cursor, database: str) -> None:
    """Refuse to empty a database that was not made here."""
    cursor.execute(
        "SELECT table_name FROM information_schema.tables WHERE table_schema = %s", (database,)
    )
    tables = {row[0] for row in cursor.fetchall()}
    if tables and SCRATCH not in tables:
        raise SystemExit(
            f"expected AIOWORKER_MYSQL_URL to name a database that may be emptied, got {database!r}"
            f" with {len(tables)} tables; name another one"
        )


def main() -> None:
    """Keep the servers up until Ctrl-C or SIGTERM."""
    from support import site

    with servers() as pair:
        connection = connect(pair.mysql_url, create=True)
        site.create(connection)
        site.fill(connection, 12_000)
        connection.close()
        print(f"export AIOWORKER_AMQP_URL={pair.amqp_url}")
        print(f"export AIOWORKER_MYSQL_URL={pair.mysql_url}")
        print("# Ctrl-C stops both", flush=True)
        with suppress(KeyboardInterrupt):
            while True:
                time.sleep(3600)


def quietly(main: Callable[[], int | None]) -> NoReturn:
    """Run a program; Ctrl-C ends it in one line, its servers first."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped")


if __name__ == "__main__":
    quietly(main)
