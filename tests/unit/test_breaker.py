"""When a task is taken to fail as a whole, and how it is tried again."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta

import pytest

from aioworker.settling.breaker import MOST_TESTS, STREAK, TEST_SECONDS, Breaker, Failed


class Time:
    """Seconds, and the moment that they stand for."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        """Return the seconds."""
        return self.seconds

    @property
    def now(self) -> datetime:
        """What time it is."""
        return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=self.seconds)

    def ago(self, seconds: float) -> datetime:
        """Return what time it was."""
        return self.now - timedelta(seconds=seconds)


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def breaker(time: Time) -> Breaker:
    return Breaker(time)


def last(message: str, first_failed: datetime, words: str = "ValueError") -> Failed:
    """Return the second and last attempt at a message."""
    return Failed(message, first_failed, 2, 0, words, last=True)


def of_all(first_failed: datetime | None) -> Failed:
    """Return an attempt that failed as each one may."""
    return Failed("message", first_failed, 1, 0, "no such table", of_all=True)


def fail_test(breaker: Breaker, time: Time) -> None:
    """Fail a message that was taken just now."""
    time.seconds += 0.001
    assert breaker.fail(Failed("a test", time.now, 1, time.seconds, "ValueError"))


def open_it(breaker: Breaker, time: Time) -> None:
    for number in range(STREAK):
        assert breaker.fail(last(f"message {number}", time.ago(60)))


def test_three_messages_that_fail_for_good_open_it(breaker: Breaker, time: Time) -> None:
    for message in ("one", "one", "two"):
        assert breaker.fail(last(message, time.ago(60)))
    assert breaker.seconds() == 0

    assert breaker.fail(last("three", time.ago(60), "KeyError: 'shop'"))

    assert breaker.reason == "3 messages in a row failed for good, the last: KeyError: 'shop'"


def test_a_success_since_a_message_failed_first_makes_the_failure_its_own(
    breaker: Breaker, time: Time
) -> None:
    """Bad messages come back from the retry queue side by side: healthy ones ran meanwhile."""
    breaker.succeed(time.ago(30))

    for number in range(10):
        assert not breaker.fail(last(f"message {number}", time.ago(60)))

    assert not breaker.reason
    assert breaker.fail(last("newer", time.ago(10)))


def test_a_success_breaks_the_streak(breaker: Breaker, time: Time) -> None:
    for message in ("one", "two"):
        breaker.fail(last(message, time.ago(60)))

    breaker.succeed(time.now)
    time.seconds += 10

    assert breaker.fail(last("three", time.ago(5)))
    assert not breaker.reason


def test_a_first_failure_is_the_messages_own_until_the_third_in_a_row(
    breaker: Breaker, time: Time
) -> None:
    """Nothing can have succeeded since: that alone is no sign of anything."""
    doubts = [
        breaker.fail(Failed(f"message {number}", None, 1, time.seconds, "ValueError", last=True))
        for number in range(4)
    ]

    assert doubts == [False, False, True, True]
    # The first two were set aside.
    assert [breaker.may_set_aside(message) for message in ("message 2", "message 3")] == [
        True,
        False,
    ]


def test_a_failure_that_leaves_attempts_opens_nothing(breaker: Breaker, time: Time) -> None:
    for number in range(10):
        assert not breaker.fail(Failed(f"message {number}", time.ago(60), 2, 0, "ValueError"))

    assert not breaker.reason


def test_a_message_that_failed_in_another_process_is_in_doubt_here(
    breaker: Breaker, time: Time
) -> None:
    """Each restart under a bad deploy would set two more aside."""
    put_off = Failed("message", time.ago(300), 1, time.seconds, "ValueError", last=True)

    assert breaker.fail(put_off)


def test_a_message_whose_copy_was_not_confirmed_keeps_its_place(breaker: Breaker) -> None:
    for message in ("one", "two", "three", "two"):
        assert breaker.may_set_aside(message)
    assert not breaker.may_set_aside("four")


def test_no_fourth_message_is_set_aside_before_one_succeeds(breaker: Breaker, time: Time) -> None:
    aside = [breaker.may_set_aside(f"message {number}") for number in range(5)]
    breaker.succeed(time.now)

    assert aside == [True, True, True, False, False]
    assert breaker.may_set_aside("message 5")


def test_while_open_an_earlier_success_makes_no_failure_a_messages_own(
    breaker: Breaker, time: Time
) -> None:
    """It failed in an outage before this one."""
    first_failed = time.ago(300)
    breaker.succeed(time.ago(200))
    open_it(breaker, time)

    assert breaker.fail(last("an older one", first_failed))
    assert breaker.fail(of_all(first_failed))


def test_open_it_tests_one_at_once_and_then_twice_as_many_each_minute(
    breaker: Breaker, time: Time
) -> None:
    open_it(breaker, time)
    tested = []

    for _ in range(8):
        tried = 0
        while not breaker.seconds():
            fail_test(breaker, time)
            tried += 1
        tested.append(tried)
        assert breaker.seconds() == TEST_SECONDS
        time.seconds += TEST_SECONDS - 1
        assert breaker.seconds() == 1
        time.seconds += 1

    assert tested == [1, 2, 4, 8, 16, 32, MOST_TESTS, MOST_TESTS]


def test_the_first_success_closes_it(breaker: Breaker, time: Time) -> None:
    open_it(breaker, time)
    fail_test(breaker, time)
    assert breaker.seconds()

    breaker.succeed(time.now)

    assert (breaker.reason, breaker.seconds()) == ("", 0)


def test_opened_again_it_begins_with_one_test(breaker: Breaker, time: Time) -> None:
    open_it(breaker, time)
    for _ in range(1 + 2):
        fail_test(breaker, time)
        time.seconds += TEST_SECONDS
        breaker.seconds()
    breaker.succeed(time.now)
    time.seconds += 100

    for number in range(STREAK):
        breaker.fail(last(f"other {number}", time.ago(60)))

    assert not breaker.seconds()
    fail_test(breaker, time)
    assert breaker.seconds() == TEST_SECONDS


def test_what_ran_beside_as_it_opened_is_no_test(breaker: Breaker, time: Time) -> None:
    taken = time.seconds
    open_it(breaker, time)

    for number in range(31):
        assert breaker.fail(Failed(f"beside {number}", time.now, 1, taken, "ValueError"))

    assert not breaker.seconds(), "another message is the test"
    fail_test(breaker, time)
    assert breaker.seconds() == TEST_SECONDS


def test_a_failure_of_every_message_opens_it_at_once(breaker: Breaker, time: Time) -> None:
    assert breaker.fail(of_all(None))

    assert breaker.reason == "no such table"
    assert not breaker.seconds(), "another message is the test"


def test_a_failure_of_every_message_is_the_messages_own_once_another_one_succeeded(
    breaker: Breaker, time: Time
) -> None:
    """One missing table of many: the others are there."""
    first_failed = time.now
    breaker.fail(of_all(first_failed))
    time.seconds += 1
    breaker.succeed(time.now)
    time.seconds += 59

    assert not breaker.fail(of_all(first_failed))
    assert not breaker.reason


@pytest.mark.parametrize("share", [0.001, 0.02, 0.1, 0.3])
@pytest.mark.parametrize("max_retries", [1, 5])
def test_a_share_of_bad_messages_opens_it_never(
    breaker: Breaker, time: Time, share: float, max_retries: int
) -> None:
    """Six hundred a minute for half an hour, each bad one back a minute after it failed."""
    random.seed(1)
    retries: list[tuple[float, str, datetime, int]] = []

    for number in range(18_000):
        time.seconds += 0.1
        while retries and retries[0][0] <= time.seconds:
            _due, message, first, attempt = retries.pop(0)
            if attempt > max_retries:
                assert not breaker.fail(last(message, first))
            else:
                retries.append((time.seconds + 60, message, first, attempt + 1))
        if random.random() < share:
            retries.append((time.seconds + 60, f"message {number}", time.now, 2))
        else:
            breaker.succeed(time.now)

    assert not breaker.reason
