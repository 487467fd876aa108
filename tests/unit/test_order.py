"""Which of several tasks that share a budget starts next."""

from __future__ import annotations

import pytest

from aioworker.budget.order import Order, Want, place_seconds

OLD, NEW = 9_000_000, 1_000_000


@pytest.mark.parametrize(
    ("wants", "urgent_starts", "tasks", "bulk"),
    [
        ([], 0, [], False),
        ([Want("a", False, False, OLD)], 0, [], False),
        # The oldest last start first.
        ([Want("a", False, True, NEW), Want("b", False, True, OLD)], 0, ["b", "a"], False),
        # Urgent of any task goes before bulk of any.
        ([Want("a", False, True, OLD), Want("b", True, False, NEW)], 0, ["b", "a"], False),
        ([Want("a", True, True, NEW), Want("b", True, False, OLD)], 1, ["b", "a"], False),
        # After as many urgent starts as there are tasks, a bulk one.
        ([Want("a", False, True, NEW), Want("b", True, False, OLD)], 2, ["a", "b"], True),
        ([Want("a", True, True, NEW), Want("b", True, False, OLD)], 2, ["a", "b"], True),
        # But only if one waits.
        ([Want("a", True, False, NEW), Want("b", True, False, OLD)], 2, ["b", "a"], False),
    ],
)
def test_the_order(wants: list[Want], urgent_starts: int, tasks: list[str], bulk: bool) -> None:
    assert Order.of(wants, urgent_starts) == Order(tasks, bulk)


def test_all_go_before_a_task_that_is_not_known_to_want_anything() -> None:
    order = Order(["a", "b"], bulk=False)

    assert [order.before(task) for task in ("a", "b", "c")] == [[], ["a"], ["a", "b"]]


@pytest.mark.parametrize(("interval", "seconds"), [(1.0, 0.125), (30.0, 1.1), (0.05, 0.00625)])
def test_a_place_is_a_small_part_of_the_interval(interval: float, seconds: float) -> None:
    assert place_seconds(interval) == pytest.approx(seconds)
