"""Who else writes the budget's row: told from what is read of it, over one connection."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from aioworker.budget.other_server import AGAIN_SECONDS, ALONE_SECONDS, OtherServer
from aioworker.budget.tables import Row

OURS, THEIRS = "db1:3306:1", "db2:3306:2"
LOOK_SECONDS = 2.0


def row(server: str, here: str = OURS, session: int = 7) -> Row:
    """Return a row that one server wrote, as another one answers."""
    at = datetime(2026, 11, 29, tzinfo=UTC)
    return Row(
        *("shop", False, None, 0, at, server == here, server, here, 0, session, 0, None),
        *(None, None, None, None, None, None, None, None, False, 0, 0),
        bulk_next=False,
        runs=False,
        shares=None,
        urgent_starts=0,
        running=[],
        deaths={},
        now=at,
    )


class World:
    """One row that replicates at once, and a worker on each of two servers; looks by turns."""

    def __init__(self) -> None:
        self.now = 0.0
        self.server = OURS
        self.workers = {here: OtherServer(lambda: self.now) for here in (OURS, THEIRS)}
        self.free: list[tuple[float, str]] = []

    def look(self, here: str) -> None:
        """Let a worker look, and take the row over if it wants to."""
        other = self.workers[here]
        if other.see(row(self.server, here)):
            self.server = here
            other.took_over(row(self.server, here))
        if other.reason is None:
            self.free.append((self.now, here))
        self.now += LOOK_SECONDS / 2


def test_a_row_of_another_server_is_taken_over_once_for_each_connection() -> None:
    """A failover, and one back, when the worker has connected anew."""
    other = OtherServer(lambda: 0.0)

    for session in (7, 8):
        assert other.see(row(THEIRS, session=session))
        other.took_over(row(OURS, session=session))
        assert not other.see(row(OURS, session=session))
        assert other.reason is None


def test_two_servers_that_write_one_row_let_nobody_start_until_one_of_them_stops() -> None:
    world = World()
    while world.now < 20 * ALONE_SECONDS:
        for here in (OURS, THEIRS):
            world.look(here)
    settled = [at for at, _here in world.free if at > 2 * AGAIN_SECONDS]

    assert settled == []
    assert world.workers[OURS].reason == (
        f"two servers are both writing this row, {OURS} and {THEIRS}: let all workers use the same"
        " one"
    )

    stopped = world.now
    while not settled:
        world.look(OURS)
        settled = [at for at, _here in world.free if at > stopped]
    assert world.now - stopped <= AGAIN_SECONDS + ALONE_SECONDS + 2 * LOOK_SECONDS


@pytest.mark.parametrize("session", [7, 8])
def test_a_row_that_does_not_show_what_was_written_is_read_elsewhere(session: int) -> None:
    """A proxy that sends reads to a replica: what its primary wrote is another server's there."""
    other = OtherServer(lambda: 0.0)
    for number in (7, session):
        if other.see(row(THEIRS, session=number)):
            other.took_over(row(THEIRS, session=number))

        assert other.reason is not None
        assert other.reason.startswith(
            f"reads and writes go to different servers, {OURS} and {THEIRS}: let the address lead"
        )

    assert not other.see(row(OURS))
    assert other.reason is None
