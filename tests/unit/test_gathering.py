"""A start is as full as it may be: several messages, one charge, one run; each settled alone."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import timedelta
from itertools import pairwise
from typing import Annotated, Any

import pytest
from pydantic import AfterValidator
from pymysql.constants import ER
from pymysql.err import OperationalError

from aioworker.clock import own_time
from aioworker.errors import (
    BrokerError,
    DatabaseError,
    DeadLetter,
    Retry,
    RowsRefusedError,
    TurnLostError,
)
from aioworker.limits import Wait
from aioworker.rabbitmq.delivery import SUSPECT_RETURNS
from aioworker.rabbitmq.message import PUBLISHED, REASON, TOGETHER, milliseconds
from aioworker.reasons import Reason, ReasonKind
from aioworker.settling.outcome import Kind
from aioworker.settling.settler import MOST_RETURNS
from aioworker.tasks.context import Context
from tests.doubles.heart import Heart, Work, running, slow_down
from tests.doubles.lanes import QUEUES
from tests.fakes import FakeClock

PAUSED = Wait(Reason(ReasonKind.PAUSED, "paused by alice"), 2)
AWAY = DatabaseError("gone", unreachable=True)
GATHER_SECONDS = 20
INTERVAL = 30  # seconds, of 2/m
Ids = list[int]


class Gathering:
    """A heart whose task takes chunks of ids, and gathers.

    Args:
        fail: Called with the ids of each run; what it raises, the run does.
        stale: The ids that need a write; None for all.
        options: Of the heart.

    Attributes:
        reads: What `needed` was asked, each time.
        runs: What ran, each time.
    """

    def __init__(
        self,
        fail: Callable[[Ids], Awaitable[None]] | None = None,
        stale: set[int] | None = None,
        **options: Any,
    ) -> None:
        self.reads: list[Ids] = []
        self.runs: list[Ids] = []
        self.contexts: list[Context] = []
        self.stale = stale

        async def refresh(ctx: Context, ids: list[int]) -> None:
            self.runs.append(ids)
            self.contexts.append(ctx)
            if fail is not None:
                await fail(ids)
            ctx.changed(ids)
            if self.stale is not None:
                self.stale -= set(ids)

        async def needed(ids: list[int]) -> list[int]:
            self.reads.append(ids)
            return [one for one in ids if self.stale is None or one in self.stale]

        self.heart = Heart(refresh, **{"rate": "2/m", "gather_seconds": GATHER_SECONDS, **options})
        self.heart.task.needed(needed)

    def send(
        self, ids: Sequence[int], lane: str = QUEUES.bulk, *constants: Any, **headers: Any
    ) -> None:
        """Publish a message of some ids, whose own id is the first of them."""
        body = json.dumps([[list(ids), *constants], {}, None]).encode()
        self.heart.broker.send(body, lane, **{"id": str(ids[0]), **headers})

    def send_each(self, ids: Iterable[int], lane: str = QUEUES.bulk) -> None:
        """Publish a message for each id."""
        for one in ids:
            self.send([one], lane)

    def send_chunks(self, firsts: range) -> None:
        """Publish ids in messages that begin with these; each has all up to the next."""
        for first in firsts:
            self.send(range(first, first + firsts.step))

    @property
    def acknowledged(self) -> list[str]:
        """The ids of what is acknowledged."""
        return self.heart.broker.acknowledged

    def queued(self, lane: str = QUEUES.bulk) -> list[str]:
        """Return the ids of what lies in a lane."""
        return [str(headers["id"]) for headers in self.heart.broker.headers(lane)]


def gathering_with(function: Work) -> Heart:
    """Return a heart that gathers, and runs a function for whatever is published."""
    heart = Heart(function, rate="2/m", gather_seconds=GATHER_SECONDS)
    heart.task.needed(lambda entries: entries)
    return heart


async def come_back(heart: Heart, times: int) -> None:
    """Have the first message be taken and given back so often."""
    for _ in range(times):
        delivery = await heart.lanes.take()
        assert delivery is not None
        await delivery.give_back()


async def test_fifty_single_changes_are_one_start(clock: FakeClock) -> None:
    gathering = Gathering()
    gathering.send_each(range(1, 51), QUEUES.urgent)

    await gathering.heart.run_for(clock, 2)

    assert gathering.runs == [list(range(1, 51))]
    assert gathering.heart.budget.starts == [50]
    assert gathering.acknowledged == [str(one) for one in range(1, 51)]


async def test_what_several_messages_need_is_asked_in_one_read(clock: FakeClock) -> None:
    gathering = Gathering(stale={3})
    gathering.send_each(range(1, 51))

    await gathering.heart.run_for(clock, 2)

    assert gathering.reads == [list(range(1, 51))]
    assert gathering.runs == [[3]]
    assert gathering.acknowledged[-1] == "3", "those that need nothing are done before"


async def test_a_sweep_of_which_little_is_stale_is_one_start(clock: FakeClock) -> None:
    stale = {1, 1001, 2001, 3001}
    gathering = Gathering(stale=set(stale))
    gathering.send_chunks(range(1, 5001, 1000))

    await gathering.heart.run_for(clock, 2)

    assert gathering.runs == [sorted(stale)]
    assert gathering.queued() == []


async def test_what_comes_before_the_start_is_due_goes_along(clock: FakeClock) -> None:
    gathering = Gathering()
    gathering.send([1])
    async with running(gathering.heart):
        await clock.advance(5)
        assert gathering.runs == [[1]]
        for one in range(2, 6):
            gathering.send([one], QUEUES.urgent)
            await clock.advance(5)
            assert gathering.runs == [[1]], f"at {clock.now} s"
        await clock.advance(6, step=0.1)

    assert gathering.runs == [[1], [2, 3, 4, 5]]
    assert gathering.heart.budget.moments[1] == pytest.approx(INTERVAL, abs=1)


async def test_nothing_is_held_before_the_gathering_begins(clock: FakeClock) -> None:
    gathering = Gathering()
    gathering.send([1])
    async with running(gathering.heart):
        await clock.advance(1, step=0.1)
        gathering.send([2])
        while clock.now < INTERVAL - GATHER_SECONDS - 1:
            assert gathering.heart.lanes.held == {}, f"at {clock.now} s"
            await clock.advance(1)
        await clock.advance(3)

        assert len(gathering.heart.lanes.held) == 1
        assert gathering.heart.said[-1] == "waiting: gathering: 1 message, 1 id to write"


async def test_a_start_takes_no_more_once_one_chunk_is_to_be_written(clock: FakeClock) -> None:
    gathering = Gathering(chunk_size=10)
    gathering.send_chunks(range(1, 41, 4))

    await gathering.heart.run_for(clock, 2)

    assert gathering.runs == [list(range(1, 13))], "the last message may be more than has room"
    assert gathering.queued() == [str(first) for first in range(13, 41, 4)]


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


async def test_what_fits_no_other_is_the_first_of_the_next_start(clock: FakeClock) -> None:
    """Constants that differ are another call of the function."""
    runs = []

    async def move(ids: list[int], way: object = None) -> None:
        runs.append((ids, way))

    heart = gathering_with(move)
    for one, way in enumerate(("up", "up", 1, True, True), start=1):
        heart.broker.send(json.dumps([[[one], way], {}, None]).encode(), id=str(one))

    await heart.run_for(clock, 3 * INTERVAL, step=0.5)

    assert runs == [([1, 2], "up"), ([3], 1), ([4, 5], True)]


@pytest.mark.parametrize(
    "headers",
    [
        {"timelimit": [5, None]},
        {REASON: "it failed", "retries": 1},
        {TOGETHER: 1},
    ],
    ids=["a time limit of its own", "from the retry queue", "more of them failed"],
)
@pytest.mark.parametrize("place", [0, 1])
async def test_some_messages_run_alone(
    clock: FakeClock, headers: dict[str, Any], place: int
) -> None:
    gathering = Gathering()
    for one in range(3):
        gathering.send([one + 1], QUEUES.bulk, **(headers if one == place else {}))

    await gathering.heart.run_for(clock, 3 * INTERVAL, step=0.5)

    assert gathering.runs == ([[1], [2, 3]] if place == 0 else [[1], [2], [3]])


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


async def test_no_start_is_larger_than_its_messages_may_run_with(clock: FakeClock) -> None:
    gathering = Gathering()
    for one in range(1, 6):
        gathering.send([one], QUEUES.bulk, **({TOGETHER: 2} if one == 2 else {}))
    gathering.heart.budget.most["4"] = 1

    await gathering.heart.run_for(clock, 4 * INTERVAL, step=0.5)

    assert gathering.runs == [[1, 2], [3], [4], [5]]


async def test_what_comes_back_for_the_tenth_time_is_moved(clock: FakeClock) -> None:
    """RabbitMQ would set it aside at a hundred."""
    gathering = Gathering()
    gathering.send([1])
    gathering.send([2])
    await come_back(gathering.heart, MOST_RETURNS)

    await gathering.heart.run_for(clock, 2)

    assert gathering.runs == [[2, 1]], "its copy is as good as a new message"


async def fails(_ids: Ids) -> None:
    """Fail for whatever ids."""
    raise KeyError("shop")


async def poisoned(poison: int, ids: Ids) -> None:
    """Fail for one id."""
    if poison in ids:
        raise KeyError(poison)


@pytest.mark.parametrize("poison", [1, 7, 26, 50])
async def test_of_fifty_the_culprit_is_found_and_the_others_are_done(
    clock: FakeClock, poison: int
) -> None:
    """In log2(50) rounds, each of two starts at most; its attempts count from when it is alone."""

    async def fail(ids: Ids) -> None:
        await poisoned(poison, ids)

    gathering = Gathering(fail, max_retries=0)
    gathering.send_each(range(1, 51))
    innocent = [str(one) for one in range(1, 51) if one != poison]

    async with running(gathering.heart):
        while gathering.queued(QUEUES.dead) == [] and clock.now < 20 * INTERVAL:
            await clock.advance(INTERVAL, step=0.5)

    assert gathering.queued(QUEUES.dead) == [str(poison)]
    [letter] = gathering.heart.broker.headers(QUEUES.dead)
    assert letter["x-aioworker-attempts"] == 1
    done = {str(one) for run in gathering.runs if poison not in run for one in run}
    assert done == set(innocent)
    assert len(gathering.runs) <= 2 * 5.65 + 2 + 1


@pytest.mark.parametrize("error", [KeyError("shop"), Retry("later"), DeadLetter("never")], ids=repr)
async def test_whose_failure_it_is_nobody_knows_of_several(
    clock: FakeClock, error: Exception
) -> None:
    async def fail(ids: Ids) -> None:
        if len(ids) > 1:
            raise error

    gathering = Gathering(fail)
    for one in range(1, 6):
        gathering.send([one], QUEUES.urgent if one > 3 else QUEUES.bulk)

    await gathering.heart.run_for(clock, 2)

    assert gathering.queued() == ["1", "2", "3"]
    assert gathering.queued(QUEUES.urgent) == ["4", "5"], "each in its own lane"
    for headers in gathering.heart.broker.headers(QUEUES.bulk):
        assert headers[TOGETHER] == 2
        assert headers.get("retries", 0) == 0
        assert REASON not in headers


async def test_if_all_fail_alike_the_breaker_opens_at_the_third_start(clock: FakeClock) -> None:
    gathering = Gathering(fails)
    gathering.send_each(range(1, 1001))

    async with running(gathering.heart):
        await clock.advance(2.5 * INTERVAL, step=0.5)

        assert [len(run) for run in gathering.runs] == [1000, 500, 500]
        why = gathering.heart.consumer.breaker.reason
        assert why == "3 starts in a row failed for all they held, the last: KeyError: 'shop'"
        await clock.advance(INTERVAL, step=0.5)
        assert len(gathering.runs[3]) == 1, "one shows whether it works again"


async def test_contention_opens_no_breaker_and_holds_up_nobody_else(clock: FakeClock) -> None:
    """A row that somebody holds for minutes: the messages of other rows are done meanwhile."""

    async def fail(ids: Ids) -> None:
        if 7 in ids:
            raise OperationalError(ER.LOCK_WAIT_TIMEOUT, "locked")

    gathering = Gathering(fail)
    gathering.send_each(range(1, 21))

    def done() -> Ids:
        return sorted(one for run in gathering.runs if 7 not in run for one in run)

    async with running(gathering.heart):
        while len(done()) < 19 and clock.now < 20 * INTERVAL:
            await clock.advance(INTERVAL, step=0.5)
            assert gathering.heart.consumer.breaker.reason == ""

    assert done() == [one for one in range(1, 21) if one != 7]
    assert len(gathering.runs) <= 10


async def test_a_read_that_meets_contention_ends(clock: FakeClock) -> None:
    """It is not charged: nothing else would slow it down."""
    gathering = Gathering()

    async def locked(ids: list[int]) -> list[int]:
        gathering.reads.append(ids)
        raise OperationalError(ER.LOCK_WAIT_TIMEOUT, "locked")

    gathering.heart.task.needed(locked)
    gathering.send_each(range(1, 9))

    await gathering.heart.run_for(clock, 5)

    assert len(gathering.reads) <= 15
    assert len(gathering.queued(QUEUES.retry)) == 8


async def test_a_database_that_is_away_marks_nobody(clock: FakeClock) -> None:
    async def fail(_ids: Ids) -> None:
        gathering.heart.probe.away = AWAY
        raise KeyError("shop")

    gathering = Gathering(fail)
    gathering.send_each(range(1, 4))

    await gathering.heart.run_for(clock, 2)

    assert gathering.queued() == ["1", "2", "3"]
    assert all(TOGETHER not in one for one in gathering.heart.broker.headers(QUEUES.bulk))
    assert gathering.heart.said[-1].startswith("waiting: database unreachable since ")


async def test_rows_that_the_data_refuses_are_those_of_who_named_them(clock: FakeClock) -> None:
    async def fail(_ids: Ids) -> None:
        raise RowsRefusedError({3: "too long", 4: "no parent"}, 5)

    gathering = Gathering(fail)
    for first in range(1, 7, 2):
        gathering.send([first, first + 1])
    gathering.send([4, 9])

    await gathering.heart.run_for(clock, 2)

    assert gathering.heart.consumer.settled == {Kind.ACK: 2, Kind.DEAD_LETTER: 2}
    reasons = {str(one["id"]): one[REASON] for one in gathering.heart.broker.headers(QUEUES.dead)}
    assert reasons == {
        "3": "2 rows refused by the database: too long: ids 3, 4",
        "4": "1 row refused by the database: no parent: ids 4",
    }


async def test_of_fifty_one_that_the_data_refuses_costs_no_further_start(clock: FakeClock) -> None:
    async def fail(ids: Ids) -> None:
        raise RowsRefusedError({13: "too long"}, len(ids) - 1)

    gathering = Gathering(fail)
    for one in range(1, 51):
        gathering.send([one])

    await gathering.heart.run_for(clock, 2 * INTERVAL, step=0.5)

    assert gathering.heart.budget.starts == [50]
    assert gathering.heart.consumer.settled == {Kind.ACK: 49, Kind.DEAD_LETTER: 1}
    [letter] = gathering.heart.broker.headers(QUEUES.dead)
    assert (letter["id"], letter[REASON]) == (
        "13",
        "1 row refused by the database: too long: ids 13",
    )


async def test_of_two_starts_in_a_row_one_begins_with_the_bulk_lane(clock: FakeClock) -> None:
    """A steady stream of single changes never stops a sweep."""
    gathering = Gathering(chunk_size=2)
    gathering.send_each(range(1, 9), QUEUES.urgent)
    for first in (11, 21):
        gathering.send([first, first + 1])

    await gathering.heart.run_for(clock, 4 * INTERVAL, step=0.5)

    assert gathering.runs[:4] == [[1, 2], [11, 12], [3, 4], [21, 22]]


async def test_a_start_of_both_lanes_is_followed_by_one_that_begins_with_the_urgent_lane(
    clock: FakeClock,
) -> None:
    """The sweep has advanced: a change that came too late for it waits for no second start."""
    gathering = Gathering(chunk_size=3)
    gathering.send([1], QUEUES.urgent)
    for first in (11, 21, 31):
        gathering.send([first, first + 1, first + 2])
    async with running(gathering.heart):
        await clock.advance(1, step=0.1)
        gathering.send([2], QUEUES.urgent)
        await clock.advance(INTERVAL, step=0.5)

    assert gathering.runs == [[1, 11, 12, 13], [2, 21, 22, 23]]


async def test_a_message_that_expires_while_it_is_held_is_not_run(clock: FakeClock) -> None:
    gathering = Gathering()
    heart = gathering.heart
    gathering.send([1])
    async with running(heart):
        await clock.advance(12)
        expires = own_time() + timedelta(hours=1)
        gathering.send([2, 3], QUEUES.bulk, expires=expires.isoformat())
        gathering.send([3, 4])
        await clock.advance(4)
        assert len(heart.lanes.held) == 2
        heart.budget.now = lambda: expires  # type: ignore[method-assign]
        await clock.advance(INTERVAL, step=0.5)

    assert [sorted(run) for run in gathering.runs] == [[1], [3, 4]]
    assert gathering.acknowledged == ["1", "2", "3"]


PUBLISHED_AT = own_time()


@pytest.mark.parametrize(
    ("first", "second", "winner"),
    [
        ((0, "bulk"), (1, "bulk"), "second"),
        ((1, "bulk"), (0, "bulk"), "first"),
        ((1, "urgent"), (0, "bulk"), "first"),
        ((0, "urgent"), (1, "bulk"), "second"),
        ((0, "urgent"), (0, "bulk"), "first"),
        ((None, "urgent"), (1, "bulk"), "first"),
        ((None, "bulk"), (0, "bulk"), "second"),
    ],
)
async def test_of_two_rows_of_one_id_the_later_wins(
    clock: FakeClock,
    first: tuple[int | None, str],
    second: tuple[int | None, str],
    winner: str,
) -> None:
    """By the time of publication; without one, or on a tie, urgent over bulk, then their order."""
    runs: list[list[tuple[int, str]]] = []

    async def price(rows: list[tuple[int, str]]) -> None:
        runs.append(rows)

    heart = gathering_with(price)
    for name, (seconds, lane) in (("first", first), ("second", second)):
        at = None if seconds is None else milliseconds(PUBLISHED_AT + timedelta(seconds=seconds))
        headers: dict[str, Any] = {"id": name} | ({} if at is None else {PUBLISHED: at})
        body = json.dumps([[[[7, name], [8 if name == "first" else 9, "x"]]], {}, None])
        queue = QUEUES.urgent if lane == "urgent" else QUEUES.bulk
        heart.broker.send(body.encode(), queue, **headers)

    await heart.run_for(clock, 2)

    [run] = runs
    assert sorted(run) == [(7, winner), (8, "x"), (9, "x")]
    assert heart.broker.acknowledged == ["first", "second"]


async def test_without_a_rate_what_is_there_is_one_start(clock: FakeClock) -> None:
    gathering = Gathering(rate=None)
    gathering.send_each(range(1, 1001))

    await gathering.heart.run_for(clock, 1)

    assert gathering.runs == [list(range(1, 1001))]
    assert gathering.reads == [], "the run finds out itself"


@pytest.mark.parametrize("off", ["seconds", "task"])
async def test_gathering_can_be_turned_off(clock: FakeClock, off: str) -> None:
    gathering = Gathering(gather_seconds=0 if off == "seconds" else GATHER_SECONDS)
    if off == "task":
        gathering.heart.task.options = gathering.heart.task.options.__class__(gather=False)
    gathering.send([1])
    gathering.send([2])

    await gathering.heart.run_for(clock, 2)

    assert gathering.runs == [[1]]


async def test_what_a_run_sees_is_of_all_its_messages(clock: FakeClock) -> None:
    gathering = Gathering()
    for one, seconds in ((1, 20), (2, 30), (3, 10)):
        at = milliseconds(own_time() - timedelta(seconds=seconds))
        gathering.send([one], QUEUES.bulk, **{PUBLISHED: at})

    await gathering.heart.run_for(clock, 2)

    [ctx] = gathering.contexts
    assert ctx.messages == ("1", "2", "3")
    assert (ctx.message_id, ctx.attempt) == ("2", 1), "the oldest's"
    assert ctx.counts == {"ids": 3, "changed": 3}


async def test_a_start_has_one_line_and_each_of_its_messages_one_for_debugging(
    clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "aioworker.consumer")
    gathering = Gathering(stale={1, 2, 7})
    gathering.send([1, 2, 3])
    gathering.send([5])
    gathering.send([7], QUEUES.urgent)
    gathering.send([8])

    await gathering.heart.run_for(clock, 2)

    told = [(one.levelname, one.message, vars(one)["fields"]) for one in caplog.records]
    lines = [(level, text) for level, text, _fields in told]
    assert lines == [
        ("INFO", "nothing to write"),
        ("DEBUG", "chunk done"),
        ("DEBUG", "chunk done"),
        ("INFO", "start done"),
        ("DEBUG", "chunk done"),
        ("DEBUG", "chunk done"),
    ]
    unneeded, start = told[0][2], told[3][2]
    assert (unneeded["messages"], unneeded["ids"], unneeded["needed"]) == (2, 2, 0)
    counted = {"messages": 2, "urgent": 1, "bulk": 1, "ids": 4, "needed": 3, "changed": 3}
    assert start.items() >= counted.items()
    each = {fields["message_id"]: fields["changed"] for *_rest, fields in told[4:]}
    assert each == {"7": 1, "1": 2}


async def test_a_single_change_waits_for_nothing_if_its_start_is_due(clock: FakeClock) -> None:
    gathering = Gathering()
    gathering.send([1], QUEUES.urgent)

    async with running(gathering.heart):
        await clock.advance(0, step=0.1)

        assert gathering.acknowledged == ["1"]


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


async def test_a_read_that_would_end_too_late_is_not_begun(clock: FakeClock) -> None:
    """A thousand chunks that need nothing delay no start once a read's length is known."""
    gathering = Gathering(stale={1, 2})
    gathering.send([1])

    async def slow(ids: list[int]) -> list[int]:
        clock.now += 8
        gathering.reads.append(ids)
        return [one for one in ids if one in (1, 2)]

    gathering.heart.task.needed(slow)
    async with running(gathering.heart):
        await clock.advance(5)
        gathering.send([2])
        gathering.send_chunks(range(1000, 20_000, 1000))
        await clock.advance(INTERVAL, step=0.5)

    assert gathering.runs == [[1], [2]]
    assert gathering.heart.budget.moments[1] - gathering.heart.budget.moments[0] <= INTERVAL + 1
    assert gathering.queued() != [], "the rest is for the next start"


async def test_messages_of_one_id_are_one_row(clock: FakeClock) -> None:
    """An id that was published a thousand times costs one write."""
    gathering = Gathering()
    for number in range(1000):
        gathering.send([7], QUEUES.urgent, id=str(number))

    await gathering.heart.run_for(clock, 2)

    assert gathering.runs == [[7]]
    assert len(gathering.acknowledged) == 1000


async def test_large_bodies_end_a_gathering(clock: FakeClock) -> None:
    gathering = Gathering()
    body = 4 * 1024 * 1024 - 100
    for one in range(1, 8):
        text = json.dumps([[[one]], {}, None])
        gathering.heart.broker.send((text + " " * (body - len(text))).encode(), id=str(one))

    await gathering.heart.run_for(clock, 2)

    assert gathering.runs == [[1, 2, 3, 4]]


async def test_a_read_of_several_that_fails_is_nobodys_yet(clock: FakeClock) -> None:
    gathering = Gathering()

    async def fails(ids: list[int]) -> list[int]:
        if 3 in ids:
            raise KeyError("shop")
        return ids

    gathering.heart.task.needed(fails)
    gathering.send_each(range(1, 5))

    await gathering.heart.run_for(clock, 4 * INTERVAL, step=0.5)

    assert gathering.heart.broker.headers(QUEUES.bulk) == []
    [retried] = gathering.heart.broker.headers(QUEUES.retry)
    assert (retried["id"], retried["retries"]) == ("3", 1), "its attempt counts when it is alone"
    assert sorted(one for run in gathering.runs for one in run) == [1, 2, 4]


async def test_rows_of_every_message_that_are_refused_may_be_the_tasks(clock: FakeClock) -> None:
    """Nothing is set aside for them while nobody knows: a wrong schema refuses all."""

    async def fail(ids: Ids) -> None:
        raise RowsRefusedError(dict.fromkeys(ids, "too long"), 0)

    gathering = Gathering(fail)
    gathering.send_each(range(1, 5))

    await gathering.heart.run_for(clock, 2)

    assert gathering.queued() == ["1", "2", "3", "4"]
    assert gathering.queued(QUEUES.dead) == []


def expired() -> str:
    """Return a moment that is over."""
    return (own_time() - timedelta(minutes=1)).isoformat()


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


async def test_a_read_that_fails_claims_nothing(clock: FakeClock) -> None:
    """A message that names the same row, and was published before, is asked for all the same."""
    gathering = Gathering()
    failures = [DeadLetter("not this one")]

    async def needed(ids: list[int]) -> list[int]:
        if 5 in ids and failures:
            raise failures.pop()
        return ids

    gathering.heart.task.needed(needed)
    now = own_time()
    gathering.send([1])
    async with running(gathering.heart):
        await clock.advance(5)
        gathering.send([2])
        await clock.advance(8)
        for name, seconds in (("refused", 0), ("older", 5)):
            at = milliseconds(now - timedelta(seconds=seconds))
            gathering.send([5], QUEUES.bulk, **{"id": name, PUBLISHED: at})
            await clock.advance(2)
        await clock.advance(INTERVAL)

    assert gathering.runs == [[1], [2, 5]]
    assert gathering.queued(QUEUES.dead) == ["refused"]


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
        gathering.heart.broker.queues[QUEUES.bulk].popleft()  # another worker takes it
        await clock.advance(30, step=0.5)

    assert gathering.acknowledged == ["bad", "9"]
    assert gathering.reads == [[9]], "what went back is forgotten"


async def test_the_row_of_a_message_that_expired_is_another_ones(clock: FakeClock) -> None:
    runs: list[list[tuple[int, str]]] = []

    async def price(rows: list[tuple[int, str]]) -> None:
        runs.append(rows)

    heart = gathering_with(price)
    expires = own_time() + timedelta(hours=1)
    heart.broker.send(b'[[[[0, "first"]]], {}, null]')
    async with running(heart):
        await clock.advance(12)
        heart.broker.send(b'[[[[7, "older"]]], {}, null]')
        heart.broker.send(b'[[[[7, "newer"]]], {}, null]', expires=expires.isoformat())
        await clock.advance(4)
        heart.budget.now = lambda: expires  # type: ignore[method-assign]
        await clock.advance(INTERVAL, step=0.5)

    assert runs == [[(0, "first")], [(7, "older")]]


async def test_a_full_disk_is_nobodys_failure(clock: FakeClock) -> None:
    full = [DatabaseError("no room")]

    async def fail(_ids: Ids) -> None:
        if full:
            gathering.heart.database.no_room = full.pop()
            raise KeyError("disk full")

    gathering = Gathering(fail)
    gathering.send_each(range(1, 9))

    await gathering.heart.run_for(clock, 3 * INTERVAL, step=0.5)

    assert gathering.heart.budget.starts == [8, 4, 4]
    assert gathering.heart.consumer.breaker.reason == ""


class Strange:
    """An id whose own code fails."""

    def __hash__(self) -> int:
        return hash(1)

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("strange")


async def test_strange_ids_of_changed_rows_harm_nobody(clock: FakeClock) -> None:
    async def refresh(ctx: Context, ids: list[int]) -> None:
        ctx.changed([Strange()])

    heart = gathering_with(refresh)
    for one in range(1, 4):
        heart.broker.send(json.dumps([[[one]], {}, None]).encode(), id=str(one))

    async with running(heart) as serving:
        await clock.advance(2, step=0.1)
        assert not serving.done()

    assert heart.broker.acknowledged == ["1", "2", "3"]
    assert heart.consumer.under_way == []


async def test_a_change_that_came_behind_a_read_is_read_again(clock: FakeClock) -> None:
    """Of an id alone nothing is known but that somebody asks: the later change is in the row."""
    gathering = Gathering(stale={1, 100})
    stale = gathering.stale
    assert stale is not None
    gathering.send([100])
    async with running(gathering.heart):
        await clock.advance(12)
        gathering.send([1])
        gathering.send([5], QUEUES.urgent, id="before")
        await clock.advance(3, step=0.5)
        assert "before" in gathering.acknowledged, "it needs nothing"
        stale.add(5)
        gathering.send([5], QUEUES.bulk, id="behind")
        await clock.advance(INTERVAL, step=0.5)

    assert gathering.runs == [[100], [1, 5]]


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


@pytest.mark.parametrize("where", ["run", "read"])
async def test_refused_rows_that_nobody_named_are_nobodys(clock: FakeClock, where: str) -> None:
    async def fail(_ids: Ids) -> None:
        raise RowsRefusedError({9999 if where == "run" else 1: "no"}, 0)

    async def needed(ids: list[int]) -> list[int]:
        if where == "read":
            await fail(ids)
        return ids

    gathering = Gathering(fail)
    gathering.heart.task.needed(needed)
    gathering.send([1])
    gathering.send([2])

    await gathering.heart.run_for(clock, 0)

    assert Kind.ACK not in gathering.heart.consumer.settled
    assert gathering.heart.consumer.settled[Kind.MOVED] == 2


async def test_what_is_moved_unrun_keeps_its_deaths() -> None:
    gathering = Gathering()
    gathering.send([1])
    await come_back(gathering.heart, MOST_RETURNS)
    gathering.heart.budget.died["1"] = 4

    assert (await gathering.heart.serve()).kind is Kind.MOVED

    assert gathering.heart.budget.died == {"1": 4}


async def test_the_time_of_other_messages_reads_is_not_that_of_a_run(clock: FakeClock) -> None:
    gathering = Gathering(task_timeout=5)

    async def needed(ids: list[int]) -> list[int]:
        await asyncio.sleep(1)
        return [one for one in ids if one < 10]

    gathering.heart.task.needed(needed)
    gathering.send([1])
    async with running(gathering.heart):
        await clock.advance(8, step=0.5)
        gathering.send([2])
        for one in range(10, 20):
            await clock.advance(2, step=0.5)
            gathering.send([one])
        await clock.advance(10, step=0.5)

    assert gathering.runs == [[1], [2]]
    assert gathering.queued(QUEUES.retry) == []


async def test_a_read_that_loses_the_connection_costs_no_other_message_anything(
    clock: FakeClock,
) -> None:
    gathering = Gathering()
    heart = gathering.heart
    check = heart.budget.check

    async def reconnect(contenders: int = 0) -> Wait | None:
        await heart.database.ready()
        return await check(contenders)

    async def needed(ids: list[int]) -> list[int]:
        if 2 in ids:
            heart.database.close()
            raise KeyError("it has killed its session")
        if not heart.database.is_open:
            raise TurnLostError("the connection was lost in a run")
        return ids

    heart.budget.check = reconnect  # type: ignore[method-assign]
    heart.task.needed(needed)
    gathering.send([100])
    async with running(heart):
        await clock.advance(12)
        gathering.send([1])
        await clock.advance(2)
        gathering.send([2])
        gathering.send([3], QUEUES.bulk, **{REASON: "it failed", "retries": 0})
        await clock.advance(2 * INTERVAL, step=0.5)

    assert gathering.queued(QUEUES.retry) == ["2"]
    assert sorted(one for run in gathering.runs for one in run) == [1, 3, 100]


async def test_an_urgent_message_waits_behind_no_sweep_that_needs_nothing(
    clock: FakeClock,
) -> None:
    gathering = Gathering(stale={7, 8})

    async def needed(ids: list[int]) -> list[int]:
        await asyncio.sleep(0.3)
        return [one for one in ids if one in (7, 8)]

    gathering.heart.task.needed(needed)
    gathering.send([7], QUEUES.urgent)
    async with running(gathering.heart):
        await clock.advance(3, step=0.1)
        gathering.send_chunks(range(10_000, 510_000, 1000))
        gathering.send([8], QUEUES.urgent)
        await clock.advance(INTERVAL, step=0.1)

    assert gathering.runs == [[7], [8]]


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


async def test_whatever_a_task_counts_harms_no_start(
    clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aioworker.consumer")

    async def refresh(ctx: Context, ids: list[int]) -> None:
        dict.update(ctx.counts, {"ids": "many", "messages": 3})

    heart = gathering_with(refresh)
    for one in range(1, 3):
        heart.broker.send(json.dumps([[[one]], {}, None]).encode(), id=str(one))

    async with running(heart) as serving:
        await clock.advance(2, step=0.1)
        assert not serving.done()

    fields = vars(caplog.records[-1])["fields"]
    assert (fields["messages"], fields["counts.messages"], fields["ids"]) == (2, 3, 2)


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

    assert gathering.heart.settled == ["give_back"] * 2 + ["acknowledge"] * 2
    assert gathering.heart.budget.starts == [2]


async def test_without_a_rate_no_turn_is_lost_with_a_connection(clock: FakeClock) -> None:
    gathering = Gathering(rate=None)
    heart = gathering.heart
    at_step(heart, "take", 2, heart.database.close)
    gathering.send_each([1, 2])

    await heart.run_for(clock, 1)

    assert gathering.runs == [[1, 2]]
    assert heart.settled == ["acknowledge"] * 2


async def test_what_is_moved_on_the_way_sends_no_other_message_back(clock: FakeClock) -> None:
    gathering = Gathering()
    gathering.send([2])
    await come_back(gathering.heart, MOST_RETURNS)
    gathering.send([1], QUEUES.urgent)
    gathering.heart.steps.clear()

    await gathering.heart.run_for(clock, 2)

    assert gathering.runs == [[1, 2]]
    assert "give_back" not in gathering.heart.steps


def strange(_value: object) -> object:
    """Fail in place of a check of an argument."""
    raise KeyError("shop")


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


async def test_who_waits_with_the_turn_rests_and_who_reads_or_runs_does_not(
    clock: FakeClock,
) -> None:
    """A host that is lost while it only waits loses its turn soon; a run may be long."""

    async def run(_ids: Ids) -> None:
        seen.append(f"run: {gathering.heart.budget.resting}")

    gathering = Gathering(run)
    seen: list[str] = []

    async def needed(ids: list[int]) -> list[int]:
        seen.append(f"read: {gathering.heart.budget.resting}")
        return ids

    gathering.heart.task.needed(needed)
    gathering.send([1])
    async with running(gathering.heart):
        await clock.advance(5)
        for one in (2, 3):
            gathering.send([one])
            await clock.advance(10)
            seen.append(f"wait: {gathering.heart.budget.resting}")
        await clock.advance(INTERVAL)

    read, wait, run_ = "read: False", "wait: True", "run: False"
    assert seen == [read, run_, read, wait, read, wait, run_]


@pytest.mark.parametrize(("rate", "spare"), [("2/m", 0.25), ("1/s", 0.05)])
async def test_a_moment_of_the_wait_is_left_to_the_charge(
    clock: FakeClock, rate: str, spare: float
) -> None:
    """What is gathered is charged as soon as the start is due, not when somebody looks next."""
    gathering = Gathering(rate=rate)
    budget = gathering.heart.budget
    charge, early = budget.charge, list[float]()

    async def noting(messages: Sequence[str]) -> Wait | None:
        early.append(budget.due_at - clock.now)
        return await charge(messages)

    budget.charge = noting  # type: ignore[method-assign]
    gathering.send([1])
    async with running(gathering.heart):
        await clock.advance(0)
        gathering.send([2])
        await clock.advance(1.1 * budget.interval, step=0.01)

    assert early[0] == 0
    assert spare - 0.02 < early[1] <= spare


async def test_a_worker_that_gathers_keeps_its_row(clock: FakeClock) -> None:
    gathering = Gathering()
    keep, kept = gathering.heart.worker.presence.keep, list[float]()

    async def noting() -> None:
        kept.append(clock.now)
        await keep()

    gathering.heart.worker.presence.keep = noting  # type: ignore[method-assign]
    gathering.send([1])
    async with running(gathering.heart):
        await clock.advance(1, step=0.1)
        gathering.send([2])
        await clock.advance(INTERVAL - 2, step=0.1)
        assert gathering.runs == [[1]]
        kept.append(clock.now)

    assert max(later - earlier for earlier, later in pairwise(kept)) < 3
