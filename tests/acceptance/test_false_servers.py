"""Commands whose server is none: one line, an end in time, and nothing secret on the wire."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from tests import false_servers
from tests.conftest import Lanes, Run, Worker, eventually
from tests.false_servers import FalseServer, greeting, refusal, says, switch

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

PASSWORD = "s3cr3t-word"
COMMANDS = [("init",), ("status",), ("consume", "--burst")]
SILENT = says(b"")
DATABASES = {
    "no TLS": ("?ssl_mode=verify_identity", says(greeting()), "the server offers no TLS"),
    "wants the password": (
        "",
        says(greeting(), switch(b"mysql_clear_password")),
        "cannot log in by",
    ),
    "silent": ("", SILENT, "no answer in time"),
    "speaks HTTP": ("", says(false_servers.HTTP), "is it a MySQL server?"),
    "closes": ("", says(greeting(), b"", then_close=True), "Lost connection"),
    "speaks to the terminal": ("", says(refusal(0, b"go\x1b[2J away")), "go\\x1b[2J away"),
}
BROKERS = {
    "no TLS": ("?ssl_mode=required", says(b"AMQP\x00\x00\x09\x01"), "speaks no TLS on this port"),
    "silent": ("?ssl_mode=required", SILENT, "no answer in time"),
    "speaks HTTP": ("", says(false_servers.HTTP), "cannot connect to RabbitMQ"),
    "closes": ("", says(b"", then_close=True), "is it running, and without TLS?"),
}


def database_at(server: FalseServer, query: str) -> dict[str, str]:
    """Return the variables that name it as the database."""
    return _soon(server) | {
        "AIOWORKER_MYSQL_URL": f"mysql://me:{PASSWORD}@127.0.0.1:{server.port}/d{query}"
    }


def broker_at(server: FalseServer, query: str) -> dict[str, str]:
    """Return the variables that name it as RabbitMQ."""
    return _soon(server) | {
        "AIOWORKER_AMQP_URL": f"amqp://me:{PASSWORD}@127.0.0.1:{server.port}/{query}"
    }


def check(done: subprocess.CompletedProcess[str], server: FalseServer, words: str) -> None:
    """See that it failed in words that say why, and that nothing secret is in them or was sent."""
    said = done.stdout + done.stderr
    assert done.returncode == 1
    assert words in said
    assert "Traceback" not in said
    assert len([line for line in done.stderr.splitlines() if line.startswith("aioworker: ")]) <= 1
    assert PASSWORD not in said
    assert PASSWORD.encode() not in server.received


def _soon(server: FalseServer) -> dict[str, str]:
    """Return a short connect timeout for those that are waited for in vain."""
    return {"AIOWORKER_CONNECT_TIMEOUT": "1"} if server.part is SILENT else {}


@pytest.mark.parametrize("name", DATABASES)
@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_trusts_a_database_that_is_none(
    command: tuple[str, ...], name: str, run: Run, lanes: Lanes
) -> None:
    query, part, words = DATABASES[name]
    with FalseServer(part) as server:
        check(run(*command, **database_at(server, query)), server, words)


@pytest.mark.parametrize("name", BROKERS)
@pytest.mark.parametrize("command", [*COMMANDS, ("publish", "1")])
def test_no_command_trusts_a_broker_that_is_none(
    command: tuple[str, ...], name: str, run: Run, shop: Connection[Cursor]
) -> None:
    query, part, words = BROKERS[name]
    with FalseServer(part) as server:
        check(run(*command, **broker_at(server, query)), server, words)


@pytest.mark.parametrize("name", ["no TLS", "wants the password", "silent"])
def test_a_worker_says_what_is_wrong_with_its_database_and_waits(
    name: str, start: Callable[..., Worker], lanes: Lanes
) -> None:
    query, part, words = DATABASES[name]
    with FalseServer(part) as server:
        worker = start("consume", **database_at(server, query))
        eventually(lambda: words in worker.log, "the worker says it")

        assert worker.process.poll() is None
        assert PASSWORD not in worker.log
        assert PASSWORD.encode() not in server.received


@pytest.mark.parametrize("name", ["no TLS", "silent"])
def test_a_worker_says_what_is_wrong_with_its_broker_and_waits(
    name: str, start: Callable[..., Worker], shop: Connection[Cursor]
) -> None:
    query, part, words = BROKERS[name]
    with FalseServer(part) as server:
        worker = start("consume", **broker_at(server, query))
        eventually(lambda: words in worker.log, "the worker says it")

        assert worker.process.poll() is None
        assert PASSWORD not in worker.log
        assert PASSWORD.encode() not in server.received


@pytest.mark.parametrize("command", [("consume",), ("consume", "--check"), ("status",), ("init",)])
def test_a_file_of_tls_that_is_missing_ends_a_command_at_its_start(
    command: tuple[str, ...], run: Run
) -> None:
    """It was retried for ever, unnamed."""
    done = run(*command, AIOWORKER_MYSQL_URL="mysql://me:s3cret@127.0.0.1/d?ssl_ca=/gone/ca.pem")

    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        2,
        "aioworker: AIOWORKER_MYSQL_URL: ssl_ca: expected certificates in PEM, got: '/gone/ca.pem'"
        " (No such file or directory)",
    )


def test_who_only_publishes_needs_no_file_of_the_database(run: Run, lanes: Lanes) -> None:
    """A web process may not even be able to read them."""
    done = run(
        "publish", "1", AIOWORKER_MYSQL_URL="mysql://me:s3cret@127.0.0.1/d?ssl_ca=/gone/ca.pem"
    )

    assert done.returncode == 0
