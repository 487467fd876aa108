"""What goes wrong at the start: one line on standard error that says what to do."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from support import servers
from tests.conftest import (
    AIOWORKER,
    COMMAND_SECONDS,
    QUEUES,
    TASK,
    Lanes,
    Run,
    database_name,
    execute,
)

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

BROKER_COMMANDS = [("consume", "--burst"), ("publish-all",), ("publish", "1"), ("init",)]
DATABASE_COMMANDS = [("consume", "--burst"), ("publish-all",), ("publish-all", "--dry-run")]


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """Return the one line about what is wrong; log lines of the worker may precede it."""
    lines = done.stderr.splitlines()
    assert [line for line in lines if "Traceback" in line or line.startswith(" ")] == []
    assert [line for line in lines if line.startswith("aioworker: ")] == lines[-1:]
    assert done.stdout == ""
    return lines[-1].removeprefix("aioworker: ")


@pytest.mark.parametrize("command", BROKER_COMMANDS)
def test_a_broker_that_is_not_there(command: tuple[str, ...], run: Run, shop: object) -> None:
    done = run(*command, AIOWORKER_AMQP_URL="amqp://me:s3cret@127.0.0.1:1/v")

    assert (done.returncode, last_line(done)) == (
        1,
        "cannot connect to RabbitMQ at amqp://me@127.0.0.1:1/v: [Errno 111] Connect call failed"
        " ('127.0.0.1', 1); is it running? check AIOWORKER_AMQP_URL",
    )


@pytest.mark.parametrize("command", BROKER_COMMANDS)
def test_a_wrong_password_of_the_broker(
    command: tuple[str, ...], run: Run, shop: object, broker: servers.Broker
) -> None:
    url = broker.url(password="s3cret")

    done = run(*command, AIOWORKER_AMQP_URL=url)

    assert (done.returncode, last_line(done)) == (
        1,
        f"cannot connect to RabbitMQ at amqp://guest@127.0.0.1:{broker.port}/: user or"
        " password refused, check AIOWORKER_AMQP_URL",
    )


def test_a_virtual_host_that_is_not_there(run: Run, broker: servers.Broker) -> None:
    done = run("publish", "1", AIOWORKER_AMQP_URL=broker.url("nowhere"))

    assert (done.returncode, last_line(done)) == (
        1,
        f"cannot connect to RabbitMQ at amqp://guest@127.0.0.1:{broker.port}/nowhere:"
        " virtual host 'nowhere' does not exist, check AIOWORKER_AMQP_URL",
    )


@pytest.mark.parametrize("command", BROKER_COMMANDS[:3])
def test_a_queue_that_is_not_there(
    command: tuple[str, ...], run: Run, shop: object, broker: servers.Broker
) -> None:
    """Nothing but init declares; the others say so."""
    broker.control("add_vhost", "empty")
    broker.control("set_permissions", "-p", "empty", "guest", ".*", ".*", ".*")
    try:
        done = run(*command, AIOWORKER_AMQP_URL=broker.url("empty"))
        assert broker.control("list_queues", "-p", "empty", "name").split() == []
    finally:
        broker.control("delete_vhost", "empty")

    lane = QUEUES.bulk if command == ("publish-all",) else QUEUES.urgent
    assert (done.returncode, last_line(done)) == (
        1,
        f"queue {lane} does not exist: run `aioworker init`",
    )


@pytest.mark.parametrize("command", DATABASE_COMMANDS)
def test_a_database_that_is_not_there(
    command: tuple[str, ...], run: Run, lanes: Lanes, maria: servers.Maria
) -> None:
    done = run(*command, AIOWORKER_MYSQL_URL=maria.url("nowhere"))

    assert (done.returncode, last_line(done)) == (
        1,
        f"cannot use MySQL at mysql://root@127.0.0.1:{maria.port}/nowhere: Unknown"
        " database 'nowhere' (1049); create it, or correct AIOWORKER_MYSQL_URL",
    )


@pytest.mark.parametrize("command", DATABASE_COMMANDS)
def test_a_database_server_that_is_not_there(
    command: tuple[str, ...], run: Run, lanes: Lanes
) -> None:
    done = run(*command, AIOWORKER_MYSQL_URL="mysql://me:s3cret@127.0.0.1:1/site")

    assert (done.returncode, last_line(done)) == (
        1,
        "cannot use MySQL at mysql://me@127.0.0.1:1/site: Can't connect to MySQL server on"
        " '127.0.0.1' (2003); is it running? check AIOWORKER_MYSQL_URL",
    )


@pytest.mark.parametrize("command", DATABASE_COMMANDS)
def test_a_wrong_password_of_the_database(
    command: tuple[str, ...], run: Run, lanes: Lanes, maria: servers.Maria
) -> None:
    done = run(*command, AIOWORKER_MYSQL_URL=maria.url("aioworker", "nobody", "s3cret"))

    assert (done.returncode, last_line(done)) == (
        1,
        f"cannot use MySQL at mysql://nobody@127.0.0.1:{maria.port}/aioworker: Access"
        " denied for user 'nobody'@'127.0.0.1' (using password: YES) (1045); check user and"
        " password in AIOWORKER_MYSQL_URL; if the server asks for TLS, add ssl_mode=required or"
        " ssl_ca=FILE to the URL",
    )


@pytest.mark.parametrize(
    ("command", "table"),
    [
        (("consume", "--burst"), "addons"),
        (("consume", "--burst"), "files"),
        (("publish-all",), "addons"),
        (("publish-all", "--dry-run"), "addons"),
    ],
)
def test_a_table_that_is_not_there(
    command: tuple[str, ...],
    table: str,
    run: Run,
    lanes: Lanes,
    shop: Connection[Cursor],
    pair: servers.Servers,
) -> None:
    """Also while nothing is queued: it is said before a message is taken."""
    execute(shop, f"RENAME TABLE {table} TO elsewhere")

    done = run(*command)

    assert done.returncode == 1
    assert last_line(done) == (
        f"cannot use MySQL at {pair.mysql_url}: Table '{database_name(pair)}.{table}' doesn't"
        " exist (1146);"
        " is this the right database? check AIOWORKER_MYSQL_URL"
    )


def test_no_permission_in_the_broker(run: Run, lanes: Lanes, broker: servers.Broker) -> None:
    broker.control("add_user", "reader", "s3cret")
    broker.control("set_permissions", "reader", "", "", ".*")
    try:
        publish = run("publish", "1", AIOWORKER_AMQP_URL=broker.url("", "reader", "s3cret"))
        init = run("init", AIOWORKER_AMQP_URL=broker.url("", "reader", "s3cret"))
    finally:
        broker.control("delete_user", "reader")

    assert (publish.returncode, init.returncode) == (1, 1)
    cure = "`aioworker init --print` shows what the user needs"
    assert last_line(publish).startswith(f"no permission for queue {QUEUES.urgent}: ACCESS_REFUSED")
    assert last_line(publish).endswith(cure)
    assert last_line(init).startswith(f"no permission for queue {QUEUES.dead}: ACCESS_REFUSED")
    assert last_line(init).endswith(cure)


def test_no_permission_in_the_database(
    run: Run, lanes: Lanes, shop: Connection[Cursor], maria: servers.Maria
) -> None:
    execute(shop, "CREATE OR REPLACE USER reader", "GRANT SELECT ON aioworker.addons TO reader")

    done = run("consume", "--burst", AIOWORKER_MYSQL_URL=maria.url("aioworker", "reader"))

    assert done.returncode == 1
    assert "SELECT command denied to user" in last_line(done)
    assert last_line(done).endswith("(1142); `aioworker init --print` shows what the user needs")


USAGE = [
    (
        ("consume", "--rate-limit", "2/min"),
        {},
        "--rate-limit: expected rate limit as COUNT/UNIT, such as '2/m', or none, got: '2/min';"
        " write '2/m'",
    ),
    (
        ("consume",),
        {"AIOWORKER_RATE_LIMIT": "2/min"},
        "AIOWORKER_RATE_LIMIT: expected rate limit as COUNT/UNIT, such as '2/m', or none, got:"
        " '2/min'; write '2/m'",
    ),
    (
        ("publish-all",),
        {"AIOWORKER_RATE_LMIT": "2/m"},
        "unknown setting AIOWORKER_RATE_LMIT, did you mean AIOWORKER_RATE_LIMIT?",
    ),
    (
        ("init",),
        {"AIOWORKER_AMQP_URL": "http://me:s3cret@h/"},
        "AIOWORKER_AMQP_URL: expected a URL such as amqp://user:password@host:5672/vhost,"
        " got one that begins with 'http://'",
    ),
    (
        ("publish-all", "--chunk-size", "5000"),
        {},
        "--chunk-size: expected a whole number from 1 to 1000, got: '5000'",
    ),
    (
        ("consume", "shop_task"),
        {},
        "unknown task 'shop_task': without --app or AIOWORKER_APP only update_current_version is"
        " known",
    ),
    (("publish", "7", "x"), {}, "expected ids as whole numbers, got: 'x'"),
    (
        ("publish", "x", "7"),
        {},
        "expected ids, or a task first: unknown task 'x': without --app or AIOWORKER_APP only"
        " update_current_version is known",
    ),
    (
        ("publish", "update_current_version"),
        {},
        "expected publish [TASK] ID..., got no id: update_current_version",
    ),
    (("pause", "a", "--task=b"), {}, "expected one task, got: a b"),
    (("status", "boom", "hello"), {}, "expected one task, got: boom hello"),
    (("dead", "list", "boom", "--task", "boom"), {}, "expected one task, got: boom boom"),
    (("publish", "--task", "a", "b", "7"), {}, "expected one task, got: b a"),
    (("pause", "--task", "--reason", "deploy"), {}, "expected --task TASK, got: '--reason'"),
    (("dead", "drop", "--task", "--yes"), {}, "expected --task TASK, got: '--yes'"),
    (("publish", "--task=", "7"), {}, "expected --task TASK, got: ''"),
    (
        ("pause", "--task"),
        {},
        "Option '--task' requires an argument. `aioworker --help` shows the usage.",
    ),
    (
        ("dead", "show", "--task", "boom"),
        {},
        "Missing argument '[TASK] ID'. `aioworker dead show --help` shows the usage.",
    ),
    (
        ("publish", "--task", "5", "7"),  # of which 5 is no id
        {},
        "unknown task '5': without --app or AIOWORKER_APP only update_current_version is known",
    ),
    (("publish", "7", "0"), {}, "expected ids from 1 to 4294967295, got: 0"),
    (
        ("publish",),
        {},
        "Missing argument '[TASK] ID'. `aioworker publish --help` shows the usage.",
    ),
    (
        ("consum",),
        {},
        "No such command 'consum'. Did you mean 'consume'? `aioworker --help` shows the usage.",
    ),
]


@pytest.mark.parametrize(("command", "variables", "line"), USAGE)
def test_wrong_usage_or_settings_exit_2(
    command: tuple[str, ...], variables: dict[str, str], line: str, run: Run
) -> None:
    done = run(*command, **variables)

    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"aioworker: {line}\n")


async def test_bad_ids_publish_nothing(run: Run, lanes: Lanes) -> None:
    """Good ones beside them are not published either."""
    done = run("publish", "-", text="1 2\n3 four")

    assert (done.returncode, done.stderr) == (
        2,
        "aioworker: expected ids as whole numbers, got: 'four'\n",
    )
    assert await lanes.count(QUEUES.urgent) == 0


def test_debug_shows_where(run: Run) -> None:
    done = run("--debug", "consume", TASK, "--rate-limit", "x")

    assert done.returncode == 2
    assert "Traceback (most recent call last):" in done.stderr


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of a server that accepts and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=16) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("command", BROKER_COMMANDS)
def test_a_broker_that_is_silent_is_given_up_in_time(
    command: tuple[str, ...], run: Run, shop: object, silent: int
) -> None:
    began = time.monotonic()

    done = run(
        *command,
        AIOWORKER_AMQP_URL=f"amqp://127.0.0.1:{silent}/",
        AIOWORKER_CONNECT_TIMEOUT="1",
    )

    assert time.monotonic() - began < 10
    assert (done.returncode, last_line(done)) == (
        1,
        f"cannot connect to RabbitMQ at amqp://127.0.0.1:{silent}/: no answer in time, check"
        " AIOWORKER_AMQP_URL",
    )


@pytest.mark.parametrize("command", DATABASE_COMMANDS)
def test_a_database_that_is_silent_is_given_up_in_time(
    command: tuple[str, ...], run: Run, lanes: Lanes, silent: int
) -> None:
    began = time.monotonic()

    done = run(
        *command,
        AIOWORKER_MYSQL_URL=f"mysql://127.0.0.1:{silent}/d",
        AIOWORKER_CONNECT_TIMEOUT="1",
    )

    assert time.monotonic() - began < 10
    assert (done.returncode, last_line(done)) == (
        1,
        f"cannot use MySQL at mysql://127.0.0.1:{silent}/d: no answer in time; check"
        " AIOWORKER_MYSQL_URL",
    )


def test_no_permission_to_write_is_said_before_a_message_is_taken(
    run: Run, lanes: Lanes, shop: Connection[Cursor], maria: servers.Maria
) -> None:
    """The queue is not drained into the dead letters."""
    execute(shop, "CREATE OR REPLACE USER reader", "GRANT SELECT ON aioworker.* TO reader")

    done = run("consume", "--burst", AIOWORKER_MYSQL_URL=maria.url("aioworker", "reader"))

    assert done.returncode == 1
    assert "UPDATE command denied to user" in last_line(done)


@pytest.mark.parametrize(
    ("command", "stream", "status"),
    [("status", "<&-", 0), ("status", ">&-", 0), ("status", "2>&-", 0), ("publish -", "<&-", 2)],
)
def test_a_stream_that_is_closed_changes_nothing(
    pair: servers.Servers, shop: object, lanes: Lanes, command: str, stream: str, status: int
) -> None:
    """As a supervisor may start it."""
    done = shell(pair, f"{AIOWORKER} {command} {stream}")

    assert (done.returncode, "unexpected" in done.stderr) == (status, False), done.stderr


def test_a_reader_that_goes_away_is_no_fault_of_ours(
    pair: servers.Servers, shop: object, lanes: Lanes
) -> None:
    done = shell(pair, f"{AIOWORKER} status | true; echo ${{PIPESTATUS[0]}}")

    assert (done.stdout, done.stderr) in (("0\n", ""), ("1\n", ""))


@pytest.mark.parametrize(
    "command",
    ["", "status --json", "init --print", "dead list", "--help", "consume -h", "dead drop --help"],
)
async def test_a_disk_that_is_full_is_said_in_one_line(
    pair: servers.Servers, shop: object, lanes: Lanes, command: str
) -> None:
    """It was `unexpected OSError`, as if it were a fault of ours. No letter is lost by that."""
    await lanes.send(b"[]", QUEUES.dead, headers={"task": TASK, "id": "letter"})

    done = shell(pair, f"{AIOWORKER} {command} > /dev/full")

    line = "aioworker: cannot write to standard output: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, line)
    assert await lanes.holds(QUEUES.dead, 1)


def test_what_the_terminal_cannot_show_is_escaped(run: Run, shop: object) -> None:
    run("pause", "--reason", "façade")

    said = run("pause", PYTHONIOENCODING="ascii")

    assert (said.returncode, said.stderr) == (0, "")
    assert r": fa\xe7ade; nothing was changed" in said.stdout


def shell(pair: servers.Servers, line: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", line],
        env=pair.environment,
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS,
        check=False,
    )
