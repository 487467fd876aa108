"""Commands about dead letters whose network breaks: no number that they say is untrue."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from support import servers
from tests.conftest import AIOWORKER, COMMAND_SECONDS, DEADLINE_SECONDS, QUEUES, eventually
from tests.faults.conftest import MakePlace
from tests.faults.proxy import BASIC_ACK, Proxy
from tests.place import NOTHING, Place

LETTERS = 300
LOST = r"aioworker: connection (?:or channel )?to RabbitMQ (?:lost|closed).*; "
SILENT = r"aioworker: RabbitMQ did not answer in time.*; "


@pytest.fixture
def proxy(broker: servers.Broker) -> Iterator[Proxy]:
    """A network between a command and the broker."""
    with Proxy(broker.port) as made:
        yield made


class Ended(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str


def cut(
    place: Place, proxy: Proxy, at: bytes, how: Callable[[Proxy], None], *arguments: str
) -> Ended:
    """Run a command whose network breaks before the broker has its *at*."""
    held = proxy.hold_at(at)
    command = subprocess.Popen(
        [AIOWORKER, "dead", *arguments],
        env=place.through.environment | {"AIOWORKER_CONNECT_TIMEOUT": "2"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert held.wait(DEADLINE_SECONDS)
        how(proxy)
        proxy.release()
        out, err = command.communicate(timeout=COMMAND_SECONDS)
    finally:
        command.kill()
    return Ended(command.returncode, out, err)


@pytest.mark.parametrize(("how", "told"), [(Proxy.black_hole, SILENT), (Proxy.reset, LOST)])
def test_a_drop_that_nobody_answers_counts_nothing(
    make_place: MakePlace, proxy: Proxy, how: Callable[[Proxy], None], told: str
) -> None:
    """An acknowledgement has no answer: one that is written may never arrive."""
    place = make_place(amqp_port=proxy.port)
    place.publish(*[b"x"] * LETTERS, lane=QUEUES.dead)

    ended = cut(place, proxy, BASIC_ACK, how, "drop", "--yes")

    assert (ended.status, ended.out) == (1, "")
    assert re.fullmatch(
        told + r"dropped 0 dead letters before that(, and perhaps 1 more)?\n", ended.err
    )
    if how is Proxy.reset:
        lies_whole = NOTHING | {QUEUES.dead: (LETTERS, 0)}
        eventually(lambda: place.queued() == lies_whole, "all lie there again")


@pytest.mark.parametrize(("how", "told"), [(Proxy.black_hole, SILENT), (Proxy.reset, LOST)])
def test_a_requeue_that_is_cut_off_says_what_lies_in_both(
    make_place: MakePlace, proxy: Proxy, how: Callable[[Proxy], None], told: str
) -> None:
    """What is confirmed in its lane and not yet settled comes twice if nobody is told."""
    place = make_place(amqp_port=proxy.port)
    place.publish(*[b"x"] * LETTERS, b"the last one", lane=QUEUES.dead)

    ended = cut(place, proxy, b"the last one", how, "requeue")

    assert (ended.status, ended.out) == (1, "")
    note = r"requeued 300 dead letters before that(, of which the last (1) may lie here as well)?"
    found = re.fullmatch(told + note + r"\n", ended.err)
    assert found is not None, ended.err
    if how is Proxy.reset:
        eventually(lambda: not place.queued()[QUEUES.dead][1], "what was held is back")
        ready = place.queued()
        assert ready[QUEUES.bulk] == (LETTERS, 0)
        assert 1 <= ready[QUEUES.dead][0] <= 1 + int(found[2] or 0)


def test_a_list_that_is_cut_off_says_how_much_it_is(make_place: MakePlace, proxy: Proxy) -> None:
    """It is about to put the fifty-first back, which lies there all the same."""
    place = make_place(amqp_port=proxy.port)
    place.publish(*[b"x"] * 50, b"the next one", *[b"x"] * LETTERS, lane=QUEUES.dead)

    ended = cut(place, proxy, b"the next one", Proxy.reset, "list")

    assert (ended.status, len(ended.out.splitlines())) == (1, 51)
    assert re.fullmatch(LOST + r"listed 51 dead letters before that\n", ended.err)
    lies_whole = NOTHING | {QUEUES.dead: (51 + LETTERS, 0)}
    eventually(lambda: place.queued() == lies_whole, "all lie there again")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("command", ["list", "requeue"])
def test_a_command_that_is_ended_loses_no_letter(
    make_place: MakePlace, proxy: Proxy, command: str, number: signal.Signals
) -> None:
    """The one in hand when a signal comes is put back first; killed, it may lie there twice."""
    place = make_place(amqp_port=proxy.port)
    sent = [f"letter {n}".encode() for n in range(LETTERS)]
    place.publish(*sent, lane=QUEUES.dead)
    place.limit(QUEUES.dead, "delivery-limit", 1)
    held = proxy.hold_at(b"letter 50")
    running = place.start("dead", command)
    assert held.wait(DEADLINE_SECONDS)

    running.send_signal(number)
    proxy.release()
    said = running.communicate(timeout=COMMAND_SECONDS)[1]

    eventually(lambda: not place.queued()[QUEUES.dead][1], "what was held is back")
    lie = place.take(QUEUES.dead) + place.take(QUEUES.bulk)
    assert set(lie) == set(sent)
    if number is signal.SIGKILL:
        assert len(lie) <= LETTERS + 1
    else:
        assert len(lie) == LETTERS
        done = {"list": "listed", "requeue": "requeued"}[command]
        assert re.search(rf"stopped by {number.name}; {done} \d+ dead letters before that\n", said)
