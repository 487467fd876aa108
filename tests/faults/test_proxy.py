"""The network of the tests does to a connection what it is told, and no more."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from support.servers import HOST
from tests.faults.proxy import RESET, Proxy

SECONDS = 10
MOMENT = 0.2  # what passes has passed by then


class Network:
    """A server, a proxy in front of it, and their connections, ended with the test."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._listener = stack.enter_context(socket.create_server((HOST, 0)))
        self._listener.settimeout(SECONDS)
        self.proxy = stack.enter_context(Proxy(self._listener.getsockname()[1]))

    def client(self) -> socket.socket:
        """Connect a client."""
        made = socket.create_connection((HOST, self.proxy.port), SECONDS)
        return self._stack.enter_context(made)

    def pair(self) -> tuple[socket.socket, socket.socket]:
        """Connect a client through to the server; return both ends."""
        client, server = self.client(), self.accept()
        server.sendall(b"welcome")
        assert client.recv(99) == b"welcome"
        return client, server

    def accept(self) -> socket.socket:
        """Return what the server gets for the next client."""
        server = self._stack.enter_context(self._listener.accept()[0])
        server.settimeout(SECONDS)
        return server


@pytest.fixture
def network() -> Iterator[Network]:
    """A network in order."""
    with ExitStack() as stack:
        yield Network(stack)


def silent(end: socket.socket) -> bool:
    """Whether nothing comes for a moment, not even an end."""
    end.settimeout(MOMENT)
    try:
        end.recv(1)
    except TimeoutError:
        return True
    finally:
        end.settimeout(SECONDS)
    return False


def test_it_forwards_both_ways_up_to_the_end(network: Network) -> None:
    client, server = network.pair()

    client.sendall(b"question")
    assert server.recv(99) == b"question"
    server.sendall(b"answer")
    assert client.recv(99) == b"answer"
    client.close()

    assert server.recv(99) == b""
    assert network.proxy.accepted == 1


def test_a_delay_is_that_of_each_direction(network: Network) -> None:
    client, server = network.pair()
    network.proxy.delay(MOMENT)
    began = time.monotonic()

    client.sendall(b"question")
    server.sendall(server.recv(99))

    assert client.recv(99) == b"question"
    assert time.monotonic() - began >= 2 * MOMENT


def test_what_is_sent_while_another_piece_is_under_way_waits_no_longer(network: Network) -> None:
    client, server = network.pair()
    network.proxy.delay(10 * MOMENT)

    client.sendall(b"one")
    time.sleep(2 * MOMENT)  # a piece of its own
    client.sendall(b"two")

    assert server.recv(3) == b"one"
    began = time.monotonic()
    assert server.recv(3) == b"two"
    assert time.monotonic() - began < 8 * MOMENT


def test_a_black_hole_forwards_nothing_until_it_ends(network: Network) -> None:
    """Not on what is open, nor on what is opened in it, nor that a client has gone."""
    client, server = network.pair()
    network.proxy.black_hole()
    second = network.client()

    client.sendall(b"one")
    second.sendall(b"two")
    client.close()
    assert silent(server)
    network.proxy.forward()

    assert (server.recv(99), server.recv(99)) == (b"one", b"")
    assert network.accept().recv(99) == b"two"


def test_a_reset_reaches_both_sides_and_refuses_new_ones(network: Network) -> None:
    client, server = network.pair()

    network.proxy.reset()

    for end in (client, server):
        with pytest.raises(ConnectionResetError):
            end.recv(1)
    with pytest.raises(ConnectionRefusedError):
        network.client()
    network.proxy.forward()
    client, server = network.pair()
    client.sendall(b"again")
    assert server.recv(99) == b"again"


def test_a_half_close_leaves_the_other_direction_open(network: Network) -> None:
    client, server = network.pair()

    network.proxy.half_close("server")

    assert server.recv(99) == b""
    server.sendall(b"still there")
    assert client.recv(99) == b"still there"


@pytest.mark.parametrize("before", [b"", b"UPD"])
def test_it_holds_one_client_at_what_it_sends(network: Network, before: bytes) -> None:
    """The server's words and other clients' still pass; at the release everything goes on."""
    client, server = network.pair()
    other, others_server = network.pair()
    held = network.proxy.hold_at(b"UPDATE")

    if before:
        client.sendall(before)
        assert server.recv(99) == before
    client.sendall(b"UPDATE".removeprefix(before))
    assert held.wait(SECONDS)
    client.sendall(b" COMMIT")
    other.sendall(b"UPDATE")
    server.sendall(b"hello")

    assert others_server.recv(99) == b"UPDATE"
    assert client.recv(99) == b"hello"
    assert silent(server)
    network.proxy.release()
    assert server.recv(99) == b"UPDATE COMMIT".removeprefix(before)


def test_what_passed_before_holds_nobody(network: Network) -> None:
    client, server = network.pair()
    client.sendall(b"UPDATE")
    assert server.recv(99) == b"UPDATE"

    network.proxy.hold_at(b"UPDATE")
    client.sendall(b" COMMIT")

    assert server.recv(99) == b" COMMIT"


@pytest.mark.parametrize("reset", [False, True])
def test_a_client_that_goes_away_takes_with_it_what_is_held(
    network: Network, *, reset: bool
) -> None:
    """A worker that is killed there has not sent it, whether or not it left something unread."""
    client, server = network.pair()
    held = network.proxy.hold_at(b"UPDATE")

    client.sendall(b"UPDATE")
    assert held.wait(SECONDS)
    if reset:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    client.close()

    assert server.recv(99) == b""


def test_a_server_that_is_not_there_ends_its_clients() -> None:
    with socket.create_server((HOST, 0)) as gone:
        port = gone.getsockname()[1]
    with Proxy(port) as proxy, socket.create_connection((HOST, proxy.port), SECONDS) as client:
        assert client.recv(99) == b""
