"""A cluster of three: its leader dies or stands still, or the node in use is cut off.

All nodes have RabbitMQ's own way with partitions, which is to do nothing. Every queue has a
member on each, its leader on the node that the fault strikes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from aio_pika.exceptions import DeliveryError

from support import servers
from tests.conftest import QUEUES, eventually, simple_addons
from tests.faults.conftest import frozen, within
from tests.faults.moments import assert_each_done_once, says
from tests.place import Place, chunk

if TYPE_CHECKING:
    from subprocess import CompletedProcess

TICK_SECONDS = 20  # a node that stands still is noticed after that, and a quarter
RATE, INTERVAL, LEAST_GAP = "2/s", 0.5, 0.98
# RabbitMQ's own election, up to 25 s where a node stands still; thrice what that takes at most.
LATE_SECONDS = 75
NOTICE_SECONDS = 10  # in which an idle worker finds the nodes that serve again
SOON = {"AIOWORKER_CONNECT_TIMEOUT": "2"}
LOOKS = ("status", f"consume --burst --rate-limit {RATE}", "dead list")

_LEAD = """
[rabbit_quorum_queue:transfer_leadership(Queue, '{node}')
    || Queue <- rabbit_amqqueue:list(<<"{host}">>)]."""
_LEADERS = """
[element(2, amqqueue:get_pid(Queue)) || Queue <- rabbit_amqqueue:list(<<"{host}">>)]."""
_CUT = """
[begin erlang:set_cookie(Node, wrong), erlang:disconnect_node(Node) end || Node <- nodes()]."""
_JOIN = "[erlang:set_cookie(list_to_atom(Node), erlang:get_cookie()) || Node <- {}]."


@pytest.fixture(scope="module")
def cluster() -> Iterator[servers.Cluster]:
    """The cluster; whole again after each test."""
    with servers.cluster(TICK_SECONDS) as started:
        yield started


class Trio(Place):
    """A place on a cluster, whose workers know all nodes.

    Attributes:
        struck: The first node of their address.
        witness: One that is asked what became of the messages.
    """

    def __init__(self, private: servers.Servers, cluster: servers.Cluster, folder: Path) -> None:
        self.struck, self.other, self.witness = cluster.nodes
        # Each message fills a start.
        super().__init__(replace(private, broker=self.witness), folder, chunk_size=1)
        self.through = servers.Servers(
            ",".join(self.node_urls(*cluster.nodes)), self.servers.mysql_url
        )

    def node_urls(self, *nodes: servers.Broker) -> list[str]:
        """Return the addresses of nodes."""
        return [node.url(self.name) for node in nodes]

    def ask(self, at: servers.Broker) -> list[CompletedProcess[str]]:
        """Run commands that ask one node what is there, and return what they say."""

        def run(command: str) -> CompletedProcess[str]:
            return self.run(*command.split(), AIOWORKER_AMQP_URL=at.url(self.name), **SOON)

        with ThreadPoolExecutor() as pool:
            return list(pool.map(run, LOOKS))

    def assert_moves(self) -> None:
        """Starts begin again, soon."""
        done = self.done()
        within(LATE_SECONDS, lambda: self.done() >= done + 2, "it works")

    def takes(self, body: bytes) -> bool:
        """Publish a message; return whether RabbitMQ took it: without a leader it does not."""
        try:
            self.publish(body)
        except DeliveryError:
            return False
        return True

    def lead(self, node: servers.Broker) -> None:
        """Have all queues led by a node, and every node know it."""
        self.witness.control("eval", _LEAD.format(node=node.name, host=self.name))

        def led() -> bool:
            return all(self.leaders(asked) == {node.name} for asked in (node, self.witness))

        eventually(led, f"{node.name} leads")

    def leaders(self, asked: servers.Broker) -> set[str]:
        """Return the nodes that lead a queue, as one of them knows it."""
        told = asked.control("eval", _LEADERS.format(host=self.name))
        return set(re.findall(r"private\d+@localhost", told))


@pytest.fixture
def trio(private: servers.Servers, cluster: servers.Cluster, tmp_path: Path) -> Iterator[Trio]:
    """A place on the cluster, the first node the leader of its queues."""
    made = Trio(private, cluster, tmp_path)
    made.lead(made.struck)
    yield made
    made.end()


@contextmanager
def cut_off(node: servers.Broker, others: list[servers.Broker]) -> Iterator[None]:
    """Let the other nodes and this one not reach each other."""
    node.control("eval", _CUT)
    try:
        yield
    finally:
        names = ", ".join(f'"{other.name}"' for other in others)
        node.control("eval", _JOIN.format(f"[{names}]"))


def start_anew(*nodes: servers.Broker) -> None:
    """Kill nodes and start them again, one after the other."""
    for node in nodes:
        node.kill()
        node.start()


def assert_kept(trio: Trio, chunks: int) -> None:
    """Nothing is lost or done twice, the rate is kept, and no start was missing for long."""
    assert_each_done_once(trio, chunks)
    gaps = [after.first - before.first for before, after in pairwise(trio.starts())]
    assert min(gaps) >= INTERVAL * LEAST_GAP
    assert max(gaps) < LATE_SECONDS


def assert_unknown(done: CompletedProcess[str]) -> None:
    """A command says in one line that RabbitMQ does not tell what it asks for."""
    assert done.returncode == 1, done
    assert "queue aioworker." in done.stdout + done.stderr
    assert not re.search("nothing queued|broker +reachable|done 0", done.stdout), done


@pytest.mark.timeout(300)
def test_a_node_after_the_other_is_killed_and_started(trio: Trio, cluster: servers.Cluster) -> None:
    """As in a rolling upgrade that goes badly: each was the leader once."""
    trio.backlog(120)
    trio.worker("--rate-limit", RATE)
    trio.assert_moves()

    for node in cluster.nodes:
        trio.lead(node)
        node.kill()
        trio.assert_moves()
        node.start()

    assert_kept(trio, 120)


@pytest.mark.timeout(300)
def test_a_leader_that_stands_still(trio: Trio) -> None:
    """RabbitMQ counts no message in its queues then, though another leader is elected soon."""
    trio.backlog(30)
    trio.publish(b"no letter", lane=QUEUES.dead)
    trio.worker("--rate-limit", RATE)
    trio.assert_moves()

    with frozen(trio.struck):
        for done in trio.ask(trio.witness):
            assert_unknown(done)
        trio.assert_moves()
    start_anew(trio.struck)

    assert trio.take(QUEUES.dead) == [b"no letter"]
    assert_kept(trio, 30)


@pytest.mark.timeout(300)
def test_the_node_in_use_is_cut_off_from_the_others(trio: Trio) -> None:
    """It lets everybody connect and serves nothing; the others have elected new leaders."""
    trio.backlog(30)
    worker = trio.worker("--rate-limit", RATE)
    trio.assert_moves()

    with cut_off(trio.struck, [trio.other, trio.witness]):
        trio.assert_moves()
        assert f":{trio.struck.port}/{trio.name}: RabbitMQ did not answer in time" in worker.log
        for done in trio.ask(trio.struck):
            assert_unknown(done)
    start_anew(trio.struck)

    assert_kept(trio, 30)


@pytest.mark.timeout(300)
def test_an_idle_worker_leaves_the_node_that_is_cut_off(trio: Trio) -> None:
    """That node counts no message, whatever the others hold: it is not believed for long."""
    simple_addons(trio.shop, 2)
    trio.publish(chunk(1))
    worker = trio.worker("--rate-limit", RATE)
    eventually(lambda: trio.done() == 1 and says(trio, "nothing queued"), "it is idle")

    with cut_off(trio.struck, [trio.other, trio.witness]):
        within(LATE_SECONDS, lambda: trio.takes(chunk(2)), "the others have a leader")
        within(NOTICE_SECONDS, lambda: trio.done() == 2, "it starts there")
        assert f":{trio.struck.port}/{trio.name}: RabbitMQ did not answer in time" in worker.log
    start_anew(trio.struck)

    assert_each_done_once(trio, 2)
