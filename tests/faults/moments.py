"""The moments of a start at which a fault may strike, and what must hold after any of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from support import servers
from tests.conftest import DEADLINE_SECONDS, eventually, rows
from tests.faults.conftest import MakePlace
from tests.place import NOTHING, Place, chunk

if TYPE_CHECKING:
    from tests.faults.proxy import Proxy

FAST = ("--rate-limit", "100/s")
SLOW_SECONDS = 3
# What a worker sends, each for the first time, in a start for add-on 1.
NEEDED = b"JSON_TABLE('[1]'"
WRITE = b"JSON_TABLE('[[1,"
STAMP = b"SET last_write = @aioworker_now"
COMMIT = b"\x03COMMIT"  # a packet of its own: a charge ends by one, too


def says(place: Place, beginning: str) -> bool:
    """Whether every worker of a place gives a reason that begins so."""
    reasons = place.reasons()
    return bool(reasons) and all(reason.startswith(beginning) for reason in reasons)


def idle(place: Place, _network: Proxy) -> None:
    """Add-on 1 is done, and nothing is left to do."""
    place.publish(chunk(1))
    eventually(lambda: place.done() == 1 and says(place, "nothing queued"), "it is idle")


def in_an_update(place: Place, _network: Proxy) -> None:
    """The server runs the write of add-on 1, for three seconds."""
    place.slow(SLOW_SECONDS)
    place.publish(chunk(1))
    eventually(place.writing, "the write runs")


def after_its_get(place: Place, network: Proxy) -> None:
    """A message is taken, and the server is about to be asked what it needs."""
    hold(place, network, NEEDED)


def after_its_charge(place: Place, network: Proxy) -> None:
    """A start is charged, and nothing is written."""
    hold(place, network, WRITE)


def before_its_stamp(place: Place, network: Proxy) -> None:
    """The server has written add-on 1; the budget's row is next."""
    hold(place, network, STAMP)


def before_its_commit(place: Place, network: Proxy) -> None:
    """The server has written all of the transaction, and waits for its end."""
    hold(place, network, COMMIT)


def hold(place: Place, network: Proxy, pattern: bytes, most: int = 1) -> None:
    """Queue add-ons 1 to *most* for a worker, and hold it when it sends a pattern for them."""
    eventually(lambda: says(place, "nothing queued"), "it has connected")
    held = network.hold_at(pattern)
    place.publish(chunk(*range(1, most + 1)))
    assert held.wait(DEADLINE_SECONDS)


def at_once(
    private: servers.Servers, folder: Path, plays: Mapping[str, Callable[[MakePlace], None]]
) -> dict[str, Future[None]]:
    """Play scenarios to their ends at the same time, each in places of its own."""

    def play(name: str) -> None:
        with ExitStack() as stack:

            def make(**options: int | None) -> Place:
                place = Place(private, folder / name, **options)
                stack.callback(place.end)
                return place

            plays[name](make)

    with ThreadPoolExecutor(len(plays)) as pool:
        return {name: pool.submit(play, name) for name in plays}


def assert_each_done_once(place: Place, chunks: int, *, killed_anywhere: bool = False) -> None:
    """Every add-on is written once, no message is left, and no worker counts as dead.

    Args:
        place: Where.
        chunks: How many add-ons there are.
        killed_anywhere: Whether workers were killed at any moment. One that dies between the
            acknowledgement and the end of its note leaves a death of a message that is gone.
    """
    notes = "SELECT message FROM aioworker_run WHERE worker IS NOT NULL OR NOT %s"
    eventually(lambda: place.done() == chunks, "all is done")
    eventually(lambda: place.queued() == NOTHING, "all is settled")
    eventually(lambda: rows(place.shop, notes, killed_anywhere) == [], "no run is noted")
    assert sorted(place.written()) == list(range(1, chunks + 1))
