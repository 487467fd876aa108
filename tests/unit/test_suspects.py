"""Messages that came back again and again, or whose worker died: what they may harm."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from aioworker.budget.deaths import Deaths
from aioworker.mysql.database import Answer
from aioworker.rabbitmq.delivery import SUSPECT_RETURNS
from aioworker.settling.outcome import Kind
from aioworker.settling.settler import MOST_RETURNS
from tests.doubles.gathering import INTERVAL, Gathering, Ids, come_back
from tests.fakes import FakeClock


async def test_what_came_back_again_and_again_runs_alone(clock: FakeClock) -> None:
    gathering = Gathering()
    gathering.send([1])
    gathering.send([2])
    await come_back(gathering.heart, SUSPECT_RETURNS)

    await gathering.heart.run_for(clock, 2 * INTERVAL, step=0.5)

    assert gathering.runs == [[1], [2]]


@pytest.mark.parametrize(
    ("returns", "runs"),
    [(SUSPECT_RETURNS, [[1, 2], [3, 4]]), (MOST_RETURNS - 1, [[1], [2, 3], [4]])],
)
async def test_what_came_back_from_runs_that_killed_their_worker_runs_with_half_as_many(
    clock: FakeClock, returns: int, runs: list[Ids]
) -> None:
    """Alone, as whatever else came back so often, it would cost a start of its own for nothing."""
    gathering = Gathering()
    for one in range(1, 5):
        gathering.send([one])
        gathering.heart.budget.most[str(one)] = 2
    await come_back(gathering.heart, returns)

    await gathering.heart.run_for(clock, 3 * INTERVAL, step=0.5)

    assert gathering.runs == runs
    assert gathering.heart.budget.noted == ["1"] * (runs[0] == [1])


async def test_what_comes_back_for_the_tenth_time_is_moved(clock: FakeClock) -> None:
    """RabbitMQ would set it aside at a hundred."""
    gathering = Gathering()
    gathering.send([1])
    gathering.send([2])
    await come_back(gathering.heart, MOST_RETURNS)

    await gathering.heart.run_for(clock, 2)

    assert gathering.runs == [[2, 1]], "its copy is as good as a new message"


async def test_what_is_moved_unrun_keeps_its_deaths() -> None:
    gathering = Gathering()
    gathering.send([1])
    await come_back(gathering.heart, MOST_RETURNS)
    gathering.heart.budget.died["1"] = 4

    assert (await gathering.heart.serve()).kind is Kind.MOVED

    assert gathering.heart.budget.died == {"1": 4}


async def test_what_may_kill_its_worker_is_noted_before_it_is_read(clock: FakeClock) -> None:
    """It came back again and again: its `needed` may be what ends the process."""
    gathering = Gathering(stale=set())
    gathering.send([1])
    gathering.send([2])
    await come_back(gathering.heart, SUSPECT_RETURNS)

    await gathering.heart.run_for(clock, 2)

    assert gathering.heart.budget.noted == ["1"]
    assert gathering.reads == [[1], [2]]
    assert "1" in gathering.heart.budget.forgotten, "it killed nobody"


async def test_without_a_rate_a_killer_comes_back_until_rabbitmq_sets_it_aside() -> None:
    """Nobody else counts its deaths: a copy would begin to be counted from nothing."""
    gathering = Gathering(rate=None)
    gathering.send([1])
    await come_back(gathering.heart, MOST_RETURNS)

    assert (await gathering.heart.serve()).kind is Kind.ACK


async def test_a_charge_that_never_arrived_takes_no_death_back() -> None:
    class Database:
        async def each(self, *statements: str, args: Any = None) -> list[Answer]:
            return [Answer(0, []) for _ in statements]

    database: Any = Database()
    deaths = Deaths(database, {"task": "shop", "lock": "l", "worker": "w"})
    row: Any = SimpleNamespace(running=None, deaths=None)
    found = [("killer", 1, 1, 2, None)]  # others have counted two
    await deaths.review(row, found)

    deaths.note(["killer"])
    await deaths.withdraw()
    await deaths.review(row, found)

    assert deaths.of("killer") == 2
