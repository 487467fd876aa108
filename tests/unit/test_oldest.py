"""How old the oldest message of a lane is at most, by those that were taken: nothing touches it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from aioworker.clock import own_time
from aioworker.commands.status import Oldest, Queued, Stored, oldest
from aioworker.errors import Retry
from aioworker.rabbitmq.delivery import Delivery
from aioworker.rabbitmq.message import PUBLISHED, REASON, TOGETHER, milliseconds
from aioworker.reasons import ReasonKind
from aioworker.settling.outcome import UNDECIDED, Kind, Outcome
from aioworker.settling.rows import Ids
from aioworker.settling.start import Held, Start
from aioworker.settling.taken import Taken
from aioworker.status.read import Worker
from aioworker.status.waiting import Lane, Waiting
from aioworker.tasks.context import Context
from tests.doubles.heart import Heart, running
from tests.fakes import FakeClock, settleable
from tests.unit.test_status import ROW

NOW = ROW.now
SOME = Queued(urgent=1, bulk=1, retry=0, dead=0)


def ago(minutes: float) -> datetime:
    """Return a moment so long ago."""
    return NOW - timedelta(minutes=minutes)


def held(published: datetime | None, lane: str = "bulk", **headers: Any) -> Held:
    """Return a message that was published then."""
    if published is not None:
        headers[PUBLISHED] = milliseconds(published)
    delivery = Delivery.of(settleable(b"", headers=headers))._replace(lane=lane)
    return Held(delivery, Context(None, "shop"))  # type: ignore[arg-type]


class Taking:
    """A worker's starts.

    Attributes:
        taken: What it knows of its lanes.
    """

    def __init__(self) -> None:
        self._under_way: list[Start] = []
        self.taken = Taken(self._under_way)

    def begin(self, *messages: Held) -> Start:
        """Take messages for one start."""
        start = Start(Ids(), most=len(messages))
        for one in messages:
            start.held.append(one)
        self._under_way.append(start)
        return start

    def settle(
        self, start: Start, kind: Kind, *messages: Held, lost: bool = False, now: datetime = NOW
    ) -> None:
        """Settle some, or all, of a start's messages."""
        decided = messages or tuple(start.held)
        for one in decided:
            one.outcome, one.settled = Outcome(kind), not lost
        start.let_go()
        self.taken.settled(start, decided, now)

    def do(self, kind: Kind, *messages: Held, now: datetime = NOW) -> None:
        """Take messages, and settle them."""
        self.settle(self.begin(*messages), kind, now=now)

    @property
    def bulk(self) -> Lane:
        """What is known of the bulk lane."""
        return self.taken.tell().bulk


def test_what_lies_behind_a_message_was_published_later() -> None:
    taking = Taking()

    taking.do(Kind.ACK, held(ago(9)), held(ago(3), "urgent"), held(ago(8)))

    assert taking.taken.tell() == Waiting(0, urgent=Lane(ago(3)), bulk=Lane(ago(8)))


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind is not Kind.RELEASED])
def test_a_message_leaves_the_front_of_its_lane_whatever_it_comes_to(kind: Kind) -> None:
    taking = Taking()

    taking.do(kind, held(ago(9)))

    assert taking.bulk.since == ago(9)


def test_a_lane_is_emptied_no_further_than_what_may_go_back() -> None:
    """Of what is gathered, some needs nothing, and is done before the others."""
    taking = Taking()
    taking.do(Kind.ACK, held(ago(9)))
    first, second = held(ago(8)), held(ago(7))
    start = taking.begin(first, second)

    taking.settle(start, Kind.ACK, second)
    assert taking.taken.tell() == Waiting(1, bulk=Lane(ago(9)))

    taking.settle(start, Kind.RELEASED, first)
    assert taking.taken.tell() == Waiting(0, bulk=Lane(ago(9)))


def test_what_could_not_be_settled_is_in_its_lane_again() -> None:
    taking = Taking()

    taking.settle(taking.begin(held(ago(9))), Kind.ACK, lost=True)

    assert taking.bulk == Lane()


def test_what_is_in_hand_is_counted() -> None:
    taking = Taking()
    taking.begin(held(ago(3)), held(ago(2)))
    taking.begin(held(None))

    assert taking.taken.tell() == Waiting(held=3)
    assert UNDECIDED.kind is Kind.RELEASED


@pytest.mark.parametrize("header", [{REASON: "failed"}, {TOGETHER: 5}])
def test_a_message_that_came_back_tells_nothing_of_those_behind_it(header: dict[str, Any]) -> None:
    taking = Taking()
    taking.do(Kind.ACK, held(ago(3)))

    taking.do(Kind.ACK, held(ago(600), **header))

    assert taking.bulk == Lane(ago(3))


@pytest.mark.parametrize(
    ("kind", "lane", "minutes"),
    [(Kind.MOVED, "urgent", 0), (Kind.RETRY, "bulk", 1), (Kind.POSTPONED, "bulk", 1)],
)
def test_what_is_put_back_stands_apart_until_the_lane_is_emptied_so_far(
    kind: Kind, lane: str, minutes: float
) -> None:
    """An urgent one comes back from the retry queue to the bulk lane, a minute later."""
    taking = Taking()
    taking.do(kind, held(ago(60), "urgent"), held(ago(50), "urgent"))
    until = ago(-minutes)
    before = getattr(taking.taken.tell(), lane)
    assert (before.back, before.until) == (ago(60), until)

    taking.do(Kind.ACK, held(until - timedelta(seconds=1), lane), now=ago(-9))
    assert getattr(taking.taken.tell(), lane).back == ago(60)

    taking.do(Kind.ACK, held(until, lane), now=ago(-9))
    assert getattr(taking.taken.tell(), lane) == Lane(until)


def test_the_last_that_is_put_back_is_waited_for() -> None:
    """One waits in the retry queue for a minute, another one is moved meanwhile."""
    taking = Taking()

    taking.do(Kind.RETRY, held(ago(60)))
    taking.do(Kind.MOVED, held(ago(50)))

    assert taking.bulk == Lane(ago(50), ago(60), ago(-1))


def test_what_comes_into_empty_lanes_is_published_later() -> None:
    """After a quiet night the first message is not as old as the last one before it."""
    taking = Taking()
    taking.do(Kind.ACK, held(ago(600)))
    taking.do(Kind.MOVED, held(ago(600)), now=ago(10))

    taking.taken.found_nothing(NOW)

    since = NOW - timedelta(seconds=5)  # for so long a lane may be taken for empty by its count
    assert taking.taken.tell() == Waiting(urgent=Lane(since), bulk=Lane(since))


@pytest.mark.parametrize("published", [None, ago(-60), datetime.min.replace(tzinfo=UTC)])
def test_a_time_that_no_clock_tells_makes_nothing_younger(published: datetime | None) -> None:
    taking = Taking()

    taking.do(Kind.ACK, held(published), held(None, **{PUBLISHED: "0001-01-01T00:00:00+14:00"}))

    since = taking.bulk.since
    assert since is None or since <= NOW


@pytest.mark.parametrize("lane", [Lane(), Lane(ago(3)), Lane(ago(3), ago(60), ago(1))])
def test_a_row_is_read_as_it_was_written(lane: Lane) -> None:
    told = Waiting(12, bulk=lane)

    assert Waiting.read(str(told)) == told


@pytest.mark.parametrize(
    "text", [None, "", "no JSON", "[]", "7", "{}", '{"held": "7"}', '{"held": true}', "[" * 99999]
)
def test_what_somebody_else_wrote_into_a_row_tells_nothing(text: str | None) -> None:
    assert Waiting.read(text) is None


def test_moments_that_are_none_are_not_read() -> None:
    text = '{"held": 1, "urgent": [], "bulk": {"since": 5, "back": "0001-01-01T00:00:00+14:00"}}'

    assert Waiting.read(text) == Waiting(1)


def worker(told: Waiting | None, seen_seconds: float = 1) -> Worker:
    """Return a worker that tells so much."""
    words = ("web1", 7, "1", "2/m", 5, "waiting", ReasonKind.BUDGET, "budget", NOW, NOW)
    return Worker(*words, seen_seconds, told)


def asked(queued: Queued, *workers: Worker) -> Oldest:
    """Return how old the oldest messages are."""
    return oldest(queued, Stored(ROW, None, list(workers), 0.0))


TOLD = Waiting(0, urgent=Lane(ago(1)), bulk=Lane(ago(5), ago(60), ago(2)))


def test_ages_are_told_by_the_worker_that_emptied_a_lane_furthest() -> None:
    behind = Waiting(0, bulk=Lane(ago(30)))

    assert asked(SOME, worker(behind), worker(TOLD), worker(None)) == Oldest(60, 300, 3600)


def test_what_one_worker_put_back_another_one_has_taken() -> None:
    further = Waiting(0, bulk=Lane(ago(2)))

    assert asked(SOME, worker(further), worker(TOLD)) == Oldest(60, 120, None)


@pytest.mark.parametrize(
    ("queued", "found"),
    [
        (Queued(0, 1, 0, 0), Oldest(None, 300, 3600)),
        (Queued(1, 0, 0, 9), Oldest(60, None, None)),
        (Queued(0, 0, 1, 0), Oldest(None, None, 3600)),
        (Queued(None, None, None, None), Oldest()),
    ],
)
def test_an_empty_lane_has_no_oldest(queued: Queued, found: Oldest) -> None:
    assert asked(queued, worker(TOLD)) == found


def test_a_publisher_whose_clock_is_ahead_makes_nothing_younger_than_now() -> None:
    assert asked(SOME, worker(Waiting(0, bulk=Lane(ago(-1))))) == Oldest(None, 0, None)


@pytest.mark.parametrize(
    ("workers", "found"),
    [
        ([worker(Waiting(3)), worker(Waiting(4)), worker(Waiting(5), seen_seconds=91)], 7),
        ([worker(Waiting(3)), worker(None)], None),
        ([], 0),
        (None, None),
    ],
)
def test_what_is_held_is_known_if_all_that_are_alive_tell(
    workers: list[Worker] | None, found: int | None
) -> None:
    assert Stored(ROW, None, workers).held == found


def test_only_workers_that_are_alive_are_believed() -> None:
    assert asked(SOME, worker(TOLD, seen_seconds=91), worker(Waiting())) == Oldest()


async def test_a_worker_tells_of_what_it_put_back_and_of_what_is_done(clock: FakeClock) -> None:
    """From a message's headers to the worker's row; then the lanes are empty, and say so."""

    async def fail() -> None:
        raise Retry("later")

    heart = Heart(fail)
    published = own_time().replace(microsecond=0) - timedelta(hours=1)
    headers: dict[str, Any] = {PUBLISHED: milliseconds(published)}
    heart.broker.send(**headers)

    await heart.serve()

    lane = heart.consumer.taken.tell().bulk
    assert (lane.since, lane.back) == (published, published)
    assert heart.worker.presence.waiting() == heart.consumer.taken.tell()

    async with running(heart):
        await clock.advance(1, step=0.1)
    lane = heart.consumer.taken.tell().bulk
    assert lane.since is not None
    assert lane.since > published
    assert lane.back == published, "it waits in the retry queue"
