"""What is held goes back if its start cannot begin, or if it cannot be settled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any

import pytest
from pydantic import AfterValidator

from aioworker.errors import BrokerError
from aioworker.settling.settler import MOST_RETURNS
from tests.doubles.gathering import (
    AWAY,
    GATHER_SECONDS,
    PAUSED,
    Gathering,
    Ids,
    come_back,
    fails,
)
from tests.doubles.heart import Heart, running, slow_down
from tests.doubles.lanes import QUEUES
from tests.fakes import FakeClock


def at_step(heart: Heart, step: str, number: int, do: Callable[[], None]) -> None:
    """Have something happen at a step that comes as this number from now on."""
    seen = 0

    def at(name: str) -> None:
        nonlocal seen
        heart.steps.append(name)
        seen += name == step
        if name == step and seen == number:
            do()

    heart.lanes._at = at


def no_answer() -> None:
    """Fail as a step with RabbitMQ does."""
    raise BrokerError("no answer in time")


def strange(_value: object) -> object:
    """Fail in place of a check of an argument."""
    raise KeyError("shop")


@pytest.mark.parametrize("reason", ["pause", "stop", "lost", "database"])
async def test_what_is_held_goes_back_uncharged(clock: FakeClock, reason: str) -> None:
    gathering = Gathering()
    heart = gathering.heart
    gathering.send([1])
    async with running(heart):
        await clock.advance(1, step=0.1)
        gathering.send_each(range(2, 5))
        await clock.advance(14)
        assert len(heart.lanes.held) == 3

        if reason == "pause":
            heart.budget.refusal = PAUSED
        elif reason == "database":
            heart.budget.refusal = AWAY
        elif reason == "stop":
            heart.stop.set()
        else:
            heart.lanes.lose()
            heart.lost.set()
        await clock.advance(4)

        assert gathering.queued() == ["2", "3", "4"], "in their order"
        assert heart.budget.starts == [1]
        assert heart.lanes.held == {}
        assert heart.consumer.under_way == []


async def test_a_pause_is_seen_while_messages_keep_coming(clock: FakeClock) -> None:
    gathering = Gathering(stale={1, 2})
    heart = gathering.heart
    gathering.send([1])
    slow_down(gathering.heart, 0.01)
    async with running(heart):
        await clock.advance(5, step=0.1)
        gathering.send([2])
        for first in range(1000, 2_000_000, 1000):
            gathering.send([first])
        await clock.advance(6, step=0.1)
        assert heart.lanes.held != {}
        heart.budget.refusal = PAUSED
        await clock.advance(3, step=0.1)

        assert heart.lanes.held == {}
        assert gathering.queued() != []


async def test_a_connection_that_is_lost_in_the_turn_sends_all_back_uncharged(
    clock: FakeClock,
) -> None:
    """The turn is lost with it, though no read has failed."""
    gathering = Gathering()
    lose = [gathering.heart.database.close]

    async def needed(ids: list[int]) -> list[int]:
        while lose:
            lose.pop()()
        return ids

    gathering.heart.task.needed(needed)
    gathering.send_each([1, 2])

    await gathering.heart.run_for(clock, 2)

    assert gathering.heart.settled == ["give_back"] * 2 + ["acknowledge"]
    assert gathering.acknowledged == ["1", "2"]
    assert gathering.heart.budget.starts == [2]


async def test_without_a_rate_no_turn_is_lost_with_a_connection(clock: FakeClock) -> None:
    gathering = Gathering(rate=None)
    heart = gathering.heart
    at_step(heart, "take", 2, heart.database.close)
    gathering.send_each([1, 2])

    await heart.run_for(clock, 1)

    assert gathering.runs == [[1, 2]]
    assert heart.settled == ["acknowledge"]


async def test_what_is_moved_on_the_way_sends_no_other_message_back(clock: FakeClock) -> None:
    gathering = Gathering()
    gathering.send([2])
    await come_back(gathering.heart, MOST_RETURNS)
    gathering.send([1], QUEUES.urgent)
    gathering.heart.steps.clear()

    await gathering.heart.run_for(clock, 2)

    assert gathering.runs == [[1, 2]]
    assert "give_back" not in gathering.heart.steps


async def test_what_is_moved_for_a_database_that_is_away_ends_the_taking(clock: FakeClock) -> None:
    """Without a rate what came back again and again is read, which may fail."""

    async def refresh(ids: list[int], way: Annotated[int, AfterValidator(strange)]) -> None:
        """Take chunks."""

    heart = Heart(refresh, gather_seconds=GATHER_SECONDS)
    heart.task.needed(lambda ids: ids)
    for one in (1, 2):
        heart.broker.send(f"[[[{one}], 5], {{}}, null]".encode(), id=str(one))
    await come_back(heart, MOST_RETURNS)
    at_step(heart, "take", 1, lambda: setattr(heart.probe, "away", AWAY))

    await heart.run_for(clock, 0)

    assert heart.steps[-3:] == ["take", "copy", "acknowledge"]
    assert [one["id"] for one in heart.broker.headers(QUEUES.bulk)] == ["2", "1"]


async def test_a_copy_that_is_refused_ends_the_taking(clock: FakeClock) -> None:
    gathering = Gathering(stale={9})
    gathering.send([1])
    gathering.heart.broker.send(b"nonsense", QUEUES.bulk, id="bad")
    gathering.send([9])
    gathering.heart.broker.refusal = BrokerError("alarm", unreachable=True)

    async with running(gathering.heart):
        await clock.advance(10, step=0.5)
        assert gathering.heart.steps.count("copy") == 1, "the next one follows after a while"
        gathering.heart.broker.refusal = None
        assert gathering.queued() == ["bad", "1", "9"]
        del gathering.heart.broker.queues[QUEUES.bulk][1]  # another worker takes it
        await clock.advance(30, step=0.5)

    assert gathering.acknowledged == ["bad", "9"]
    assert gathering.reads == [[9]], "what went back is forgotten"


async def test_if_rabbitmq_takes_one_copy_not_no_other_is_tried(clock: FakeClock) -> None:
    """Each would wait for its confirm, with the turn and all others in hand."""
    tried = 0

    async def fail(_ids: Ids) -> None:
        raise KeyError("shop")

    async def refuse(_lane: str, _message: object) -> None:
        nonlocal tried
        tried += 1
        raise BrokerError("no confirm")

    gathering = Gathering(fail)
    gathering.heart.lanes.put_behind = refuse  # type: ignore[method-assign, assignment]
    gathering.send_each(range(1, 21))

    await gathering.heart.run_for(clock, 2)

    assert tried == 1
    assert gathering.queued() == [str(one) for one in range(1, 21)], "in their order"


async def test_behind_an_answer_that_fails_nothing_is_acknowledged(clock: FakeClock) -> None:
    """Not without its copy; nor is each of a thousand answers waited for."""
    gathering = Gathering(fails)
    at_step(gathering.heart, "acknowledge", 2, no_answer)
    gathering.send_each(range(1, 5))

    async with running(gathering.heart) as serving:
        await clock.advance(1, step=0.1)
        assert isinstance(serving.exception(), BrokerError)

    assert gathering.heart.settled == ["copy", "acknowledge", "copy", "acknowledge"]
    assert gathering.acknowledged == ["1"]
    assert gathering.heart.consumer.under_way == []


async def test_a_worker_that_settles_many_messages_is_seen_to_progress(clock: FakeClock) -> None:
    """Each copy is confirmed, which may take a while."""
    gathering = Gathering(fails)
    lanes = gathering.heart.lanes
    put_behind = lanes.put_behind

    async def slowly_behind(lane: str, message: Any) -> None:
        await asyncio.sleep(0.2)
        await put_behind(lane, message)

    lanes.put_behind = slowly_behind  # type: ignore[method-assign]
    gathering.send_each(range(1, 1001))

    async with running(gathering.heart):
        for _ in range(200):
            await clock.advance(1, step=0.1)
            assert gathering.heart.worker.progresses, f"at {clock.now} s"
