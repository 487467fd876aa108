"""What a worker does after a failure: how long it waits, and when it finds that it stands still."""

from __future__ import annotations

from datetime import UTC, datetime
from unittest.mock import Mock

import pytest

from aioworker.errors import BrokerError, DatabaseError
from aioworker.reasons import Reason, ReasonKind
from aioworker.worker.recovery import Outage, Recovery, Stall
from tests.fakes import FakeClock

AWAY = DatabaseError("gone", unreachable=True)
REFUSED = BrokerError("user or password refused")


def test_a_server_that_is_away_is_asked_again_soon_and_at_random() -> None:
    """It may be back at any moment, and all workers wait for it."""
    outage = Outage("database")

    waits = [outage.seconds(AWAY) for _ in range(200)]

    assert 0.1 <= min(waits[2:]) < 0.5
    assert 2.5 < max(waits) <= 3.0
    assert max(waits[:2]) <= 2.0


def test_a_server_that_refuses_is_asked_less_and_less_often() -> None:
    """A wrong password is not mended by asking."""
    outage = Outage("broker")

    assert 20 < max(outage.seconds(REFUSED) for _ in range(200)) <= 30


def test_each_node_is_tried_once_without_a_wait() -> None:
    """Another one may work; once all have failed, the usual waits begin."""
    outage = Outage("broker", nodes=3)

    waits = [outage.seconds(AWAY) for _ in range(5)]

    assert waits[:2] == [0, 0]
    assert min(waits[2:]) >= 0.1
    assert waits[2] <= 1.0


@pytest.mark.parametrize(("healthy", "longest"), [(31.0, 1.0), (5.0, 3.0)])
def test_a_server_that_was_back_for_a_while_is_asked_soon_again(
    healthy: float, longest: float
) -> None:
    """One that answers and is gone again at once is not asked in a hurry."""
    waits = []
    for _ in range(100):
        now = 0.0
        outage = Outage("database", clock=lambda: now)  # noqa: B023 - called before the next round
        for _ in range(10):
            outage.seconds(AWAY)
        outage.end()
        now += healthy
        outage.end()
        waits.append(outage.seconds(AWAY))

    assert longest / 2 < max(waits) <= longest


def test_an_outage_is_told_since_its_own_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not since that of the one before it, from which the server came back."""
    outage, said = Outage("broker"), []

    for minute, heals in ((1, False), (2, True), (3, False), (4, False)):
        moment = datetime(2026, 11, 28, 12, minute, tzinfo=UTC)
        monkeypatch.setattr("aioworker.worker.recovery.datetime", Mock(now=lambda _: moment))  # noqa: B023
        said.append(outage.reason(AWAY).words.partition(" UTC")[0])
        if heals:
            outage.end()

    assert said == [f"broker unreachable since 12:0{minute}:00" for minute in (1, 1, 3, 3)]


UNOWNED = Reason(ReasonKind.TURN_UNOWNED, "turn: held by session 5")
BUDGET = Reason(ReasonKind.BUDGET, "budget: next start at 02:41:52 UTC")


@pytest.mark.parametrize(("interval", "limit"), [(0.0, 10), (1.0, 10), (30.0, 60)])
def test_two_intervals_of_a_turn_that_nobody_known_holds_are_a_stall(
    interval: float, limit: int
) -> None:
    """Never less than ten seconds: at 100/s a hiccup is no stall."""
    now = 0.0
    stall = Stall(lambda: now)
    reasons = []

    for now in (0.0, limit, limit + 1, limit + 2):  # noqa: B007 - the stall's clock
        reasons.append(stall.judge(UNOWNED, interval))

    words = "stalled: messages wait and the budget is free, but nothing started for"
    assert reasons == [
        UNOWNED,
        UNOWNED,
        Reason(ReasonKind.STALLED, f"{words} {limit + 1} s; turn: held by session 5"),
        Reason(ReasonKind.STALLED, f"{words} {limit + 2} s; turn: held by session 5"),
    ]


@pytest.mark.parametrize("between", ["another reason", "the turn was had"])
def test_whatever_gets_on_is_no_stall(between: str) -> None:
    now = 0.0
    stall = Stall(lambda: now)
    for now in (0.0, 9.0, 18.0, 27.0):  # noqa: B007 - the stall's clock
        assert stall.judge(UNOWNED, 1.0) is UNOWNED
        if between == "another reason":
            assert stall.judge(BUDGET, 1.0) is BUDGET
        else:
            stall.end()


async def test_a_step_is_in_time_for_as_long_as_it_waits_and_a_little_more(
    clock: FakeClock,
) -> None:
    recovery = Recovery(nodes=1, patience=40)
    recovery.progress(seconds=2)

    assert recovery.due_by == 42


def test_a_server_is_not_blamed_for_what_this_process_did() -> None:
    recovery = Recovery(1, 40, lambda: "the process stood still for 60 s")

    reason = recovery.reason(recovery.broker, BrokerError("refused"))

    words = "refused; the process stood still for 60 s"
    assert reason == Reason(ReasonKind.BROKER_REFUSES, words)
