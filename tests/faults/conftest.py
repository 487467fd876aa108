"""Places that end with their test, and servers that are whole again after a fault."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support import servers
from tests.conftest import eventually
from tests.place import Place

MakePlace = Callable[..., Place]
LONGEST_FIRST = (
    "test_broker",
    "test_worker",
    "test_gathering",
    "test_cluster",
    "test_waiting",
    "test_soak",
    "test_database",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that all of it ends sooner."""
    rank = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture
def make_place(private: servers.Servers, tmp_path: Path) -> Iterator[MakePlace]:
    """Make places that are ended with the test."""
    made: list[Place] = []

    def make(**options: int | None) -> Place:
        made.append(Place(private, tmp_path, **options))
        return made[-1]

    yield make
    for place in made:
        place.end()


@pytest.fixture
def place(make_place: MakePlace) -> Place:
    """A place of the test's own."""
    return make_place()


def within(seconds: float, holds: Callable[[], object], what: str) -> float:
    """Wait until something holds, and return how long it took; fail after *seconds*."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < seconds, f"not within {seconds:g} s: {what}"
        time.sleep(0.02)
    return time.monotonic() - began


@contextmanager
def away(broker: servers.Broker, end: Callable[[], None]) -> Iterator[list[float]]:
    """End the broker before the block and start it after.

    The list gets the moment at which it served again, in seconds since 1970: its port is open
    before, for many seconds on a busy machine.
    """
    served: list[float] = []
    end()
    try:
        yield served
    finally:
        broker.start()
        served.append(time.time())


@contextmanager
def frozen(broker: servers.Broker) -> Iterator[None]:
    """Let the broker stand still: its port accepts, and nobody answers."""
    pid = int(broker.control("eval", "os:getpid().").strip().strip('"'))
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextmanager
def alarmed(broker: servers.Broker, resource: str = "memory") -> Iterator[None]:
    """Let the broker be out of memory or disk, as it counts it."""
    out_of = {
        "memory": ("set_vm_memory_high_watermark", "0.00001"),
        "disk": ("set_disk_free_limit", "9000GB"),
    }
    broker.control(*out_of[resource])
    try:
        eventually(
            lambda: resource in broker.control("eval", "rabbit_alarm:get_alarms()."),
            "the alarm is raised",
        )
        yield
    finally:
        broker.control("set_vm_memory_high_watermark", "absolute", "512MB")
        broker.control("set_disk_free_limit", "50MB")
