"""A virtual host, a database and workers of a scenario's own, on the run's private servers.

For tests that are no coroutines. What they assert is read here: from the rows, from a table
that a trigger fills with every write, from the budget's row, and from the queues themselves.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import subprocess
import uuid
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import aio_pika

from aioworker.addresses import DatabaseAddress
from aioworker.budget import schema, tables
from aioworker.mysql.database import Database
from support import servers, site
from tests.conftest import (
    AIOWORKER,
    COMMAND_SECONDS,
    QUEUES,
    TASK,
    Worker,
    declare,
    execute,
    rows,
    simple_addons,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

NOTHING = dict.fromkeys((QUEUES.bulk, QUEUES.urgent, QUEUES.retry, QUEUES.dead), (0, 0))
RETRY_MS = 2_000
SECONDS = 20
_NUMBERS = itertools.count(1)

_AUDIT = (
    "CREATE TABLE audit (at DECIMAL(18, 6) NOT NULL, session BIGINT NOT NULL, addon INT NOT NULL)",
    "CREATE TRIGGER audited AFTER UPDATE ON addons FOR EACH ROW INSERT INTO audit"
    " VALUES (UNIX_TIMESTAMP(SYSDATE(6)), CONNECTION_ID(), NEW.id)",
)
_SLOW = (
    "CREATE TRIGGER slow BEFORE UPDATE ON addons FOR EACH ROW"
    " SET NEW.modified = IF(SLEEP({}), NEW.modified, NEW.modified)"
)
# A write of rows: a worker also sees that it may write, by one of no rows.
_WRITING = (
    "SELECT id FROM information_schema.processlist"
    " WHERE db = DATABASE() AND info LIKE 'UPDATE /* aioworker % JSON_TABLE(''[[%'"
)
# `list_queues` shows what was some seconds ago; this asks the queues themselves.
_COUNTS = """
Count = fun(Queue, What) ->
    {{ok, Number, _}} = ra:consistent_query(amqqueue:get_pid(Queue), What), Number end,
[{{element(4, amqqueue:get_name(Queue)),
    Count(Queue, fun rabbit_fifo:query_messages_ready/1),
    Count(Queue, fun rabbit_fifo:query_messages_checked_out/1)}}
    || Queue <- rabbit_amqqueue:list(<<"{}">>)]."""


class Start(NamedTuple):
    """What one run wrote, by the database's clock, in seconds."""

    first: float
    last: float


def chunk(*ids: int) -> bytes:
    """Return the body of a chunk's message."""
    return json.dumps([[list(ids)], {}, None]).encode()


class Place:
    """A site, its audit, the main job's queues and its workers; `end` ends them.

    Args:
        private: The run's servers.
        folder: Where commands run and workers log.
        retry_ms: How long a message waits for its retry, by a policy; None leaves it at 60 s.
        amqp_port: Where workers find RabbitMQ, such as a proxy's; None is RabbitMQ's own.
        mysql_port: The same for the database.
        gather_seconds: How long its workers gather for a start; None leaves it at the default.
        chunk_size: How many ids fill a start; with 1 each message is one. None is the default, too.

    Attributes:
        name: The virtual host's and the database's.
        servers: The servers, as they are.
        through: The servers, as workers find them.
        shop: A connection to the database.
    """

    def __init__(
        self,
        private: servers.Servers,
        folder: Path,
        *,
        retry_ms: int | None = RETRY_MS,
        amqp_port: int | None = None,
        mysql_port: int | None = None,
        gather_seconds: int | None = None,
        chunk_size: int | None = None,
    ) -> None:
        assert private.broker is not None
        assert private.maria is not None
        self.name = f"place{next(_NUMBERS)}"
        self._broker, maria = private.broker, private.maria
        self.servers = servers.Servers(self._broker.url(self.name), maria.url(self.name))
        self.through = servers.Servers(
            _through(amqp_port, self.servers.amqp_url, self._broker.port),
            _through(mysql_port, self.servers.mysql_url, maria.port),
        )
        self._folder = folder / self.name
        self._folder.mkdir(parents=True)
        given = {"GATHER_SECONDS": gather_seconds, "CHUNK_SIZE": chunk_size}
        self._settings = {
            f"AIOWORKER_{name}": str(value) for name, value in given.items() if value is not None
        }
        self._size = 1
        self._workers: list[Worker] = []
        self._commands: list[subprocess.Popen[str]] = []
        self._add_host(retry_ms)
        self.shop: Connection[Cursor] = servers.connect(self.servers.mysql_url, create=True)
        site.create(self.shop)
        execute(self.shop, *_AUDIT)
        self.slow(0.0005)
        asyncio.run(self._make())

    def _add_host(self, retry_ms: int | None) -> None:
        anything = {"user": "guest", "configure": ".*", "write": ".*", "read": ".*"}
        self._define(
            vhosts=[{"name": self.name}],
            permissions=[{"vhost": self.name} | anything],
            policies=[self._policy(QUEUES.retry, "message-ttl", retry_ms)] if retry_ms else [],
        )

    def _policy(self, queue: str, what: str, value: int) -> dict[str, Any]:
        pattern = f"^{re.escape(queue)}$"
        which = {"vhost": self.name, "name": queue, "pattern": pattern, "apply-to": "queues"}
        return which | {"priority": 0, "definition": {what: value}}

    def _define(self, **definitions: list[dict[str, Any]]) -> None:
        path = self._folder / "definitions.json"
        path.write_text(json.dumps(definitions))
        self._broker.control("import_definitions", str(path))

    async def _make(self) -> None:
        """Do what `init` does, but for its wait until the queues outlive a crash."""
        address = DatabaseAddress.parse(self.servers.mysql_url)
        async with Database(address, connect_timeout=SECONDS, timeout=SECONDS) as database:
            for name in schema.NAMES:
                await schema.settle(database, name)
            await tables.add_rows(database, [TASK])
        async with await self._connect() as connection:
            await declare(connection)

    async def _connect(self) -> aio_pika.abc.AbstractConnection:
        return await aio_pika.connect(self.servers.amqp_url, timeout=SECONDS)

    @asynccontextmanager
    async def _queue(self, name: str) -> AsyncIterator[aio_pika.abc.AbstractQueue]:
        async with await self._connect() as connection:
            channel = await connection.channel()
            yield await channel.get_queue(name, ensure=False)

    # What happens in it.

    def limit(self, queue: str, what: str, value: int) -> None:
        """Set a policy for one queue, such as `max-length`; another one replaces it."""
        self._define(policies=[self._policy(queue, what, value)])

    def slow(self, seconds: float) -> None:
        """Let the write of a row take so long."""
        execute(self.shop, "DROP TRIGGER IF EXISTS slow", _SLOW.format(seconds))

    def backlog(self, chunks: int, size: int = 1) -> None:
        """Insert stale add-ons, numbered from 1, and queue a sweep of them."""
        self._size = size
        simple_addons(self.shop, chunks * size)
        published = self.run("publish-all", "--chunk-size", str(size))
        assert published.returncode == 0, published.stderr

    def publish(self, *bodies: bytes, lane: str = QUEUES.bulk) -> None:
        """Publish messages of the task, each confirmed."""

        async def publish_all() -> None:
            async with self._queue(lane) as queue:
                for body in bodies:
                    message = aio_pika.Message(
                        body, delivery_mode=2, headers={"task": TASK, "id": str(uuid.uuid4())}
                    )
                    await queue.channel.default_exchange.publish(message, lane)

        asyncio.run(publish_all())

    def take(self, name: str) -> list[bytes]:
        """Take all that is ready in a queue, for good; return the bodies."""

        async def take_all() -> list[bytes]:
            taken = []
            async with self._queue(name) as queue:
                while (found := await queue.get(no_ack=True, fail=False)) is not None:
                    taken.append(found.body)
            return taken

        return asyncio.run(take_all())

    def declare(self, name: str, arguments: dict[str, Any]) -> None:
        """Declare a durable queue, as somebody else might."""

        async def declare() -> None:
            async with await self._connect() as connection:
                channel = await connection.channel()
                await channel.declare_queue(name, durable=True, arguments=arguments)

        asyncio.run(declare())

    def delete(self, name: str) -> None:
        """Delete a queue and what is in it."""

        async def delete() -> None:
            async with self._queue(name) as queue:
                await queue.delete(if_unused=False, if_empty=False)

        asyncio.run(delete())

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return subprocess.run(
            [AIOWORKER, *arguments],
            env=self.servers.environment | variables,
            cwd=self._folder,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start a command whose words are read by `communicate`; killed at the end."""
        self._commands.append(
            subprocess.Popen(
                [AIOWORKER, *arguments],
                env=self.through.environment,
                cwd=self._folder,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return self._commands[-1]

    def worker(self, *arguments: str, **variables: str) -> Worker:
        """Start a worker."""
        folder = self._folder / str(len(self._workers))
        folder.mkdir()
        settings = self._settings | variables
        self._workers.append(Worker(self.through, folder, "consume", *arguments, **settings))
        return self._workers[-1]

    def end(self) -> None:
        """End the workers, and take the virtual host away: a broker starts faster without."""
        for worker in self._workers:
            worker.end()
        for command in self._commands:
            command.kill()
            command.communicate()
        self.shop.close()
        self._broker.control("delete_vhost", self.name)

    # What can be seen of it.

    def queued(self) -> dict[str, tuple[int, int]]:
        """Return how many messages each queue has, ready and unacknowledged."""
        listed = self._broker.control("eval", _COUNTS.format(self.name))
        found = re.findall(r'<<"([^"]+)">>,\s*(\d+),\s*(\d+)', listed)
        return {name: (int(ready), int(held)) for name, ready, held in found}

    def done(self) -> int:
        """Return how many rows are right."""
        return len(rows(self.shop, "SELECT 1 FROM addons WHERE current_version = id + 10000"))

    def audit(self) -> dict[str, dict[str, Any]]:
        """Return what `aioworker audit` tells of each task, and of each budget that tasks share."""
        told = self.run("audit", "--json").stdout.splitlines()
        found = [json.loads(line) for line in told]
        return {one["task"] or f"budget:{one['budget']}": one for one in found}

    def all_done(self) -> bool:
        """Whether every row is right."""
        return not rows(self.shop, "SELECT 1 FROM addons WHERE current_version IS NULL LIMIT 1")

    def writing(self) -> bool:
        """Whether a worker's write runs."""
        return bool(rows(self.shop, _WRITING))

    def written(self) -> list[int]:
        """Return the add-ons of all writes, in their order."""
        return [row[0] for row in rows(self.shop, "SELECT addon FROM audit ORDER BY at")]

    def starts(self) -> list[Start]:
        """Return each run's first and last row: a session's rows of one chunk."""
        found = rows(
            self.shop,
            "SELECT MIN(at), MAX(at) FROM audit"
            f" GROUP BY session, (addon - 1) DIV {self._size} ORDER BY 1",
        )
        return [Start(float(first), float(last)) for first, last in found]

    def charged(self) -> int:
        """Return how many starts were charged."""
        return int(rows(self.shop, "SELECT starts FROM aioworker_budget")[0][0])

    def reasons(self) -> list[str]:
        """Return what each worker waits for, or does."""
        return [row[0] for row in rows(self.shop, "SELECT reason FROM aioworker_worker")]


def _through(port: int | None, url: str, own: int) -> str:
    return url if port is None else url.replace(f":{own}/", f":{port}/")
