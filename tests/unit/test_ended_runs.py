"""Which delivery's run has ended already."""

from __future__ import annotations

from typing import Any

import pytest

from aioworker.rabbitmq.delivery import Delivery
from aioworker.settling.ended_runs import MOST, EndedRuns
from aioworker.settling.failure import Failure
from aioworker.settling.outcome import Kind, Outcome
from tests.fakes import delivered

DONE = Outcome(Kind.ACK)


def again(
    message: str = "one", retries: int = 0, body: bytes = b"[]", *, redelivered: bool = True
) -> Delivery:
    """Return a delivery, by default one that was not settled before."""
    headers: dict[str, Any] = {"id": message, "retries": retries}
    return Delivery.of(delivered(body, headers=headers, redelivered=redelivered))


@pytest.fixture
def ends() -> EndedRuns:
    ends = EndedRuns()
    ends.remember(again(redelivered=False), DONE)
    return ends


def test_an_end_is_known_once(ends: EndedRuns) -> None:
    assert [ends.take(again()), ends.take(again())] == [DONE, None]


@pytest.mark.parametrize(
    "other",
    [
        again(redelivered=False),
        again("two"),
        again(retries=1),
        again(body=b"[1]"),
    ],
    ids=["delivered first", "id", "attempt", "body"],
)
def test_in_doubt_a_message_runs(ends: EndedRuns, other: Delivery) -> None:
    """What was published once more, or is another attempt, is another matter."""
    assert ends.take(other) is None
    assert ends.take(again()) == DONE


def test_the_last_thousand_ends_are_kept() -> None:
    ends = EndedRuns()
    for number in range(MOST + 1):
        ends.remember(again(str(number)), DONE)

    assert ends.take(again("0")) is None
    assert ends.take(again("1")) == DONE


@pytest.mark.parametrize("kind", [Kind.POSTPONED, Kind.DEAD_LETTER])
def test_what_has_a_copy_that_looks_the_same_runs(kind: Kind) -> None:
    """The copy of a postponed message, or a dead letter that is brought back."""
    ends = EndedRuns()
    ends.remember(again(redelivered=False), Outcome(kind))

    assert ends.take(again()) is None


def test_a_message_without_an_id_runs() -> None:
    """Another one may have the same body."""
    ends = EndedRuns()
    ends.remember(Delivery.of(delivered(b"[]")), DONE)

    assert ends.take(Delivery.of(delivered(b"[]", redelivered=True))) is None


def test_an_end_is_forgotten_after_ten_minutes() -> None:
    """Somebody else had the message by then."""
    now = [0.0]
    ends = EndedRuns(lambda: now[0])
    ends.remember(again(redelivered=False), DONE)

    now[0] = 601

    assert ends.take(again()) is None


def test_an_end_holds_no_frames_of_a_run() -> None:
    """They hold the message's body."""
    ends = EndedRuns()
    try:
        int("shop")
    except ValueError as error:
        failed = Outcome(Kind.RETRY, "ValueError: shop", Failure.of(error))

    ends.remember(again(redelivered=False), failed)

    assert failed.failure is not None
    assert failed.failure.error is not None
    assert failed.failure.error.__traceback__ is None
    assert ends.take(again()) == failed
