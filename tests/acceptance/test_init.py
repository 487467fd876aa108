"""Setting up: queues declared once, privileges as small as printed."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING
from unittest.mock import Mock

import aio_pika
import pytest

from aioworker.budget import grants, schema
from aioworker.commands import init
from aioworker.errors import DatabaseError
from aioworker.rabbitmq import queues
from aioworker.settings import Settings
from support import servers
from tests.conftest import (
    ONE_A_START,
    QUEUES,
    Lanes,
    Run,
    Worker,
    current_versions,
    declare,
    eventually,
    execute,
    importable,
    rows,
    simple_addons,
    summary,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pymysql.connections import Connection
    from pymysql.cursors import Cursor


MAIN_TABLES = ("addons", "versions", "files", *schema.NAMES)
ALL = (QUEUES.dead, QUEUES.bulk, QUEUES.urgent, QUEUES.retry)


@pytest.fixture
def vhost(broker: servers.Broker) -> Iterator[str]:
    """A virtual host of the test's own, and its address."""
    broker.control("add_vhost", "fresh")
    broker.control("set_permissions", "-p", "fresh", "guest", ".*", ".*", ".*")
    yield broker.url("fresh")
    broker.control("delete_vhost", "fresh")


def arguments_of(broker: servers.Broker) -> dict[str, dict[str, object]]:
    """Return the arguments of each queue of the fresh virtual host."""
    listed = broker.control(
        "list_queues", "-p", "fresh", "--formatter", "json", "name", "durable", "arguments"
    )
    queues = json.loads(listed)
    assert all(queue["durable"] for queue in queues)
    return {
        queue["name"]: {name: value for name, _kind, value in queue["arguments"]}
        if isinstance(queue["arguments"], list)
        else queue["arguments"]
        for queue in queues
    }


@pytest.mark.parametrize("queue_type", ["quorum", "classic"])
def test_the_queues_are_declared_once_and_again(
    run: Run,
    vhost: str,
    broker: servers.Broker,
    shop: Connection[Cursor],
    queue_type: str,
) -> None:
    """The second time it finds them, and changes nothing."""
    execute(shop, f"DROP TABLE {', '.join(schema.NAMES)}")
    variables = {"AIOWORKER_AMQP_URL": vhost, "AIOWORKER_QUEUE_TYPE": queue_type}

    first = run("init", **variables)
    second = run("init", **variables)

    assert (first.returncode, second.returncode) == (0, 0)
    assert first.stdout == "".join(
        [f"table {name}: made\n" for name in schema.NAMES]
        + [f"queue {name}: declared\n" for name in ALL]
    )
    assert first.stderr == second.stderr
    policies, waiting = first.stderr.splitlines()
    assert policies.startswith(
        "a policy such as delivery-limit, max-length, message-ttl or expires"
    )
    assert waiting == "waiting 3 s until the queues are safe"
    assert second.stdout == first.stdout.replace(
        "declared", "was there, RabbitMQ counts 0 messages"
    ).replace("made", "was there")
    assert arguments_of(broker) == QUEUES.arguments(queue_type)


async def test_a_queue_that_differs_is_named_with_both_values_and_nothing_is_changed(
    run: Run, vhost: str, broker: servers.Broker, shop: Connection[Cursor]
) -> None:
    wanted = QUEUES.arguments("quorum")
    connection = await aio_pika.connect(vhost)
    channel = await connection.channel()
    theirs = wanted[QUEUES.urgent] | {"x-max-length": 5}
    await channel.declare_queue(QUEUES.urgent, durable=True, arguments=theirs)
    await connection.close()

    execute(shop, "DELETE FROM aioworker_budget")

    done = run("init", AIOWORKER_AMQP_URL=vhost)

    assert rows(shop, "SELECT task FROM aioworker_budget") == []  # rows come after the queues
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"aioworker: queue {QUEUES.urgent} differs: expected x-max-length '1000000', got: '5';"
        " nothing was changed. Empty and delete the queue, then run `aioworker init` again\n"
    )
    assert arguments_of(broker) == {QUEUES.urgent: theirs}


def test_a_table_that_lacks_a_column_is_given_it(
    run: Run, vhost: str, shop: Connection[Cursor]
) -> None:
    """To drop the table, as was advised, forgets the pause that a DBA set."""
    execute(
        shop,
        "UPDATE aioworker_budget SET paused = TRUE",
        "ALTER TABLE aioworker_budget DROP COLUMN gap_us, DROP COLUMN set_by",
    )

    done = run("init", AIOWORKER_AMQP_URL=vhost)

    assert (done.returncode, done.stdout.splitlines()[:2]) == (
        0,
        ["table aioworker_budget: added gap_us, set_by", "table aioworker_worker: was there"],
    )
    assert rows(shop, "SELECT paused, gap_us, set_by FROM aioworker_budget") == [(1, None, None)]


def test_a_lock_is_waited_for_however_short_a_task_may_be(
    start: Callable[..., Worker], vhost: str, pair: servers.Servers, shop: Connection[Cursor]
) -> None:
    """A task's timeout of a second ended it at the first try, and nobody was named."""
    execute(shop, "ALTER TABLE aioworker_budget DROP COLUMN gap_us")
    with servers.connect(pair.mysql_url) as theirs:
        execute(theirs, "LOCK TABLES aioworker_budget READ")
        init = start("init", AIOWORKER_AMQP_URL=vhost, AIOWORKER_TASK_TIMEOUT="1")
        words = "waiting for a lock on table aioworker_budget: "
        eventually(lambda: words in init.log or init.process.poll() is not None, "it waits")

    assert init.process.wait(60) == 0, init.log
    assert words in init.log
    assert "table aioworker_budget: added gap_us\n" in init.log


async def test_a_look_at_the_grants_that_takes_too_long_is_the_databases_error(
    pair: servers.Servers, shop: Connection[Cursor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was an unexpected TimeoutError, without the server's name."""
    for name, value in pair.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(init, "DATABASE_SECONDS", 1.0)
    monkeypatch.setattr(grants, "_GRANTED", "SELECT 1, 2, SLEEP(20)")

    with pytest.raises(DatabaseError, match=r"^cannot use MySQL at mysql://.*: no answer in time"):
        await init.init(Settings.load(), [], Mock(), Mock())


def test_no_table_is_changed_on_a_server_that_only_reads(
    run: Run, vhost: str, broker: servers.Broker, shop: Connection[Cursor]
) -> None:
    """Some users may write there; the same change from its primary would end its replication."""
    execute(shop, "ALTER TABLE aioworker_budget DROP COLUMN last_write", "SET GLOBAL read_only = 1")
    try:
        done = run("init", AIOWORKER_AMQP_URL=vhost)
    finally:
        execute(shop, "SET GLOBAL read_only = 0")

    assert (done.returncode, done.stdout, arguments_of(broker)) == (1, "", {})
    assert "this server only reads: is it a replica?" in done.stderr
    assert rows(shop, "SHOW COLUMNS FROM aioworker_budget LIKE 'last_write'") == []


def test_no_queue_is_declared_by_a_user_who_may_make_no_table(
    run: Run, vhost: str, broker: servers.Broker, maria: servers.Maria, shop: Connection[Cursor]
) -> None:
    execute(shop, f"DROP TABLE {', '.join(schema.NAMES)}")
    execute(
        shop, "DROP USER IF EXISTS reader", "CREATE USER reader", "GRANT SELECT ON *.* TO reader"
    )
    address = {"AIOWORKER_AMQP_URL": vhost, "AIOWORKER_MYSQL_URL": maria.url("aioworker", "reader")}

    done = run("init", **address)

    execute(shop, "DROP USER reader")
    assert (done.returncode, done.stdout, arguments_of(broker)) == (1, "", {})
    assert "(1142)" in done.stderr


def test_a_worker_of_its_own_budget_needs_no_database_to_set_up(run: Run, vhost: str) -> None:
    """For those who may not create a table."""
    nowhere = "mysql://root@127.0.0.1:1/nowhere"
    variables = {"AIOWORKER_AMQP_URL": vhost, "AIOWORKER_BUDGET": "worker"}

    done = run("init", AIOWORKER_MYSQL_URL=nowhere, **variables)

    assert (done.returncode, "table" in done.stdout) == (0, False)


async def test_a_queue_of_another_type_is_named_with_both(
    run: Run, vhost: str, shop: Connection[Cursor]
) -> None:
    connection = await aio_pika.connect(vhost)
    await declare(connection, queue_type="classic")
    await connection.close()

    done = run("init", AIOWORKER_AMQP_URL=vhost)

    assert done.returncode == 1
    assert f"queue {QUEUES.dead} differs: expected x-queue-type 'quorum', got: 'classic'" in (
        done.stderr
    )


def printed(text: str, start: str) -> list[str]:
    """Return the lines of `init --print` that begin so."""
    return [line for line in text.splitlines() if line.startswith(start)]


async def test_with_exactly_the_printed_privileges_everything_works(
    run: Run,
    vhost: str,
    broker: servers.Broker,
    maria: servers.Maria,
    shop: Connection[Cursor],
) -> None:
    """Two users who may do what is printed and nothing else, in the broker and the database."""
    simple_addons(shop, 2000)
    execute(shop, "CREATE OR REPLACE USER worker IDENTIFIED BY 's3cret'")
    broker.control("add_user", "zamboni", "s3cret")
    variables = {
        "AIOWORKER_AMQP_URL": broker.url("fresh", "zamboni", "s3cret"),
        "AIOWORKER_MYSQL_URL": maria.url("aioworker", "worker", "s3cret"),
    }
    text = run("init", "--print", **variables).stdout
    assert "s3cret" not in text
    for_init, for_worker, *_others = printed(text, "rabbitmqctl ")
    execute(shop, *printed(text, "GRANT "))
    try:
        broker.control(*shlex.split(for_init)[1:])
        assert run("init", **variables).returncode == 0
        broker.control(*shlex.split(for_worker)[1:])

        assert run("publish-all", **variables).stdout.startswith("published 2 chunks, 2000 ids")
        assert run("publish", "7", **variables).returncode == 0
        lanes = await aio_pika.connect(vhost)
        channel = await lanes.channel()
        await channel.default_exchange.publish(aio_pika.Message(b"bad"), QUEUES.bulk)
        burst = ("--burst", "--rate-limit", "100/s")
        done = run("consume", *burst, **variables, **ONE_A_START)

        assert done.stdout == summary(3, dead_letters=1)
        assert current_versions(shop) == {n: n + 10_000 for n in range(1, 2001)}
        assert await queues.count(lanes, QUEUES.dead, 10) == 1
        await lanes.close()
        # No more than that: it may neither declare nor write another column.
        assert run("init", **variables).returncode == 1
        grants = [grant for [grant] in rows(shop, "SHOW GRANTS FOR worker") if "USAGE" not in grant]
        assert sorted(grants) == sorted(
            [
                "GRANT SELECT ON `aioworker`.`files` TO `worker`@`%`",
                "GRANT SELECT ON `aioworker`.`versions` TO `worker`@`%`",
                "GRANT SELECT, INSERT, UPDATE ON `aioworker`.`aioworker_budget` TO `worker`@`%`",
                "GRANT SELECT, INSERT, UPDATE, DELETE ON `aioworker`.`aioworker_run`"
                " TO `worker`@`%`",
                "GRANT SELECT, INSERT, UPDATE, DELETE ON `aioworker`.`aioworker_worker`"
                " TO `worker`@`%`",
                "GRANT SELECT, INSERT, UPDATE, DELETE ON `aioworker`.`aioworker_start`"
                " TO `worker`@`%`",
                "GRANT SELECT, INSERT, DELETE ON `aioworker`.`aioworker_change` TO `worker`@`%`",
                "GRANT SELECT, UPDATE (`current_version`) ON `aioworker`.`addons` TO `worker`@`%`",
            ]
        )
    finally:
        broker.control("delete_user", "zamboni")
        execute(shop, "DROP USER worker")


@pytest.mark.parametrize(
    ("number", "commands"),
    [
        (0, [("init",)]),
        (1, [("consume", "--burst"), ("dead", "list"), ("dead", "requeue")]),
        (2, [("publish", "1"), ("publish-all", "--append")]),
        (3, [("status",)]),
    ],
    ids=["init", "consume and dead", "publish", "status"],
)
async def test_each_printed_right_is_enough_and_none_is_too_much(
    run: Run,
    vhost: str,
    broker: servers.Broker,
    shop: Connection[Cursor],
    number: int,
    commands: list[tuple[str, ...]],
) -> None:
    """A publisher's were those of a worker, which reads all queues."""
    simple_addons(shop, 1)
    connection = await aio_pika.connect(vhost)
    if number:
        await declare(connection)
    channel = await connection.channel()
    broker.control("add_user", "least", "s3cret")
    variables = {"AIOWORKER_AMQP_URL": broker.url("fresh", "least", "s3cret")}
    text = run("init", "--print", **variables).stdout
    arguments = shlex.split(printed(text, "rabbitmqctl ")[number])[1:]
    rights = arguments[-3:]

    async def lay() -> None:
        for queue in (QUEUES.bulk, QUEUES.dead) if number == 1 else ():
            await channel.default_exchange.publish(aio_pika.Message(b"x"), queue)

    try:
        for place in [place for place, right in enumerate(rights) if right]:
            less = [right if at != place else "" for at, right in enumerate(rights)]
            broker.control(*arguments[:-3], *less)
            await lay()
            failed = [command for command in commands if run(*command, **variables).returncode]
            assert failed, less
        broker.control(*arguments)
        for command in commands:
            await lay()
            done = run(*command, **variables)
            refused = command[0] == "consume"  # a letter's body is none
            assert (done.returncode, "ACCESS_REFUSED" in done.stderr) == (refused, False), done
    finally:
        await connection.close()
        broker.control("delete_user", "least")


async def test_the_printed_statements_are_those_the_server_sees(
    run: Run, lanes: Lanes, shop: Connection[Cursor]
) -> None:
    """Each names aioworker, as the list of processes shows it."""
    text = run("init", "--print").stdout
    statements = [part.strip() for part in text.split("page sizes\n")[1].split(";\n") if part]
    assert len(statements) == 3
    assert all("/* aioworker update_current_version */" in one for one in statements)
    simple_addons(shop, 1)
    execute(shop, "SET GLOBAL log_output = 'TABLE'", "SET GLOBAL general_log = 1")
    try:
        run("publish-all")
        run("consume", "--burst")
    finally:
        execute(shop, "SET GLOBAL general_log = 0")

    logged = [
        statement if isinstance(statement, str) else bytes(statement).decode()
        for [statement] in rows(shop, "SELECT argument FROM mysql.general_log")
    ]
    ours = [one for one in logged if "aioworker update_current_version" in one]
    assert {one.split("JSON_TABLE(")[0] for one in ours if "JSON_TABLE" in one} == {
        one.split("JSON_TABLE(")[0] for one in statements if "JSON_TABLE" in one
    }
    assert any(one.startswith(statements[0].split("%s")[0]) for one in ours)
    execute(shop, "TRUNCATE TABLE mysql.general_log")


def test_what_is_printed_holds_names_with_quotes_in_them(
    run: Run, broker: servers.Broker, shop: Connection[Cursor]
) -> None:
    """They are pasted into a shell and a client of MySQL: a quote must not end a name."""
    execute(
        shop,
        "DROP USER IF EXISTS 'o''neil'@'%'",
        "CREATE USER 'o''neil'@'%'",
        "DROP DATABASE IF EXISTS `b``c`",
        "CREATE DATABASE `b``c`",
        *(f"CREATE TABLE `b``c`.{name} (id INT, current_version INT)" for name in MAIN_TABLES),
    )
    done = run(
        "init",
        "--print",
        AIOWORKER_AMQP_URL="amqp://o%27neil:x@h/it%27s%20%24HOME",
        AIOWORKER_MYSQL_URL="mysql://o%27neil@h/b%60c",
    )

    for line in printed(done.stdout, "rabbitmqctl "):
        assert shlex.split(line)[2:5] == ["-p", "it's $HOME", "o'neil"]
    execute(shop, *printed(done.stdout, "GRANT "))
    grants = rows(shop, "SHOW GRANTS FOR 'o''neil'@'%'")
    execute(shop, "DROP DATABASE `b``c`", "DROP USER 'o''neil'@'%'")
    assert len(grants) == 1 + len(MAIN_TABLES)


def test_printing_needs_no_server(run: Run) -> None:
    done = run(
        "init", "--print", AIOWORKER_AMQP_URL="amqp://h:1/", AIOWORKER_MYSQL_URL="mysql://h:1/d"
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[1] for line in printed(done.stdout, "queue ")] == list(ALL)


def test_a_replica_is_only_read_by_tasks_of_ones_own_too(run: Run, tmp_path: Path) -> None:
    """What they need is theirs to know: whose right each line is about is printed above it."""
    (tmp_path / "sale.py").write_text(
        "from aioworker import task\n\n@task(name='shop.sale')\ndef sale() -> None: ...\n"
    )
    replica = "AIOWORKER_MYSQL_READ_URL"

    done = run(
        *("init", "--print", "--app", "sale"),
        PYTHONPATH=importable(tmp_path),
        AIOWORKER_AMQP_URL="amqp://h:1/",
        AIOWORKER_MYSQL_URL="mysql://h:1/d",
        **{replica: "mysql://reader@h:1/d"},
    )

    comments = [line for line in printed(done.stdout, "#") if " read" in line or "least" in line]
    assert comments[-4:] == [
        "# MySQL: the least that the user of consume and publish-all needs",
        "# and what the tasks themselves read and write",
        f"# MySQL: the least that the user of {replica} needs",
        "# and what the tasks' keys and needed read",
    ]
