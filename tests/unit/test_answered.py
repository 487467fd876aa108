"""What is done of a start is acknowledged in one step, as far as nothing else waits for its own."""

from __future__ import annotations

import pytest

from aioworker.errors import BrokerError
from aioworker.rabbitmq.delivery import Answers
from aioworker.settling.outcome import DONE
from tests.doubles.gathering import Gathering
from tests.doubles.heart import Heart, running
from tests.doubles.lanes import QUEUES
from tests.fakes import FakeClock


@pytest.mark.parametrize(
    ("answered", "tags", "only"),
    [
        pytest.param([], {1, 2, 3}, True, id="none"),
        pytest.param([], {2, 3}, False, id="the first"),
        pytest.param([1], {2, 3}, True, id="none, the first is answered"),
        pytest.param([1], {2, 4}, False, id="one between them"),
        pytest.param([1, 3], {2, 4}, True, id="none, the one between them is answered"),
        pytest.param([3], {2}, False, id="the first, and a later one is answered"),
        pytest.param([3, 2, 1], {4}, True, id="none, answered in another order"),
        pytest.param([5], {1}, True, id="later ones"),
    ],
)
def test_what_else_waits_for_its_answer(answered: list[int], tags: set[int], only: bool) -> None:
    answers = Answers()
    for tag in answered:
        answers.note(tag)

    assert answers.lack_only(tags) is only


def test_an_answer_may_be_for_all_before_it() -> None:
    answers = Answers()
    answers.note(6)

    answers.note(4, with_earlier=True)

    assert answers.lack_only({5})
    assert not answers.lack_only({8})


async def test_what_is_done_of_a_start_is_acknowledged_in_one_step(clock: FakeClock) -> None:
    gathering = Gathering()
    gathering.send_each(range(1, 41))

    await gathering.heart.run_for(clock, 30)

    assert gathering.runs == [list(range(1, 41))]
    assert gathering.acknowledged == [str(one) for one in range(1, 41)]
    assert gathering.heart.settled == ["acknowledge"]


async def test_what_went_back_before_has_its_answer(clock: FakeClock) -> None:
    gathering = Gathering()
    gathering.send_each(range(1, 4))
    first = await gathering.heart.lanes.take()
    assert first is not None
    await first.give_back()

    await gathering.heart.run_for(clock, 30)

    assert gathering.acknowledged == ["1", "2", "3"]
    assert gathering.heart.settled == ["give_back", "acknowledge"]


async def test_all_are_acknowledged_in_whatever_order_they_are_held() -> None:
    heart = Heart()
    for number in "123":
        heart.broker.send(id=number)
    taken = [await heart.lanes.take() for _ in "123"]
    with heart.consumer.starting(3) as start:
        for delivery in reversed(taken):
            assert delivery is not None
            await heart.consumer.open(start, delivery, heart.lanes)
        for one in start.held:
            one.outcome = DONE

        await heart.consumer._settler.settle(start, list(start.held), heart.lanes)

    assert heart.lanes.held == {}
    assert heart.settled == ["acknowledge"]


async def test_what_somebody_else_holds_is_not_acknowledged(clock: FakeClock) -> None:
    gathering = Gathering()
    gathering.send_each(range(1, 41))
    other = await gathering.heart.lanes.take()
    assert other is not None

    await gathering.heart.run_for(clock, 30)

    assert gathering.acknowledged == [str(one) for one in range(2, 41)]
    await other.give_back()
    assert gathering.queued() == ["1"]


async def test_of_what_is_done_beside_a_failed_one_each_is_acknowledged(clock: FakeClock) -> None:
    gathering = Gathering()
    gathering.send_each(range(1, 5))
    gathering.heart.broker.send(b"nonsense", id="5")
    gathering.send_each(range(6, 9))

    await gathering.heart.run_for(clock, 30)

    assert sorted(gathering.acknowledged) == list("12345678")
    [dead] = gathering.heart.broker.headers(QUEUES.dead)
    assert dead["id"] == "5"


async def test_what_could_not_be_acknowledged_in_one_step_does_not_run_again(
    clock: FakeClock,
) -> None:
    gathering = Gathering()
    heart = gathering.heart
    gathering.send_each(range(1, 41))
    at = heart.lanes._at

    def lose(step: str) -> None:
        at(step)
        if step == "acknowledge":
            heart.lanes.lose()
            raise BrokerError("connection to RabbitMQ lost")

    heart.lanes._at = lose
    with pytest.raises(BrokerError):
        async with running(heart) as serving:
            await clock.advance(30, 0.1)
            await serving
    heart.stop.clear()
    heart.lanes.lost = False
    heart.lanes._at = at
    await heart.run_for(clock, 60)

    assert gathering.runs == [list(range(1, 41))]
    assert sorted(map(int, gathering.acknowledged)) == list(range(1, 41))
