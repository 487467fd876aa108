"""Several messages are taken at once, as far as they have room in a start."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest

from aioworker.errors import BrokerError
from aioworker.rabbitmq.delivery import Delivery
from aioworker.rabbitmq.lanes import Lanes
from aioworker.rabbitmq.message import SMALL_BYTES, TOGETHER
from aioworker.settling.outcome import Outcome
from aioworker.settling.rows import Ids, Rows
from aioworker.settling.start import AT_ONCE, Held, Start
from aioworker.tasks.context import Context
from tests.doubles.gathering import Gathering
from tests.doubles.heart import Heart, running
from tests.doubles.lanes import QUEUES
from tests.fakes import FakeClock, delivered


def asked(gathering: Gathering) -> list[str]:
    """Return what was asked of the lanes for messages, or given back."""
    return [one for one in gathering.heart.steps if one in ("take_more", "give_back")]


@pytest.mark.parametrize(("lane", "asked_for"), [(QUEUES.urgent, 8), (QUEUES.bulk, 10)])
async def test_small_messages_are_taken_several_at_once(
    clock: FakeClock, lane: str, asked_for: int
) -> None:
    """1, 2, 4 and 8 at once, as many as fitted before; one of those is an urgent one, if any is."""
    gathering = Gathering(rate=None)
    gathering.send_each(range(1, 42), lane)

    await gathering.heart.run_for(clock, 2)

    assert gathering.runs == [list(range(1, 42))]
    # The first one alone; and before and behind the read it is asked whether there are others.
    assert asked(gathering) == ["take_more"] * (asked_for + 2)


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
    gathering.send_each(range(1, 12), QUEUES.urgent)
    gathering.send(range(1000, 2000), QUEUES.urgent)
    gathering.send_each(range(12, 20), QUEUES.urgent)

    await gathering.heart.run_for(clock, 2)

    assert gathering.runs == [[*range(1, 12), *range(1000, 2000)], list(range(12, 20))]
    assert asked(gathering).count("give_back") == 4


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
    ("rows", "held", "room"),
    [(Ids(), 100, AT_ONCE), (Ids(), 3, 3), (Rows(), 100, 1)],
    ids=["ids", "few that fitted", "rows"],
)
def test_who_may_come_several_at_once(rows: Ids | Rows, held: int, room: int) -> None:
    """The order of taking may decide between two rows."""
    start = Start(rows, most=1000, size=1000)
    one = Held(Delivery.of(delivered(b"[[[1]]]")), Context(None, "shop"), ids=1)  # type: ignore[arg-type]  # asked nothing
    start.held += [one] * held

    assert start.room() == room


async def test_without_a_rate_others_come_while_those_that_came_are_read(clock: FakeClock) -> None:
    gathering = Gathering(rate=None)
    heart = gathering.heart
    gathering.send_each(range(1, 200), QUEUES.urgent)
    ahead = watch(heart)

    await heart.run_for(clock, 2)

    assert gathering.runs == [list(range(1, 200))]
    assert max(ahead) == 2 * AT_ONCE
    assert "give_back" not in asked(gathering)


@pytest.mark.parametrize("case", ["a rate", "large messages"])
async def test_no_others_come_meanwhile_for_a_start_that_waits_or_holds_much(
    clock: FakeClock, case: str
) -> None:
    gathering = Gathering(rate="2/m" if case == "a rate" else None)
    heart = gathering.heart
    body = f"[[[1]], {{}}, {{}}]{' ' * (SMALL_BYTES if case == 'large messages' else 0)}".encode()
    for one in range(40):
        heart.broker.send(body, QUEUES.urgent, id=str(one))
    ahead = watch(heart)

    await heart.run_for(clock, 30)

    assert len(gathering.acknowledged) == 40
    assert max(ahead) <= (AT_ONCE if case == "a rate" else 1)


@pytest.mark.parametrize("every", [1, 2, 5, AT_ONCE])
async def test_only_one_large_message_comes_before_it_is_looked_at(
    clock: FakeClock, every: int
) -> None:
    gathering = Gathering(rate=None)
    heart = gathering.heart
    gathering.send_each(range(1, 2 + 6 * AT_ONCE), QUEUES.urgent)
    for one in range(100, 180):
        size = 0 if one % every else SMALL_BYTES
        heart.broker.send(f"[[[{one}]], {{}}, {{}}]{' ' * size}".encode(), QUEUES.urgent)
    ahead = watch(heart, least=SMALL_BYTES)

    await heart.run_for(clock, 4)

    assert [len(ids) for ids in gathering.runs][-1] > 1
    assert len(ahead) >= 80 // every
    assert max(ahead) == 1


@pytest.mark.parametrize(
    ("options", "headers"),
    [({"chunk_size": 24}, {}), ({}, {TOGETHER: 24})],
    ids=["ids", "messages"],
)
async def test_those_that_come_meanwhile_have_room_beside_those_before(
    clock: FakeClock, options: dict[str, Any], headers: dict[str, Any]
) -> None:
    gathering = Gathering(rate=None, **options)
    for one in range(1, 73):
        gathering.send([one], QUEUES.urgent, **headers)

    await gathering.heart.run_for(clock, 4)

    assert [len(ids) for ids in gathering.runs] == [24, 24, 24]
    assert "give_back" not in asked(gathering)


async def test_messages_that_run_alone_leave_the_others_in_their_order(clock: FakeClock) -> None:
    gathering = Gathering(rate=None)
    for one in range(1, 40):
        gathering.send([one], QUEUES.urgent, **({TOGETHER: 1} if one > 5 and not one % 2 else {}))

    await gathering.heart.run_for(clock, 8)

    assert list(chain.from_iterable(gathering.runs)) == list(range(1, 40))


async def test_what_came_meanwhile_goes_back_at_a_stop(clock: FakeClock) -> None:
    gathering = Gathering(rate=None)
    heart = gathering.heart
    gathering.send_each(range(1, 101), QUEUES.urgent)
    ahead = watch(heart, heart.stop.set)

    await heart.run_for(clock, 2)

    assert max(ahead) == 2 * AT_ONCE
    assert gathering.queued(QUEUES.urgent) == [str(one) for one in range(1, 101)]
    assert heart.lanes.held == {}


async def test_a_connection_that_is_lost_meanwhile_ends_the_session(clock: FakeClock) -> None:
    gathering = Gathering(rate=None)
    heart = gathering.heart
    gathering.send_each(range(1, 101), QUEUES.urgent)
    at, asked_for = heart.lanes._at, []

    def lose(step: str) -> None:
        at(step)
        if step == "take_more":
            asked_for.append(step)
            if len(asked_for) == 3:
                heart.lanes.lose()

    heart.lanes._at = lose
    async with running(heart) as serving:
        with pytest.raises(BrokerError):
            await serving

    assert gathering.runs == []
    assert sorted(gathering.queued(QUEUES.urgent), key=int) == [str(one) for one in range(1, 101)]
    assert heart.consumer.under_way == []


async def test_a_session_that_is_cut_off_meanwhile_ends_so(clock: FakeClock) -> None:
    gathering = Gathering(rate=None)
    heart = gathering.heart
    gathering.send_each(range(1, 101), QUEUES.urgent)

    def cut_off() -> None:
        serving.cancel()
        heart.lanes.lose()

    ahead = watch(heart, cut_off)
    async with running(heart) as serving:
        await asyncio.wait({serving})

    assert max(ahead) == 2 * AT_ONCE
    assert serving.cancelled()
    assert sorted(gathering.queued(QUEUES.urgent), key=int) == [str(one) for one in range(1, 101)]


def watch(heart: Heart, then: Callable[[], None] = lambda: None, least: int = 0) -> list[int]:
    """Return a list of how many lie unread in the worker, whenever it reads one.

    Args:
        heart: The worker.
        then: Called when those are there that come meanwhile.
        least: How many bytes a message has at least that counts as one.
    """
    unread: list[int] = []
    opened = heart.consumer.open

    async def watched(start: Start, delivery: Delivery, lanes: Lanes) -> Outcome | None:
        kept = [one for _queue, one in heart.lanes.held.values() if len(one.body) >= least]
        read = [one for one in start.held if len(one.delivery.message.body) >= least]
        unread.append(len(kept) - len(read))
        if unread[-1] == 2 * AT_ONCE:
            then()
        return await opened(start, delivery, lanes)

    heart.consumer.open = watched  # type: ignore[method-assign]
    return unread
