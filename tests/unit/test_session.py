"""One connection's session, without servers: what it asks, what it waits for, what it takes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from aioworker.errors import AioworkerError, BrokerError, DatabaseError
from aioworker.limits import RateLimit, Wait
from aioworker.rabbitmq.delivery import SUSPECT_RETURNS
from aioworker.rabbitmq.message import REASON
from aioworker.reasons import Reason, ReasonKind
from aioworker.settling.breaker import STREAK
from aioworker.settling.outcome import Kind
from aioworker.tasks.context import Context
from aioworker.worker.session import ALARM_SECONDS, AT_ONCE, IDLE_SECONDS
from tests.doubles.heart import Heart, fails, nothing, running, slow_down
from tests.doubles.lanes import QUEUES, MemoryLanes
from tests.fakes import FakeClock

PAUSED = Wait(Reason(ReasonKind.PAUSED, "paused by alice"), 2)
HELD = Wait(Reason(ReasonKind.TURN, "turn: held by host:2"), 0.05)
UNOWNED = Wait(Reason(ReasonKind.TURN_UNOWNED, "turn: held by session 5"), 0.05)
AWAY = DatabaseError("gone", unreachable=True)
OPEN = "breaker open: KeyError: 'shop'"
TRIED = f"{OPEN}; a few messages a minute are tried"


def open_breaker(heart: Heart, seconds: float = 60) -> None:
    """Open the breaker, its next test due in *seconds*."""
    heart.consumer.breaker.reason = "KeyError: 'shop'"
    heart.consumer.breaker.seconds = lambda: seconds  # type: ignore[method-assign]


async def test_an_idle_worker_waits_with_nothing_in_hand_and_takes_what_comes(
    clock: FakeClock,
) -> None:
    heart = Heart(rate="2/m")
    async with running(heart):
        await clock.advance(10, step=IDLE_SECONDS)
        assert heart.said == ["waiting: nothing queued"]
        assert "take" not in heart.steps

        heart.broker.send()
        await clock.advance(IDLE_SECONDS)

        assert heart.broker.acknowledged == ["one"]


async def test_a_start_waits_for_its_moment_with_nothing_in_hand(clock: FakeClock) -> None:
    heart = Heart(rate="2/m")
    for number in range(3):
        heart.broker.send(id=str(number))
    async with running(heart):
        for now in range(90):
            assert heart.lanes.held == {}, f"at {now} s"
            await clock.advance(1)

    assert heart.budget.moments == [pytest.approx(moment, abs=0.5) for moment in (0, 30, 60)]
    assert heart.broker.acknowledged == ["0", "1", "2"]


async def test_an_urgent_message_is_taken_first(clock: FakeClock) -> None:
    heart = Heart(rate="100/s")
    heart.broker.send(id="bulk")
    heart.broker.send(id="urgent", lane=QUEUES.urgent)

    async with running(heart):
        await clock.advance(1, step=0.01)

    assert heart.broker.acknowledged == ["urgent", "bulk"]


async def test_a_turn_ends_with_its_start(clock: FakeClock) -> None:
    """Another worker may have the next one."""
    turns: list[int] = []

    async def run() -> None:
        turns.append(heart.budget.turns)

    heart = Heart(run, rate="100/s")
    heart.broker.send(id="one")
    heart.broker.send(id="two")

    async with running(heart):
        await clock.advance(1, step=0.01)
        assert heart.budget.turns == 0

    assert turns == [1, 1]
    assert heart.budget.asked > 2, "it looked between them"


async def test_what_needs_no_start_goes_beside_one_in_the_same_turn(clock: FakeClock) -> None:
    heart = Heart(rate="2/m")

    async def refresh(ids: list[int]) -> None:
        """Be a task that takes chunks."""

    heart.task.function, heart.task.signature = refresh, type(heart.task)("x", refresh).signature
    heart.task.needed(lambda ids: [one for one in ids if one == 3])
    for number in (1, 2, 3, 4):
        heart.broker.send(f"[[[{number}]], {{}}, null]".encode(), id=str(number))

    async with running(heart):
        await clock.advance(1)

        assert heart.broker.acknowledged == ["1", "2", "3"]
        assert heart.budget.charged == ["3"]


async def test_where_tasks_share_a_budget_it_says_what_waits_and_can_start(
    clock: FakeClock,
) -> None:
    """Others leave the next start to it meanwhile."""
    heart = Heart(rate="2/m")
    heart.budget.shares = True
    heart.broker.send()
    heart.broker.send()
    async with running(heart):
        await clock.advance(10)
        assert heart.budget.wants[-1] == (False, True), "the second one waits for its start"

        heart.budget.refusal = PAUSED
        await clock.advance(5)
        assert heart.budget.wants[-1] == (False, False), "paused, it wants nothing"

        heart.budget.refusal = None
        await clock.advance(60)
        assert heart.budget.wants[-1] == (False, False), "nothing is left"


async def test_a_paused_task_takes_nothing_until_it_is_resumed(clock: FakeClock) -> None:
    heart = Heart(rate="2/m")
    heart.budget.refusal = PAUSED
    heart.broker.send()
    async with running(heart):
        await clock.advance(60)
        assert heart.said == ["waiting: paused by alice"]
        assert heart.steps == []

        heart.budget.refusal = None
        await clock.advance(2)

        assert heart.broker.acknowledged == ["one"]


@pytest.mark.parametrize(
    ("wait", "said"),
    [
        (None, f"stalled: {TRIED}"),
        (PAUSED, f"waiting: paused by alice; {TRIED}"),
    ],
    ids=["alone", "and paused"],
)
async def test_all_that_hold_are_said(clock: FakeClock, wait: Wait | None, said: str) -> None:
    heart = Heart(rate="2/m")
    heart.budget.refusal = wait
    open_breaker(heart)
    heart.broker.send()

    async with running(heart):
        await clock.advance(5)

    assert heart.said == [said]
    assert heart.steps == []


async def test_an_open_breaker_is_said_before_the_wait_for_the_budget(clock: FakeClock) -> None:
    """It is due for a test, and whoever looks has to know of it first."""
    heart = Heart(fails, rate="2/m")
    heart.broker.send()
    open_breaker(heart, seconds=0)

    async with running(heart):
        await clock.advance(5)
        heart.broker.send()
        await clock.advance(5)

    assert [one for one in heart.said if one.startswith(f"stalled: {OPEN}; budget: next start")]


async def test_nothing_queued_is_no_news_while_the_breaker_is_open(clock: FakeClock) -> None:
    heart = Heart(rate="2/m")
    open_breaker(heart, seconds=0)

    async with running(heart):
        await clock.advance(5)

    assert heart.said == [f"stalled: {TRIED}"]


async def test_a_turn_that_another_worker_holds_is_waited_for(clock: FakeClock) -> None:
    heart = Heart(rate="100/s")
    heart.budget.holder = HELD
    heart.broker.send()
    async with running(heart):
        await clock.advance(30, step=0.05)
        assert heart.said == ["waiting: turn: held by host:2"]
        assert "take" not in heart.steps

        heart.budget.holder = None
        await clock.advance(1, step=0.05)

        assert heart.broker.acknowledged == ["one"]


async def test_a_turn_that_nobody_known_holds_is_a_stall(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    heart = Heart(rate="100/s")
    heart.worker.recovery.stall._clock = lambda: clock.now
    heart.budget.holder = UNOWNED
    heart.broker.send()
    async with running(heart):
        await clock.advance(9, step=0.05)
        assert heart.said == ["waiting: turn: held by session 5"]
        await clock.advance(2, step=0.05)
        assert heart.said[1].startswith("stalled: stalled: messages wait and the budget is free")

        heart.budget.holder = None
        await clock.advance(1, step=0.05)

        assert heart.broker.acknowledged == ["one"]


async def test_whether_messages_wait_is_not_asked_when_a_start_is_due(clock: FakeClock) -> None:
    """It was asked while the start waited for its moment."""
    heart = Heart(rate="2/m")
    steps: list[tuple[str, float]] = []
    heart.lanes = MemoryLanes(heart.broker, lambda step: steps.append((step, clock.now)))
    for number in range(3):
        heart.broker.send(id=str(number))
    async with running(heart):
        await clock.advance(70, step=0.05)

    taken = [at for step, at in steps if step == "take"]
    assert len(taken) == 3
    assert [at for step, at in steps if step == "hold_something" and at in taken[1:]] == []


async def test_nothing_is_taken_while_the_database_cannot_be_used(clock: FakeClock) -> None:
    heart = Heart(rate="2/m")
    heart.probe.away = AWAY
    heart.broker.send()
    async with running(heart):
        await clock.advance(60)
        assert heart.steps == []
        assert heart.said[0].startswith("waiting: database unreachable since ")
        assert heart.probe.asked > 10

        heart.probe.away = None
        await clock.advance(5)

        assert heart.broker.acknowledged == ["one"]


async def test_after_a_failed_look_at_the_budget_the_database_is_asked_again(
    clock: FakeClock,
) -> None:
    """It may be another server by now, that only reads."""
    heart = Heart(rate="2/m")
    async with running(heart):
        await clock.advance(5)
        assert heart.probe.asked == 1

        heart.budget.refusal = AWAY
        await clock.advance(5)

        assert heart.probe.asked > 1


async def test_a_lost_connection_ends_the_turn_with_it(clock: FakeClock) -> None:
    """It held the turn: the next message would fail for nothing."""
    turns: list[int] = []

    async def refresh(ctx: Context, ids: list[int]) -> None:
        """Take chunks."""

    heart = Heart(refresh, rate="2/m")

    @heart.task.needed
    async def none(_ctx: Context, _ids: list[int]) -> list[int]:
        turns.append(heart.budget.asked)
        heart.database.open = False
        return []

    for number in (1, 2):
        heart.broker.send(f"[[[{number}]], {{}}, null]".encode(), id=str(number))
    async with running(heart):
        await clock.advance(1)

    assert len(set(turns)) == 2, "it asked the budget once more between them"


async def test_a_database_that_failed_once_it_was_trusted_is_connected_to_again(
    clock: FakeClock,
) -> None:
    """Its address may lead to another server now, or a run spoiled the session."""
    heart = Heart(rate="2/m")
    async with running(heart):
        await clock.advance(5)
        heart.budget.refusal = DatabaseError("refused")
        await clock.advance(5)

        assert heart.database.closed > 0


async def test_a_run_that_finds_the_database_away_is_the_last_until_it_is_back(
    clock: FakeClock,
) -> None:
    async def run() -> None:
        heart.probe.away = AWAY
        raise KeyError("shop")

    heart = Heart(run, rate="100/s")
    heart.broker.send(id="one")
    heart.broker.send(id="two")
    async with running(heart):
        await clock.advance(30, step=0.1)

        assert heart.steps.count("take") == 1
        assert heart.consumer.settled == {Kind.RELEASED: 1}
        assert heart.broker.headers(QUEUES.bulk)[0]["id"] == "one"


async def test_without_confirms_nothing_is_taken_for_a_while(clock: FakeClock) -> None:
    heart = Heart(fails, rate="100/s")
    heart.broker.refusal = BrokerError("no answer", unreachable=True)
    heart.broker.send()
    async with running(heart):
        await clock.advance(10, step=0.5)
        assert heart.steps.count("take") == 1
        assert "waiting: copy not confirmed: no answer" in heart.said


async def test_without_confirms_what_is_set_meanwhile_is_followed(clock: FakeClock) -> None:
    heart = Heart(fails, rate="100/s")
    heart.broker.refusal = BrokerError("no answer", unreachable=True)
    heart.broker.send()
    async with running(heart):
        await clock.advance(1, step=0.5)
        before = heart.budget.asked
        await clock.advance(10, step=0.5)

        assert heart.budget.asked - before >= 4


async def test_what_is_served_ends_the_outage_of_copies(clock: FakeClock) -> None:
    """Also where several are served at once, and no outcome asks for anything."""
    heart = Heart()
    ended: list[float] = []
    heart.worker.recovery.copies.end = lambda: ended.append(clock.now)  # type: ignore[method-assign]
    heart.broker.send()
    async with running(heart):
        await clock.advance(2, step=0.1)

        assert ended


async def test_once_rabbitmq_has_memory_again_it_goes_on_at_once(clock: FakeClock) -> None:
    heart = Heart(fails, rate="100/s")
    heart.broker.refusal = BrokerError("no answer", unreachable=True)
    heart.broker.takes.clear()
    heart.broker.send()
    async with running(heart):
        await clock.advance(ALARM_SECONDS / 3, step=0.5)
        assert heart.steps.count("take") == 1

        heart.broker.refusal = None
        heart.broker.takes.set()
        await clock.advance(3, step=0.5)

        assert heart.consumer.settled[Kind.RETRY] == 1


@pytest.mark.parametrize("busy", ["idle", "paused", "database away"])
async def test_a_lost_connection_ends_a_wait_at_once(clock: FakeClock, busy: str) -> None:
    heart = Heart(rate="2/m")
    if busy == "paused":
        heart.budget.refusal = Wait(PAUSED.reason, 1000)
    if busy == "database away":
        heart.probe.away = AWAY
    async with running(heart) as serving:
        await clock.advance(0)
        heart.lost.set()
        await clock.advance(0)

        assert serving.done()
        with pytest.raises(BrokerError, match="connection to RabbitMQ lost"):
            serving.result()


async def test_a_stop_ends_a_wait_at_once(clock: FakeClock) -> None:
    heart = Heart(rate="2/m")
    heart.budget.refusal = Wait(PAUSED.reason, 1000)
    async with running(heart) as serving:
        await clock.advance(0)
        heart.stop.set()
        await clock.advance(0)

        assert serving.done()


async def test_a_stop_finishes_what_runs_and_takes_nothing_more(clock: FakeClock) -> None:
    release = asyncio.Event()

    async def run() -> None:
        heart.stop.set()
        await release.wait()

    heart = Heart(run, rate="100/s")
    heart.broker.send(id="one")
    heart.broker.send(id="two")
    async with running(heart) as serving:
        await clock.advance(1, step=0.1)
        assert not serving.done()
        release.set()
        await clock.advance(0)

        assert serving.done()
        assert heart.broker.acknowledged == ["one"]
        assert heart.steps.count("take") == 1


async def test_a_stop_while_the_turn_is_waited_for_takes_nothing(clock: FakeClock) -> None:
    heart = Heart(rate="2/m")
    check = heart.budget.check

    async def stopped(contenders: int = 0) -> Wait | None:
        if heart.budget.turns:
            heart.stop.set()
        return await check(contenders)

    heart.budget.check = stopped  # type: ignore[method-assign]
    heart.broker.send()
    async with running(heart) as serving:
        await clock.advance(1)

        assert serving.done()
        assert "take" not in heart.steps


async def test_a_burst_ends_once_the_lanes_are_empty(clock: FakeClock) -> None:
    heart = Heart(rate="2/m", burst=True)
    heart.broker.send(id="one")
    heart.broker.send(id="two")
    async with running(heart) as serving:
        await clock.advance(20)
        assert not serving.done(), "it waits for the budget"
        await clock.advance(20)

        assert serving.done()
        assert heart.broker.acknowledged == ["one", "two"]
    # Nobody else would find what is left: RabbitMQ's count alone is not believed.
    assert "hold_something" not in heart.steps


@pytest.mark.parametrize("hold", ["pause", "database", "copies"])
async def test_a_burst_does_not_wait_for_what_may_last(clock: FakeClock, hold: str) -> None:
    heart = Heart(fails, burst=True, rate="100/s")
    heart.broker.send()
    if hold == "pause":
        heart.budget.refusal = PAUSED
    elif hold == "database":
        heart.probe.away = AWAY
    else:
        heart.broker.refusal = BrokerError("no answer", unreachable=True)
    async with running(heart) as serving:
        await clock.advance(1, step=0.1)

        assert serving.done()
        if hold == "copies":
            assert serving.exception() is None
            assert heart.consumer.failures == 1
        else:
            words = "paused by alice" if hold == "pause" else "gone"
            with pytest.raises(AioworkerError, match=words):
                serving.result()


async def test_a_burst_tries_another_message_once_the_breaker_opens(clock: FakeClock) -> None:
    """The first that succeeds closes it: the rest is run, too."""
    runs = 0

    async def run() -> None:
        nonlocal runs
        runs += 1
        if runs <= STREAK:
            raise KeyError("shop")

    heart = Heart(run, burst=True, rate="2/m", max_retries=1)
    failed: dict[str, Any] = {"retries": 1, "x-aioworker-first-failed-at": "2026-01-01"}
    for number in range(STREAK):
        heart.broker.send(id=f"bad {number}", **failed)
    for number in range(5):
        heart.broker.send(id=f"good {number}")
    async with running(heart) as serving:
        await clock.advance(400)

        assert serving.done()
        assert runs == STREAK + 5


async def test_a_burst_ends_while_the_breaker_is_open(clock: FakeClock) -> None:
    heart = Heart(burst=True, rate="100/s")
    heart.broker.send()
    open_breaker(heart)
    async with running(heart) as serving:
        await clock.advance(0)

        assert serving.done()
        assert heart.said == [f"stalled: {TRIED}"]


class Crowd:
    """A task whose runs go on until they are let go."""

    def __init__(self) -> None:
        self.running = 0
        self.most = 0
        self.release = asyncio.Event()

    async def run(self) -> None:
        """Go on until it is let go."""
        self.running += 1
        self.most = max(self.most, self.running)
        await self.release.wait()
        self.running -= 1


async def test_without_a_rate_several_run_at_once(clock: FakeClock) -> None:
    crowd = Crowd()
    heart = Heart(crowd.run)
    for number in range(3 * AT_ONCE):
        heart.broker.send(id=str(number))
    async with running(heart):
        await clock.advance(1, step=0.1)
        assert crowd.running == AT_ONCE + 1, "and the one that was taken before"
        crowd.release.set()
        await clock.advance(1, step=0.1)

        assert heart.consumer.settled == {Kind.ACK: 3 * AT_ONCE}


@pytest.mark.parametrize(("returns", "most"), [(SUSPECT_RETURNS - 1, 2), (SUSPECT_RETURNS, 1)])
async def test_what_comes_back_again_and_again_is_served_alone(
    clock: FakeClock, returns: int, most: int
) -> None:
    """RabbitMQ counts whatever is held when a worker dies, as if it had killed it."""
    crowd = Crowd()
    heart = Heart(crowd.run)
    counted: dict[str, Any] = {"x-delivery-count": returns}
    heart.broker.send(id="one", **counted)
    heart.broker.send(id="two")
    async with running(heart):
        await clock.advance(1, step=0.1)
        assert crowd.running == most
        crowd.release.set()
        await clock.advance(1, step=0.1)

    assert heart.consumer.settled == {Kind.ACK: 2}


async def test_while_the_breaker_is_open_one_at_a_time_is_tried(clock: FakeClock) -> None:
    crowd = Crowd()
    heart = Heart(crowd.run)
    for number in range(3):
        heart.broker.send(id=str(number))
    open_breaker(heart, seconds=0)
    async with running(heart):
        await clock.advance(1, step=0.1)
        assert crowd.running == 1
        crowd.release.set()


async def test_runs_that_do_not_end_though_their_time_is_up_are_said(clock: FakeClock) -> None:
    """Threads, which nothing can end; the worker waits for them at its end, too."""
    crowd = Crowd()
    heart = Heart(crowd.run)
    # What a thread does: it goes on behind its time.
    heart.task.function = deaf(crowd)
    heart.broker.send(id="one")
    heart.broker.send(id="two")
    async with running(heart) as serving:
        await clock.advance(130, step=0.5)
        assert "stalled: 2 runs without an end, though the time is up" in heart.said
        assert not heart.worker.progresses

        heart.stop.set()
        await clock.advance(10, step=0.5)
        assert not serving.done()
        crowd.release.set()
        await clock.advance(1, step=0.1)

        assert serving.done()
        assert heart.consumer.settled.total() == 2


def deaf(crowd: Crowd) -> Any:
    """Return a function that is not ended by its cancellation."""

    async def run() -> None:
        for _ in range(2):  # its time is up, and the test's end
            with suppress(asyncio.CancelledError):
                await crowd.release.wait()

    return run


async def test_a_lost_connection_ends_the_intake(clock: FakeClock) -> None:
    crowd = Crowd()
    heart = Heart(crowd.run)
    heart.broker.send(id="one")
    async with running(heart) as serving:
        await clock.advance(1, step=0.1)
        assert crowd.running == 1
        heart.lost.set()
        crowd.release.set()
        await clock.advance(0.1, step=0.1)

        assert serving.done()
        with pytest.raises(BrokerError):
            serving.result()


@pytest.mark.parametrize("what", ["rate", "pause", "another hold"])
async def test_what_is_set_meanwhile_ends_the_intake(clock: FakeClock, what: str) -> None:
    heart = Heart()
    sent = 0

    async def run() -> None:
        nonlocal sent
        sent += 1
        heart.broker.send(id=f"next {sent}")
        await asyncio.sleep(0.1)

    heart.task.function = run
    heart.broker.send()
    async with running(heart):
        await clock.advance(1, step=0.1)
        assert heart.budget.charged[2:], "messages come by themselves"
        if what == "rate":
            heart.budget.rate = RateLimit.parse("2/m")
        elif what == "pause":
            heart.budget.refusal = PAUSED
        else:  # one that no charge looks at
            heart.consumer.breaker.seconds = lambda: 60  # type: ignore[method-assign]
        await clock.advance(6, step=0.1)
        before = sent
        await clock.advance(20, step=0.1)

        assert sent <= before + 1


async def test_a_worker_progresses_while_each_step_is_in_time(clock: FakeClock) -> None:
    """Systemd starts one again that does not."""
    hangs = asyncio.Event()
    heart = Heart(rate="2/m", task_timeout=30)
    async with running(heart):
        await clock.advance(200, step=0.9)
        found = [heart.worker.progresses]  # it waits
        heart.budget.turn = hanging(hangs)  # type: ignore[method-assign]
        heart.broker.send()
        for _ in range(2):
            await clock.advance(40, step=0.9)
            found.append(heart.worker.progresses)
        hangs.set()

    assert found == [True, True, False], "a step may take as long as its timeouts"


def hanging(event: asyncio.Event) -> Any:
    """Return a turn that is not had before an event."""

    @asynccontextmanager
    async def turn() -> AsyncIterator[Wait | None]:
        await event.wait()
        yield PAUSED

    return turn


async def test_a_worker_that_has_not_begun_is_no_hindrance(clock: FakeClock) -> None:
    """Nothing is due yet; nor is it once a worker has ended, beside others that go on."""
    clock.now = 1000

    assert Heart(rate="2/m").worker.progresses


async def test_a_run_is_progress_until_its_time_is_up(clock: FakeClock) -> None:
    heart = Heart(nothing, rate="2/m", task_timeout=300)
    release = asyncio.Event()

    async def run() -> None:
        await release.wait()

    heart.task.function = run
    heart.broker.send()
    async with running(heart):
        await clock.advance(299)
        assert heart.worker.progresses
        release.set()
        await clock.advance(1)

        assert heart.broker.acknowledged == ["one"]


async def test_a_pause_is_seen_while_messages_are_settled_that_need_no_start(
    clock: FakeClock,
) -> None:
    """A deploy that changed the parameters drains no queue once somebody has paused it."""
    heart = Heart(rate="2/m")
    for number in range(200):
        heart.broker.send(b"nonsense", id=str(number))
    slow_down(heart, 0.1)
    async with running(heart):
        await clock.advance(1, step=0.1)
        heart.budget.refusal = PAUSED
        await clock.advance(10, step=0.1)

    assert len(heart.broker.queues[QUEUES.bulk]) > 150


async def test_urgent_messages_go_first_one_start_after_the_other(clock: FakeClock) -> None:
    heart = Heart(rate="2/m")
    for number in range(2):
        heart.broker.send(id=f"urgent {number}", lane=QUEUES.urgent)
        heart.broker.send(id=f"bulk {number}")

    async with running(heart):
        await clock.advance(100)

    assert heart.broker.acknowledged == ["urgent 0", "urgent 1", "bulk 0", "bulk 1"]


async def test_what_comes_back_from_the_retry_queue_runs_beside_others(clock: FakeClock) -> None:
    now = most = 0

    async def work() -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(1)
        now -= 1

    heart = Heart(work)
    headers: dict[str, Any] = {REASON: "it failed", "retries": 1}
    for number in range(AT_ONCE):
        heart.broker.send(**{**headers, "id": str(number)})

    async with running(heart):
        await clock.advance(4, step=0.1)

    assert most == AT_ONCE


async def test_a_message_in_hand_at_a_stop_is_run(clock: FakeClock) -> None:
    runs = []

    async def refresh(ids: list[int]) -> None:
        runs.append(ids)

    async def needed(ids: list[int]) -> list[int]:
        heart.stop.set()
        return ids

    heart = Heart(refresh, rate="2/m")
    heart.task.needed(needed)
    heart.broker.send(b"[[[1]], {}, null]")

    async with running(heart):
        await clock.advance(2, step=0.1)

    assert runs == [[1]]


async def test_reading_and_running_have_one_time_limit(clock: FakeClock) -> None:
    runs = []

    async def refresh(ids: list[int]) -> None:
        await asyncio.sleep(25)
        runs.append(ids)

    async def needed(ids: list[int]) -> list[int]:
        await asyncio.sleep(25)
        return ids

    heart = Heart(refresh, rate="2/m", task_timeout=30)
    heart.task.needed(needed)
    heart.broker.send(b"[[[1]], {}, null]")

    async with running(heart):
        await clock.advance(60)

    assert runs == []
    [copy] = heart.broker.headers(QUEUES.retry)
    assert copy[REASON] == "TimeoutError: the run took longer than 30 s and was cut off"


async def test_what_is_told_of_a_chunk_is_its_own(
    clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Not that of a message that was refused before it, in the same turn."""
    caplog.set_level(logging.INFO, "aioworker.consumer")
    asked = []

    async def refresh(rows: list[list[object]]) -> None:
        asked.append(rows)

    async def needed(ctx: Context, rows: list[list[object]]) -> list[list[object]]:
        asked.append([[ctx.message_id]])
        ctx.counts["missing"] += 7
        return rows

    heart = Heart(refresh, rate="2/m")
    heart.task.needed(needed)
    heart.broker.send(b"nonsense", id="bad")
    heart.broker.send(b'[[[[1, "a"], [2, "b"], [1, "c"]]], {}, null]', id="good")

    async with running(heart):
        await clock.advance(2, step=0.1)

    assert asked == [[["good"]], [[1, "a"], [2, "b"], [1, "c"]]], "in their order"
    fields = vars(caplog.records[-1])["fields"]
    assert (fields["message_id"], fields["ids"], fields["missing"]) == ("good", 3, 7)
    assert fields["run_seconds"] >= 0


async def test_a_run_that_spoiled_its_connection_sends_no_other_message_back(
    clock: FakeClock,
) -> None:
    """Without a rate no turn is lost with it: the next run opens another."""

    async def spoil(ctx: Context) -> None:
        heart.database.close()

    heart = Heart(spoil)
    for number in range(3):
        heart.broker.send(id=str(number))

    async with running(heart):
        await clock.advance(5, step=0.5)

    assert heart.broker.acknowledged == ["0", "1", "2"]
    assert heart.settled == ["acknowledge"] * 3
