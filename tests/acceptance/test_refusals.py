"""RabbitMQ's refusals: each is told by its own words, and advises nothing that it does not mean."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import aio_pika
import pytest

from support import servers
from tests.conftest import QUEUES, Run

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

HOST, USER = "limited", "somebody"


@pytest.fixture
def limited(broker: servers.Broker) -> Iterator[servers.Broker]:
    """The node, with a virtual host and a user of the test's own."""
    broker.control("add_vhost", HOST)
    broker.control("add_user", USER, "s3cret")
    broker.control("set_permissions", "-p", HOST, USER, ".*", ".*", ".*")
    yield broker
    broker.control("delete_user", USER)
    broker.control("delete_vhost", HOST)


def publish(run: Run, *urls: str) -> str:
    """Return what `publish` says when it cannot."""
    done = run("publish", "1", AIOWORKER_AMQP_URL=",".join(urls))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1, done.stderr
    assert "s3cret" not in done.stderr
    return done.stderr.removeprefix("aioworker: ").rstrip("\n")


def test_a_limit_of_queues_is_no_difference(
    run: Run, limited: servers.Broker, shop: Connection[Cursor]
) -> None:
    """`init` said that a queue differed, and to empty and delete it; two were made."""
    limited.control("set_vhost_limits", "-p", HOST, '{"max-queues": 2}')

    done = run("init", AIOWORKER_AMQP_URL=limited.url(HOST, USER, "s3cret"))

    assert done.returncode == 1
    assert done.stdout.splitlines()[-2:] == [
        f"queue {QUEUES.dead}: declared",
        f"queue {QUEUES.bulk}: declared",
    ]
    assert done.stderr == (
        f"aioworker: RabbitMQ refuses a step about queue {QUEUES.urgent}: PRECONDITION_FAILED -"
        f" cannot declare queue '{QUEUES.urgent}': queue limit in vhost '{HOST}' (2) is reached;"
        f" declared before that: {QUEUES.dead}, {QUEUES.bulk}\n"
    )


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        (
            ("set_vhost_limits", "-p", HOST, '{"max-connections": 0}'),
            f"RabbitMQ refuses: NOT_ALLOWED - access to vhost '{HOST}' refused for user"
            f" '{USER}': connection limit (0) is reached",
        ),
        (
            ("set_user_limits", USER, '{"max-connections": 0}'),
            f"RabbitMQ refuses: NOT_ALLOWED - connection refused for user '{USER}': user"
            " connection limit (0) is reached",
        ),
        (("clear_permissions", "-p", HOST, USER), f"virtual host '{HOST}' is not open to user"),
    ],
)
def test_who_is_not_let_in_is_told_why(
    run: Run, limited: servers.Broker, limit: tuple[str, ...], words: str
) -> None:
    """All of them were a virtual host that does not exist."""
    limited.control(*limit)

    said = publish(run, limited.url(HOST, USER, "s3cret"))

    at = f"cannot connect to RabbitMQ at amqp://{USER}@127.0.0.1:{limited.port}/{HOST}: "
    assert said.startswith(at + words)
    assert said.endswith(", check AIOWORKER_AMQP_URL")
    assert "does not exist" not in said


def test_a_limit_of_channels_is_no_lost_connection(run: Run, limited: servers.Broker) -> None:
    limited.control("set_user_limits", USER, '{"max-channels": 0}')

    said = publish(run, limited.url(HOST, USER, "s3cret"))

    assert re.search("number of channels opened for user '.+' has reached the maximum", said)
    assert "lost" not in said


def test_every_node_that_was_tried_is_named_with_its_own_reason(
    run: Run, limited: servers.Broker
) -> None:
    """Only the last one's was told, which may be the only one that is meant to be away."""
    said = publish(
        run,
        limited.url("nowhere", USER, "s3cret"),
        f"amqp://{USER}:s3cret@127.0.0.1:1/{HOST}",
        limited.url(HOST, USER, "wrong-s3cret"),
    )

    assert said == (
        f"cannot connect to RabbitMQ at amqp://{USER}@127.0.0.1:{limited.port}/nowhere: virtual"
        f" host 'nowhere' does not exist; at amqp://{USER}@127.0.0.1:1/{HOST}: [Errno 111]"
        " Connect call failed ('127.0.0.1', 1); is it running?; at"
        f" amqp://{USER}@127.0.0.1:{limited.port}/{HOST}: user or password refused,"
        " check AIOWORKER_AMQP_URL"
    )


async def test_a_queue_of_another_connection_alone_is_told(
    run: Run, limited: servers.Broker, shop: Connection[Cursor]
) -> None:
    limited.control("set_permissions", "-p", HOST, "guest", ".*", ".*", ".*")
    connection = await aio_pika.connect(limited.url(HOST))
    channel = await connection.channel()
    await channel.declare_queue(QUEUES.dead, exclusive=True)

    done = run("dead", "list", AIOWORKER_AMQP_URL=limited.url(HOST, USER, "s3cret"))

    assert done.returncode == 1
    assert f"RabbitMQ refuses a step about queue {QUEUES.dead}: RESOURCE_LOCKED - " in done.stderr
    await connection.close()
