"""A delivery's life, without servers: what each step does, and what it leaves behind."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any
from unittest.mock import Mock

import pytest
from pymysql.constants import ER
from pymysql.err import ProgrammingError

from aioworker.budget.deaths import MOST_DEATHS
from aioworker.clock import own_time
from aioworker.consumer import LEAST_LOST
from aioworker.errors import (
    BrokerError,
    DatabaseError,
    DeadLetter,
    RowsRefusedError,
    RunStoppedError,
    TurnLostError,
)
from aioworker.limits import End, Wait
from aioworker.mysql.database import Database
from aioworker.rabbitmq.message import PUBLISHED, milliseconds
from aioworker.reasons import Reason, ReasonKind
from aioworker.settling.breaker import STREAK
from aioworker.settling.outcome import Kind
from aioworker.settling.probe import Probe
from aioworker.settling.settler import MOST_RETURNS
from aioworker.tasks.context import Context
from aioworker.tasks.task import Task
from tests.doubles.database import NOWHERE
from tests.doubles.heart import MAX_RETRIES, Heart, fails, nothing
from tests.doubles.lanes import QUEUES, MemoryLanes

PAUSED = Wait(Reason(ReasonKind.PAUSED, "paused by alice"), 1)
FAILED_BEFORE: dict[str, Any] = {
    "retries": 1,
    "x-aioworker-first-failed-at": "2026-01-01T00:00:00+00:00",
}


async def fail(heart: Heart, *, times: int) -> list[Kind]:
    """Send a message, and serve it each time that it comes back from the retry queue."""
    heart.broker.send()
    kinds = []
    for _ in range(times):
        kinds.append((await heart.serve()).kind)
        heart.broker.expire()
    return kinds


def heart_of_chunks(
    needed: Callable[[list[int]], list[int]], rate: str | None = "2/m"
) -> tuple[Heart, list[list[int]]]:
    """Return a heart whose task takes chunks of ids, and what it was run with."""
    runs: list[list[int]] = []

    async def refresh(ids: list[int]) -> None:
        runs.append(ids)

    heart = Heart(refresh, rate=rate)
    heart.task.needed(needed)
    return heart, runs


async def test_what_is_done_is_acknowledged_once_and_charged_once() -> None:
    heart = Heart(nothing)
    heart.broker.send()

    assert (await heart.serve()).kind is Kind.ACK

    assert heart.broker.acknowledged == ["one"]
    assert heart.settled == ["acknowledge"]
    assert (heart.budget.charged, heart.budget.forgotten) == (["one"], ["one"])
    assert (heart.consumer.starts, heart.consumer.failures) == (1, 0)
    assert heart.consumer.settled == {Kind.ACK: 1}
    assert heart.consumer.under_way == []


async def test_the_log_line_says_how_long_ago_the_message_was_published(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "aioworker")
    heart = Heart(nothing)
    for seconds in (90, -90):
        headers: dict[str, Any] = {PUBLISHED: milliseconds(own_time() - timedelta(seconds=seconds))}
        heart.broker.send(**headers)
        await heart.serve()
    heart.broker.send()
    await heart.serve()

    ages = [vars(record)["fields"].get("age_seconds") for record in caplog.records]
    assert ages == [pytest.approx(90, abs=30), 0.0, None]


async def test_what_cannot_be_read_is_set_aside_unrun() -> None:
    heart = Heart(nothing)
    heart.broker.send(b"{")

    assert (await heart.serve()).kind is Kind.DEAD_LETTER

    assert heart.settled == ["copy", "acknowledge"]
    assert heart.budget.charged == []
    [letter] = heart.broker.headers(QUEUES.dead)
    assert letter["x-aioworker-worker"] == "test"
    assert (letter["x-aioworker-attempts"], letter["x-aioworker-lane"]) == (1, "bulk")


async def test_arguments_that_the_function_does_not_take_are_refused_unrun() -> None:
    heart = Heart(nothing)
    heart.broker.send(b"[[1], {}, null]")

    assert (await heart.serve()).kind is Kind.DEAD_LETTER

    assert heart.budget.charged == []


async def test_what_has_expired_is_done_unrun() -> None:
    heart = Heart(nothing)
    heart.broker.send(expires=(own_time() - timedelta(seconds=5)).isoformat())

    assert (await heart.serve()).kind is Kind.ACK

    assert (heart.budget.charged, heart.consumer.starts) == ([], 0)


async def test_a_killer_is_set_aside_before_its_body_is_read() -> None:
    heart = Heart(nothing)
    heart.budget.died["one"] = MOST_DEATHS
    heart.broker.send(b"{")

    assert (await heart.serve()).kind is Kind.DEAD_LETTER

    [letter] = heart.broker.headers(QUEUES.dead)
    assert letter["x-aioworker-reason"] == f"its worker died {MOST_DEATHS} times while it ran"


async def test_the_deaths_of_a_killer_are_not_forgotten_before_it_is_set_aside() -> None:
    heart = Heart(nothing)
    heart.budget.died["one"] = MOST_DEATHS

    def fail_at(step: str) -> None:
        if step == "acknowledge":
            raise ConnectionError("connection lost")

    heart.lanes = MemoryLanes(heart.broker, fail_at)
    heart.broker.send()

    with pytest.raises(BrokerError):
        await heart.serve()

    assert heart.budget.forgotten == []


async def test_what_is_refused_of_a_task_of_chunks_says_that_it_had_no_id(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "aioworker")
    heart, _runs = heart_of_chunks(lambda ids: ids)
    heart.broker.send(b"{")

    await heart.serve()

    assert vars(caplog.records[-1])["fields"]["ids"] == 0


async def test_no_message_is_kept_by_the_error_that_gave_it_back() -> None:
    """Until Python looks for cycles: a body may be large."""
    heart = Heart(nothing)
    heart.budget.refusal = DatabaseError("gone", unreachable=True)
    heart.broker.send()
    delivery = await heart.lanes.take()
    assert delivery is not None
    kept = weakref.ref(delivery.message)
    gc.disable()
    try:
        outcome = await heart.consumer.serve(delivery, heart.lanes)
        assert outcome.away is heart.budget.refusal
        heart.lanes.held.clear()
        del delivery, outcome
        assert kept() is None
    finally:
        gc.enable()


async def test_one_death_less_is_no_killer() -> None:
    heart = Heart(nothing)
    heart.budget.died["one"] = MOST_DEATHS - 1
    heart.broker.send()

    assert (await heart.serve()).kind is Kind.ACK


async def test_a_run_gets_what_is_needed_of_its_chunk() -> None:
    heart, runs = heart_of_chunks(lambda ids: ids[1:])
    heart.broker.send(b"[[[1, 2, 3]], {}, null]")

    assert (await heart.serve()).kind is Kind.ACK

    assert runs == [[2, 3]]


async def test_what_needs_no_write_is_not_charged() -> None:
    heart, runs = heart_of_chunks(lambda _ids: [])
    heart.broker.send(b"[[[1, 2, 3]], {}, null]")

    assert (await heart.serve()).kind is Kind.ACK

    assert (runs, heart.budget.charged, heart.consumer.starts) == ([], [], 0)


async def test_without_a_rate_nobody_asks_what_is_needed() -> None:
    heart, runs = heart_of_chunks(lambda _ids: [], rate=None)
    heart.broker.send(b"[[[1, 2, 3]], {}, null]")

    assert (await heart.serve()).kind is Kind.ACK

    assert runs == [[1, 2, 3]]


async def test_a_start_that_the_budget_refuses_leaves_the_message_as_it_was() -> None:
    heart = Heart(nothing)
    heart.budget.refusal = PAUSED
    heart.broker.send()

    assert (await heart.serve()).kind is Kind.RELEASED

    assert heart.settled == ["give_back"]
    assert heart.broker.headers(QUEUES.bulk) == [{"task": "shop", "id": "one"}]
    assert heart.budget.forgotten == [], "the deaths of one that did not run are not forgotten"
    assert (heart.consumer.starts, heart.consumer.failures) == (0, 0)


async def test_a_database_that_cannot_charge_is_what_is_away() -> None:
    heart = Heart(nothing)
    heart.budget.refusal = away = DatabaseError("gone", unreachable=True)
    heart.broker.send()

    outcome = await heart.serve()

    assert (outcome.kind, outcome.away) == (Kind.RELEASED, away)


async def test_a_failure_counts_an_attempt_and_waits_in_the_retry_queue() -> None:
    heart = Heart(fails)
    heart.broker.send()

    assert (await heart.serve()).kind is Kind.RETRY

    [copy] = heart.broker.headers(QUEUES.retry)
    assert (copy["retries"], copy["x-aioworker-reason"]) == (1, "KeyError: 'shop'")
    assert heart.settled == ["copy", "acknowledge"]
    assert (heart.consumer.failures, heart.budget.forgotten) == (1, ["one"])


async def test_after_its_last_attempt_a_message_is_set_aside() -> None:
    heart = Heart(fails)

    kinds = await fail(heart, times=MAX_RETRIES + 1)

    assert kinds == [Kind.RETRY] * MAX_RETRIES + [Kind.DEAD_LETTER]
    [letter] = heart.broker.headers(QUEUES.dead)
    assert letter["x-aioworker-reason"] == "KeyError: 'shop'; attempt 3 of 3"
    assert "KeyError" in letter["x-aioworker-traceback"]


async def test_what_the_task_calls_a_dead_letter_is_one_at_once() -> None:
    async def refuses() -> None:
        raise DeadLetter("no such shop")

    heart = Heart(refuses)
    heart.probe.away = DatabaseError("gone", unreachable=True)

    assert await fail(heart, times=1) == [Kind.DEAD_LETTER]


async def test_nothing_counts_while_the_database_is_away() -> None:
    heart = Heart(fails)
    heart.probe.away = DatabaseError("gone", unreachable=True)
    heart.broker.send()

    outcome = await heart.serve()

    assert (outcome.kind, outcome.reason) == (Kind.RELEASED, "KeyError: 'shop'; gone")
    assert outcome.away is heart.probe.away
    assert heart.broker.headers(QUEUES.bulk) == [{"task": "shop", "id": "one"}]


async def test_a_message_that_lost_its_connection_has_attempts_more() -> None:
    """Its connection may have been ended by anything."""

    async def loses() -> None:
        raise TurnLostError("lost")

    heart = Heart(loses, max_retries=0)

    kinds = await fail(heart, times=LEAST_LOST)

    assert kinds == [Kind.RETRY] * (LEAST_LOST - 1) + [Kind.DEAD_LETTER]


def heart_on_database(work: Callable[[Heart], None], **options: Any) -> Heart:
    """Return a heart whose task uses the database, and does *work* on the heart."""

    async def run(ctx: Context) -> None:
        work(heart)

    heart = Heart(run, **options)
    return heart


def lose(heart: Heart) -> None:
    """Lose the run's connection."""
    heart.database.open = False
    raise KeyError("shop")


async def test_a_run_whose_connection_is_gone_has_lost_it() -> None:
    heart = heart_on_database(lose)
    heart.broker.send()

    assert (await heart.serve()).kind is Kind.RETRY

    [copy] = heart.broker.headers(QUEUES.retry)
    assert copy["x-aioworker-lost"] == 1


async def test_a_run_that_was_cut_off_has_lost_nothing() -> None:
    """Its connection is closed for that."""

    async def run(ctx: Context) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            heart.database.open = False

    heart = Heart(run, task_timeout=0.01)
    heart.broker.send()
    await heart.serve()

    [copy] = heart.broker.headers(QUEUES.retry)
    assert "x-aioworker-lost" not in copy


def fill(heart: Heart) -> None:
    """Find no room for a write."""
    heart.database.no_room = DatabaseError("full", unreachable=True)
    raise KeyError("shop")


async def test_without_room_a_message_goes_behind_the_others() -> None:
    """Of the whole server, or of a table that this message alone fills: others may do."""
    heart = heart_on_database(fill)
    heart.broker.send()

    outcome = await heart.serve()

    assert (outcome.kind, str(outcome.away)) == (Kind.POSTPONED, "full")


async def test_without_room_it_is_the_messages_own_once_others_succeed() -> None:
    heart = heart_on_database(lambda _heart: None)
    heart.broker.send(id="good")
    await heart.serve()
    heart.task.function = _filling(heart)
    heart.broker.send(**FAILED_BEFORE)

    assert (await heart.serve()).kind is Kind.RETRY


def _filling(heart: Heart) -> Any:
    async def run(ctx: Context) -> None:
        fill(heart)

    return run


async def test_a_task_that_knew_what_to_do_without_room_leaves_nothing_behind() -> None:
    def know(heart: Heart) -> None:
        heart.database.no_room = DatabaseError("full", unreachable=True)

    heart = heart_on_database(know)
    heart.broker.send()

    assert (await heart.serve()).kind is Kind.ACK

    assert heart.database.no_room is None
    assert heart.database.runs == 1


async def test_a_missing_table_opens_the_breaker_if_the_tasks_own_check_finds_nothing() -> None:
    heart = Heart(missing)
    heart.broker.send(id="one")
    heart.broker.send(id="two")

    assert (await heart.serve()).kind is Kind.POSTPONED

    assert "doesn't exist" in heart.consumer.breaker.reason


async def test_a_missing_table_that_the_tasks_own_check_finds_is_waited_for() -> None:
    async def check(_ctx: Context) -> None:
        raise DatabaseError("no table addons")

    heart = Heart(missing)
    heart.task.check = check
    heart.broker.send()

    outcome = await heart.serve()

    assert (outcome.kind, str(outcome.away)) == (Kind.RELEASED, "no table addons")


async def missing() -> None:
    """Miss a table."""
    raise ProgrammingError(ER.NO_SUCH_TABLE, "Table 'shop' doesn't exist")


async def test_what_the_data_refuses_is_set_aside_at_once() -> None:
    async def refuses() -> None:
        raise RowsRefusedError({1: "Data too long"}, written=0)

    assert await fail(Heart(refuses), times=1) == [Kind.DEAD_LETTER]


async def test_messages_that_are_alone_are_set_aside_but_no_fourth_one() -> None:
    """It may be the task that fails, and nobody can tell."""
    heart = Heart(fails, max_retries=1)
    kinds = []
    for number in range(STREAK + 1):
        heart.broker.send(id=f"message {number}", **FAILED_BEFORE)
        kinds.append((await heart.serve()).kind)
        heart.broker.queues[QUEUES.retry].clear()

    assert kinds == [Kind.DEAD_LETTER] * STREAK + [Kind.POSTPONED]


async def test_while_the_breaker_is_open_one_beside_what_was_put_off_is_not_alone() -> None:
    heart = Heart(fails, max_retries=1)
    for number in range(STREAK + 1):
        heart.broker.send(id=f"message {number}", **FAILED_BEFORE)
    kinds = [(await heart.serve()).kind for _ in range(STREAK + 1)]

    assert kinds == [Kind.POSTPONED] * (STREAK + 1)


async def test_a_run_that_is_stopped_gives_its_message_back_uncounted() -> None:
    """Whatever it catches, or raises, and though the pause is over by then."""
    refused: list[str] = []

    async def catches(ctx: Context) -> None:
        for change in (ctx.database.execute, ctx.database.query):
            with pytest.raises(RunStoppedError) as raised:
                await change("UPDATE addons SET slug = ''")
            refused.append(str(raised.value))
        heart.budget.stop = None  # resumed: this run has lost a transaction all the same
        with pytest.raises(RunStoppedError):
            async with ctx.transaction():
                refused.append("begun")

    async def raises(ctx: Context) -> None:
        try:
            await ctx.database.execute("UPDATE addons SET slug = ''")
        except RunStoppedError as error:
            raise ValueError("shop") from error

    for work in (catches, raises):
        heart = Heart(work, rate="2/m", max_retries=0)
        heart.budget.stop = PAUSED.reason
        heart.broker.send(id="one")

        outcome = await heart.serve()

        assert (outcome.kind, outcome.reason) == (Kind.RELEASED, "paused by alice")
        assert not outcome.failed
        assert heart.consumer.failures == 0
        assert heart.probe.asked == 0
        assert heart.budget.ends == [End("released")]
        assert heart.broker.headers(QUEUES.dead) == heart.broker.headers(QUEUES.retry) == []
    assert refused == ["no further transaction in this run: paused by alice"] * 2


async def test_a_run_that_is_stopped_is_no_proof_that_the_task_works() -> None:
    async def run(ctx: Context) -> None:
        with suppress(RunStoppedError):
            await ctx.database.execute("UPDATE addons SET slug = ''")

    heart = Heart(run, rate="2/m")
    heart.consumer.breaker.reason = "3 messages in a row failed"
    heart.budget.stop = PAUSED.reason
    heart.broker.send()

    await heart.serve()

    assert heart.consumer.breaker.reason == "3 messages in a row failed"


async def test_the_wait_for_a_first_write_is_no_part_of_a_runs_time() -> None:
    async def run(ctx: Context) -> None:
        with heart.database.waiting(60, Reason(ReasonKind.FIRST_WRITE, "due in 60 s")):
            await asyncio.sleep(0.05)

    heart = Heart(run, task_timeout=0.02)
    heart.broker.send()

    assert (await heart.serve()).kind is Kind.ACK
    assert "waiting: due in 60 s" in heart.said


async def test_a_publisher_hurries_no_thread() -> None:
    def runs() -> None:
        time.sleep(0.05)

    heart = Heart(runs)  # type: ignore[arg-type]  # a function, which runs in a thread
    heart.broker.send(timelimit=[None, 0.01])

    assert (await heart.serve()).kind is Kind.ACK


async def test_what_comes_back_again_and_again_is_moved_behind_the_others() -> None:
    """RabbitMQ would set it aside at a hundred."""
    heart = Heart(nothing)
    heart.budget.refusal = PAUSED
    heart.broker.send()

    kinds = [(await heart.serve()).kind for _ in range(MOST_RETURNS + 1)]

    assert kinds == [Kind.RELEASED] * MOST_RETURNS + [Kind.MOVED]
    [copy] = heart.broker.headers(QUEUES.bulk)
    assert "retries" not in copy, "no attempt is counted"


async def test_three_messages_that_fail_for_good_open_the_breaker() -> None:
    heart = Heart(fails, max_retries=1)

    for number in range(STREAK + 1):  # the last one of all would be alone
        heart.broker.send(id=f"message {number}", **FAILED_BEFORE)
    kinds = [(await heart.serve()).kind for _ in range(STREAK)]

    assert kinds == [Kind.POSTPONED] * STREAK
    assert heart.consumer.breaker.reason.startswith("3 messages in a row failed for good")


async def test_the_first_run_that_ends_well_closes_the_breaker() -> None:
    heart = Heart(fails, max_retries=1)
    for number in range(STREAK):
        heart.broker.send(id=f"message {number}", **FAILED_BEFORE)
    for _ in range(STREAK):
        await heart.serve()

    heart.task.function = nothing
    heart.broker.send()
    await heart.serve()

    assert heart.consumer.breaker.reason == ""


async def test_while_others_succeed_a_bad_message_is_set_aside() -> None:
    heart = Heart(fails, max_retries=1)
    heart.broker.send(id="good")
    heart.task.function = nothing
    await heart.serve()
    heart.task.function = fails
    for number in range(STREAK + 1):
        heart.broker.send(id=f"message {number}", **FAILED_BEFORE)

    kinds = [(await heart.serve()).kind for _ in range(STREAK + 1)]

    assert kinds == [Kind.DEAD_LETTER] * (STREAK + 1)
    assert heart.consumer.breaker.reason == ""


async def test_a_run_is_cut_off_when_its_time_is_up() -> None:
    async def hangs() -> None:
        await asyncio.Event().wait()

    heart = Heart(hangs, task_timeout=0.01)
    heart.broker.send()

    assert (await heart.serve()).kind is Kind.RETRY

    [copy] = heart.broker.headers(QUEUES.retry)
    reason = "the run took longer than 0.01 s and was cut off"
    assert copy["x-aioworker-reason"] == f"TimeoutError: {reason}"


async def test_an_error_that_cannot_be_asked_ends_no_worker_where_time_is_up() -> None:
    class EvilError(Exception):
        @property  # type: ignore[misc]
        def __class__(self) -> Any:
            raise KeyError("evil")

    async def hangs() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise EvilError from None

    heart = Heart(hangs, task_timeout=0.01)
    heart.broker.send()

    assert (await heart.serve()).kind is Kind.RETRY


async def test_a_publisher_grants_a_run_less_time() -> None:
    async def hangs() -> None:
        await asyncio.Event().wait()

    heart = Heart(hangs)
    heart.broker.send(timelimit=[None, 0.01])

    assert (await heart.serve()).kind is Kind.RETRY


async def test_a_copy_that_is_not_confirmed_leaves_the_message_where_it_was() -> None:
    heart = Heart(fails)
    heart.broker.refusal = BrokerError("not taken")
    heart.broker.send()

    outcome = await heart.serve()

    assert (outcome.kind, outcome.away) == (Kind.RELEASED, heart.broker.refusal)
    assert heart.settled == ["copy", "give_back"]
    assert heart.broker.headers(QUEUES.bulk) == [{"task": "shop", "id": "one"}]


async def test_a_run_that_ended_before_is_not_run_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The connection was lost between its end and its acknowledgement."""
    caplog.set_level(logging.INFO, "aioworker")
    heart = Heart(nothing)

    async def cut_off() -> None:
        heart.lanes.lose()

    heart.task.function = cut_off
    heart.broker.send()
    with pytest.raises(BrokerError):
        await heart.serve()
    heart.lanes = MemoryLanes(heart.broker, heart.steps.append)

    assert (await heart.serve()).kind is Kind.ACK

    assert (heart.consumer.starts, heart.broker.acknowledged) == (1, ["one"])
    assert [vars(one)["fields"].get("ran") for one in caplog.records] == [None, "before"]
    assert heart.consumer.under_way == []


async def test_a_retry_whose_copy_was_confirmed_is_not_copied_again() -> None:
    heart = Heart(fails)

    def fail_at(step: str) -> None:
        if step == "acknowledge":
            heart.lanes.lost = True
            raise ConnectionError("connection lost")

    heart.lanes = MemoryLanes(heart.broker, fail_at)
    heart.broker.send()
    with pytest.raises(BrokerError):
        await heart.serve()
    heart.lanes.lose()
    heart.lanes = MemoryLanes(heart.broker, heart.steps.append)

    assert (await heart.serve()).kind is Kind.RETRY

    assert heart.settled == ["acknowledge"]
    assert len(heart.broker.headers(QUEUES.retry)) == 1


async def test_a_failure_that_could_not_be_settled_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, "aioworker")
    heart = Heart(fails)

    def fail_at(step: str) -> None:
        if step == "acknowledge":
            raise ConnectionError("connection lost")

    heart.lanes = MemoryLanes(heart.broker, fail_at)
    heart.broker.send()

    with pytest.raises(BrokerError):
        await heart.serve()

    [told] = [vars(record)["fields"]["reason"] for record in caplog.records]
    assert "connection lost" in told
    assert told.endswith("it came to: KeyError: 'shop'")


async def test_a_worker_that_ends_is_no_failure_of_its_run() -> None:
    """What ran is named by whoever asks then."""

    async def hangs() -> None:
        await asyncio.Event().wait()

    heart = Heart(hangs)
    heart.broker.send()
    serving = asyncio.create_task(heart.serve())
    while not heart.consumer.starts:  # noqa: ASYNC110 - the heart notifies nobody
        await asyncio.sleep(0)

    serving.cancel()
    await asyncio.wait({serving})

    assert serving.cancelled()
    assert heart.settled == []
    [start] = heart.consumer.under_way
    assert [one.delivery.id for one in start.held] == ["one"]


async def test_runs_that_fail_at_once_share_one_question_to_a_database_that_is_away() -> None:
    """Each would wait for its answer as long as that may take, one after the other."""
    asked = 0

    async def prove(_database: object) -> None:
        nonlocal asked
        asked += 1
        await asyncio.sleep(0)
        raise TimeoutError

    presence: Any = Mock(keeps_row=True, prove=prove)
    database = Database(NOWHERE, connect_timeout=1, timeout=1)
    probe = Probe(Task("shop", nothing), database, presence, 10)

    found = await asyncio.gather(
        *(probe.check_database() for _ in range(5)), return_exceptions=True
    )

    assert [type(away) for away in found] == [DatabaseError] * 5
    assert asked == 2, "one for the first, and one for the four that failed while it was on"
    with pytest.raises(DatabaseError):
        await probe.check_database()
    assert asked == 3
