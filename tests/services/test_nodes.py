"""A cluster's nodes: who fails on one goes on with the next, and says which were tried."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import aio_pika
import pytest

from aioworker.addresses import BrokerAddress, Nodes
from aioworker.errors import BrokerError, QueueMissingError
from aioworker.rabbitmq.connection import connected
from aioworker.rabbitmq.publisher import Publisher
from support import servers
from tests.conftest import QUEUES, Lanes
from tests.faults.conftest import alarmed
from tests.faults.proxy import Proxy

SECONDS = 10
SHORT_SECONDS = 2
GONE = BrokerError("gone", unreachable=True)


class Cluster(NamedTuple):
    """Two nodes, and between them one that is down."""

    first: Proxy
    second: Proxy

    @property
    def nodes(self) -> Nodes:
        """The nodes, as the setting names them."""
        ports = (self.first.port, 1, self.second.port)
        urls = (f"amqp://guest:guest@{servers.HOST}:{port}/" for port in ports)
        return Nodes(BrokerAddress.parse_all(",".join(urls)))


@pytest.fixture
def cluster(broker: servers.Broker) -> Iterator[Cluster]:
    """One server, by two addresses."""
    with Proxy(broker.port) as first, Proxy(broker.port) as second:
        yield Cluster(first, second)


async def failing_on(nodes: Nodes, error: Exception) -> str:
    """Connect, fail with an error, and return what is said then."""
    with pytest.raises(type(error)) as caught:
        async with connected(nodes, SECONDS, "test"):
            raise error
    return str(caught.value)


async def test_who_fails_on_a_node_goes_round_and_names_each(cluster: Cluster) -> None:
    """A node that is cut off from the others lets everybody connect, and serves nothing."""
    nodes = cluster.nodes
    first, down, second = (node.shown for node in nodes)

    said = [await failing_on(nodes, GONE) for _ in range(3)]

    assert said[0] == said[2] == f"at {first}: gone"
    assert said[1].startswith(f"cannot connect to RabbitMQ at {down}: ")
    assert said[1].endswith(f"; at {second}: gone")


async def test_what_holds_on_every_node_names_none(cluster: Cluster) -> None:
    """A missing queue is missing on all of them; the next one is tried all the same."""
    nodes = cluster.nodes
    order = list(nodes)

    assert await failing_on(nodes, QueueMissingError("no queue")) == "no queue"

    assert list(nodes) == [*order[1:], order[0]]


async def test_an_only_node_is_not_named(broker: servers.Broker) -> None:
    """What failed on it says enough."""
    nodes = Nodes(BrokerAddress.parse_all(broker.url()))

    assert await failing_on(nodes, GONE) == "gone"


async def test_a_publisher_without_a_confirm_goes_on_with_the_next_node(
    cluster: Cluster, lanes: Lanes
) -> None:
    """Or a web server would publish nothing for as long as one node is cut off."""
    async with Publisher(cluster.nodes, SHORT_SECONDS, "test") as publisher:
        await publisher.publish(QUEUES.bulk, aio_pika.Message(b"1"))
        cluster.first.black_hole()
        with pytest.raises(BrokerError, match="did not answer in time"):
            await publisher.publish(QUEUES.bulk, aio_pika.Message(b"2"))

        await publisher.publish(QUEUES.bulk, aio_pika.Message(b"3"))

    assert [(await lanes.take(QUEUES.bulk)).body for _ in range(2)] == [b"1", b"3"]


async def test_a_publisher_stays_where_rabbitmq_is_short_of_memory(
    broker: servers.Broker, cluster: Cluster, lanes: Lanes
) -> None:
    """So is the whole cluster then; what another connection sends would only arrive late."""
    async with Publisher(cluster.nodes, SHORT_SECONDS, "test") as publisher:
        await publisher.connection()
        with alarmed(broker):
            for _ in range(2):
                with pytest.raises(BrokerError, match="did not answer in time"):
                    await publisher.publish(QUEUES.bulk, aio_pika.Message(b"1"))

        await publisher.publish(QUEUES.bulk, aio_pika.Message(b"2"))

    assert (cluster.first.accepted, cluster.second.accepted) == (1, 0)
