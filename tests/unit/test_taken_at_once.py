"""Several messages are taken at once, as far as they have room in a start."""

from __future__ import annotations

import json
import math

import pytest

from aioworker.rabbitmq.delivery import Delivery
from aioworker.settling.rows import Ids, Rows
from aioworker.settling.start import AT_ONCE, FEW_BYTES, Held, Start
from aioworker.tasks.context import Context
from tests.doubles.gathering import Gathering
from tests.doubles.heart import Heart
from tests.doubles.lanes import QUEUES
from tests.fakes import FakeClock, delivered


def asked(gathering: Gathering) -> list[str]:
    """Return what was asked of the lanes for messages, or given back."""
    return [one for one in gathering.heart.steps if one in ("take_more", "give_back")]


@pytest.mark.parametrize(
    ("lane", "at_once"), [(QUEUES.urgent, AT_ONCE), (QUEUES.bulk, AT_ONCE - 1)]
)
async def test_small_messages_are_taken_several_at_once(
    clock: FakeClock, lane: str, at_once: int
) -> None:
    """One of those asked for is an urgent one, in any case."""
    gathering = Gathering(rate=None)
    gathering.send_each(range(1, 42), lane)

    await gathering.heart.run_for(clock, 2)

    assert gathering.runs == [list(range(1, 42))]
    # The first one alone; and before and behind the read it is asked whether there are others.
    assert asked(gathering) == ["take_more"] * (math.ceil(40 / at_once) + 2)


async def test_urgent_ones_are_taken_first_in_a_start_that_begins_with_the_bulk_lane(
    clock: FakeClock,
) -> None:
    gathering = Gathering(chunk_size=40)
    gathering.heart.budget.bulk_next = True
    gathering.send_each(range(100, 200), QUEUES.bulk)
    gathering.send_each(range(1, 31), QUEUES.urgent)

    await gathering.heart.run_for(clock, 2)

    [ids] = gathering.runs
    assert ids[0] == 100
    assert set(range(1, 31)) < set(ids)


async def test_chunks_are_not_taken_to_be_given_back(clock: FakeClock) -> None:
    gathering = Gathering(rate=None)
    gathering.send_chunks(range(400, 10_400, 400))

    await gathering.heart.run_for(clock, 2)

    assert [len(ids) for ids in gathering.runs] == [1200] * 8 + [400]
    assert "give_back" not in asked(gathering)


async def test_what_comes_with_one_that_fits_no_other_goes_back_once(clock: FakeClock) -> None:
    """RabbitMQ before 4.3 counts it, and what came back three times runs alone."""

    async def move(ids: list[int], way: str) -> None:
        pass

    heart = Heart(move, gather_seconds=20)
    heart.task.needed(lambda ids: ids)
    for one in range(40):
        way = "up" if one // 2 % 2 else "down"
        heart.broker.send(json.dumps([[[one], way], {}, None]).encode(), id=str(one))

    await heart.run_for(clock, 2)

    assert len(heart.broker.acknowledged) == 40
    assert heart.consumer.starts == 20
    assert heart.steps.count("give_back") <= 20 + AT_ONCE


async def test_of_those_that_came_at_once_what_has_no_room_is_next(clock: FakeClock) -> None:
    """A chunk among them fills the start."""
    gathering = Gathering(rate=None)
    gathering.send_each(range(1, 4), QUEUES.urgent)
    gathering.send(range(1000, 2000), QUEUES.urgent)
    gathering.send_each(range(4, 9), QUEUES.urgent)

    await gathering.heart.run_for(clock, 2)

    assert gathering.runs == [[1, 2, 3, *range(1000, 2000)], [4, 5, 6, 7, 8]]
    assert asked(gathering).count("give_back") == 1


async def test_a_stop_gives_back_all_that_came_at_once(clock: FakeClock) -> None:
    gathering = Gathering()
    gathering.send_each(range(1, 10), QUEUES.urgent)
    at = gathering.heart.lanes._at

    def stop(step: str) -> None:
        at(step)
        if step == "take_more":
            gathering.heart.stop.set()

    gathering.heart.lanes._at = stop
    await gathering.heart.run_for(clock, 2)

    assert gathering.queued(QUEUES.urgent) == [str(one) for one in range(1, 10)]
    assert gathering.heart.lanes.held == {}


@pytest.mark.parametrize(
    ("rows", "size", "room"),
    [(Ids(), 0, AT_ONCE), (Ids(), FEW_BYTES + 1, 1), (Rows(), 0, 1)],
    ids=["ids", "large messages", "rows"],
)
def test_who_may_come_several_at_once(rows: Ids | Rows, size: int, room: int) -> None:
    """Each of several may be a large one; and the order of taking may decide between two rows."""
    start = Start(rows, most=100, size=1000)
    one = Held(Delivery.of(delivered(b"[[[1]]]")), Context(None, "shop"), ids=1, bytes=size)  # type: ignore[arg-type]  # asked nothing
    start.held.append(one)
    start.weigh(one)

    assert start.room() == room
