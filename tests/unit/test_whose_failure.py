"""A start of several messages fails: whose failure it is, and what that costs the others."""

from __future__ import annotations

import json

import pytest
from pymysql.constants import ER
from pymysql.err import OperationalError

from aioworker.errors import (
    DatabaseError,
    DeadLetter,
    Retry,
    RowsRefusedError,
    TurnLostError,
)
from aioworker.limits import Wait
from aioworker.rabbitmq.message import REASON, TOGETHER
from aioworker.settling.outcome import Kind
from tests.doubles.gathering import AWAY, INTERVAL, Gathering, Ids, fails, gathering_with
from tests.doubles.heart import running
from tests.doubles.lanes import QUEUES
from tests.fakes import FakeClock


@pytest.mark.parametrize("poison", [1, 7, 26, 50])
async def test_of_fifty_the_culprit_is_found_and_the_others_are_done(
    clock: FakeClock, poison: int
) -> None:
    """In log2(50) rounds, each of two starts at most; its attempts count from when it is alone."""

    async def fail(ids: Ids) -> None:
        if poison in ids:
            raise KeyError(poison)

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


async def test_one_that_cannot_be_read_among_what_needs_nothing_opens_no_breaker(
    clock: FakeClock,
) -> None:
    """No start has failed."""
    gathering = Gathering(max_retries=0)

    async def needed(ids: list[int]) -> list[int]:
        if 7 in ids:
            raise KeyError("strange row")
        return []

    gathering.heart.task.needed(needed)
    gathering.send_each(range(1, 65))
    async with running(gathering.heart):
        await clock.advance(5, step=0.1)

        assert gathering.heart.consumer.breaker.reason == ""
    assert len(gathering.heart.broker.acknowledged) >= 63


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


async def test_a_row_that_is_refused_is_its_messages_though_no_other_was_to_be_written(
    clock: FakeClock,
) -> None:
    """Somebody else wrote the others meanwhile: no row of the run is written."""

    async def price(_rows: list[tuple[int, str]]) -> None:
        raise RowsRefusedError({7: "too long"}, 0)

    heart = gathering_with(price)
    for one in (6, 7, 8):
        body = json.dumps([[[[one, "text"]]], {}, None]).encode()
        heart.broker.send(body, QUEUES.bulk, id=str(one))

    await heart.run_for(clock, 2)

    assert [headers["id"] for headers in heart.broker.headers(QUEUES.dead)] == ["7"]
    assert sorted(heart.broker.acknowledged) == ["6", "7", "8"]


async def test_rows_of_every_message_that_are_refused_may_be_the_tasks(clock: FakeClock) -> None:
    """Nothing is set aside for them while nobody knows: a wrong schema refuses all."""

    async def fail(ids: Ids) -> None:
        raise RowsRefusedError(dict.fromkeys(ids, "too long"), 0)

    gathering = Gathering(fail)
    gathering.send_each(range(1, 5))

    await gathering.heart.run_for(clock, 2)

    assert gathering.queued() == ["1", "2", "3", "4"]
    assert gathering.queued(QUEUES.dead) == []


@pytest.mark.parametrize("ids", [(7, 7, *range(100, 199)), (7, *range(100, 199))])
async def test_rows_that_are_refused_one_and_all_set_nothing_aside(
    clock: FakeClock, ids: tuple[int, ...]
) -> None:
    """It may be the task, also if a later row of one id has taken the place of another."""

    async def price(rows: list[tuple[int, str]]) -> None:
        raise RowsRefusedError({row[0]: "no such column" for row in rows}, 0)

    heart = gathering_with(price)
    for number, one in enumerate(ids):
        body = json.dumps([[[[one, f"v{number}"]]], {}, None]).encode()
        heart.broker.send(body, QUEUES.bulk, id=str(number))

    await heart.run_for(clock, 2)

    assert heart.broker.headers(QUEUES.dead) == []
    assert heart.broker.queues[QUEUES.bulk]


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
