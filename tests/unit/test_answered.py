"""What is done of a start is acknowledged in one step, as far as nothing else waits for its own."""

from __future__ import annotations

import asyncio

import aio_pika
import pytest
from aio_pika.exceptions import ChannelInvalidStateError

from aioworker.errors import BrokerError, ConnectionLostError
from aioworker.rabbitmq.delivery import Answers, Delivery, GroupedAnswers
from aioworker.settling.outcome import DONE
from tests.doubles.gathering import Gathering
from tests.doubles.heart import Heart, running
from tests.doubles.lanes import QUEUES
from tests.fakes import FakeClock, message_of


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
    answers.expect(5)
    for tag in answered:
        answers.note(tag)

    assert (answers.reach(tags) >= max(tags)) is only


def test_an_answer_may_be_for_all_before_it() -> None:
    answers = Answers()
    answers.expect(8)
    answers.note(6)

    answers.note(4, with_earlier=True)

    assert answers.reach({5}) == 6
    assert answers.reach({8}) == 4


def test_what_was_dropped_unseen_waits() -> None:
    answers = Answers()
    for tag in (1, 3, 4):
        answers.expect(tag)

    assert answers.reach({1, 3, 4}) == 1


def test_what_is_answered_beside_one_that_waits_is_not_kept() -> None:
    answers = Answers()
    for tag in range(1, 10_000):
        answers.expect(tag)
        if tag > 1:
            answers.note(tag)

    assert answers._waiting == {1}


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


class Answered:
    """Deliveries of one channel, and what was sent to RabbitMQ for them."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, bool]] = []
        self.lost: BaseException | None = None
        self.lost_at = 1
        self._answers = GroupedAnswers()

    def deliver(self, count: int) -> list[Delivery]:
        """Return so many deliveries."""
        return [
            Delivery.of(_Numbered(self, tag), answers=self._answers) for tag in range(1, count + 1)
        ]


class _Numbered(aio_pika.IncomingMessage):
    def __init__(self, answered: Answered, tag: int) -> None:
        super().__init__(message_of(b"[]"))
        self.delivery_tag = tag
        self._answered = answered

    async def ack(self, multiple: bool = False) -> None:
        if (
            self._answered.lost is not None
            and len(self._answered.sent) + 1 >= self._answered.lost_at
        ):
            raise self._answered.lost
        self._answered.sent.append((self.delivery_tag or 0, multiple))

    async def nack(self, multiple: bool = False, requeue: bool = True) -> None:
        pass


async def acknowledge(deliveries: list[Delivery]) -> None:
    """Acknowledge deliveries, each by an asyncio task of its own."""
    await asyncio.gather(*(one.acknowledge() for one in deliveries))


async def test_what_is_done_at_once_is_acknowledged_in_one_step() -> None:
    answered = Answered()
    deliveries = answered.deliver(6)

    await acknowledge([deliveries[at] for at in (2, 0, 1)])
    await acknowledge([deliveries[3]])
    await acknowledge(deliveries[4:])

    assert answered.sent == [(3, True), (4, False), (6, True)]


async def test_one_that_still_runs_is_not_acknowledged_with_those_behind_it() -> None:
    answered = Answered()
    first, second, third, fourth, fifth = answered.deliver(5)

    await acknowledge([first, third, fourth])
    await acknowledge([second, fifth])

    assert answered.sent == [(1, False), (3, False), (4, False), (5, True)]


async def test_those_behind_one_that_went_back_are_acknowledged_in_one_step() -> None:
    answered = Answered()
    first, second, third = answered.deliver(3)

    await first.give_back()
    await acknowledge([second, third])

    assert answered.sent == [(3, True)]


async def test_where_the_connection_is_lost_each_is_told_that_is_not_acknowledged() -> None:
    answered = Answered()
    answered.lost, answered.lost_at = ChannelInvalidStateError("closed"), 2
    first, second, _third, fourth, fifth = answered.deliver(5)

    found = await asyncio.gather(
        *(one.acknowledge() for one in (first, second, fourth, fifth)), return_exceptions=True
    )

    assert answered.sent == [(2, True)]
    assert list(map(type, found)) == [type(None), type(None), *[ConnectionLostError] * 2]


async def test_none_waits_for_ever_where_the_client_cuts_off_an_acknowledgement() -> None:
    answered = Answered()
    answered.lost = asyncio.CancelledError()

    done, pending = await asyncio.wait(
        [asyncio.create_task(one.acknowledge()) for one in answered.deliver(3)], timeout=1
    )

    assert not pending
    assert all(one.cancelled() for one in done)


async def test_one_that_is_cut_off_meanwhile_keeps_no_other_waiting() -> None:
    answered = Answered()
    first, second = answered.deliver(2)
    cut_off = asyncio.create_task(first.acknowledge())
    await asyncio.sleep(0)
    cut_off.cancel()

    await second.acknowledge()

    assert answered.sent == [(2, True)]
