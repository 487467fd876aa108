"""What the messages of a start ask for together: each id once, and of two rows the later one."""

from __future__ import annotations

import json
import tracemalloc
import weakref
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import pytest

from aioworker.rabbitmq.delivery import Delivery
from aioworker.rabbitmq.message import PUBLISHED, milliseconds
from aioworker.settling.outcome import DONE
from aioworker.settling.rows import Ids, Rows
from aioworker.settling.start import MOST_MESSAGES, Held, Start
from aioworker.tasks.context import Context
from tests.fakes import settleable


def held(chunk: list[Any], second: int | None = None) -> Held:
    """Return a message of the bulk lane, published at a second if that is known."""
    headers = {}
    if second is not None:
        headers[PUBLISHED] = milliseconds(datetime(2026, 1, 1, 0, 0, second, tzinfo=UTC))
    delivery = Delivery.of(settleable(json.dumps([chunk]).encode(), headers=headers))
    return Held(delivery, Context(None, "shop"), [chunk])  # type: ignore[arg-type]  # asked nothing


def test_each_id_is_asked_for_once_and_again_with_the_next_messages() -> None:
    """It may have changed since it was read."""
    ids, first, second = Ids(), held([1, 2, 3]), held([3, 4])

    assert ids.ask([first, second]) == [1, 2, 3, 4]
    ids.need([1, 3])
    assert ids.ask([held([3, 2])]) == [3, 2]
    ids.need([2])

    assert ids.chunk == [1, 2]
    assert len(ids) == 2
    assert ids.wants(first)
    assert not ids.wants(second)


def test_an_id_of_a_message_that_has_gone_stays_if_another_names_it() -> None:
    ids, gone, left = Ids(), held([1, 2]), held([2, 3])
    ids.ask([gone, left])
    ids.need([1, 2, 3])

    ids.drop([gone], [left])

    assert ids.chunk == [2, 3]
    assert ids.own(gone) == [2]


def test_of_two_rows_the_one_that_was_published_later_is_asked_for() -> None:
    rows, late, early = Rows(), held([[1, "late"]], 2), held([[1, "early"], [2, "early"]], 1)

    assert rows.ask([late, early]) == [[1, "late"], [2, "early"]]
    rows.need([[2, "early"]])

    assert rows.ask([held([[1, "early"]], 1)]) == [], "what needs no write came later, too"
    assert not rows.wants(late)
    assert rows.own(early) == [2]


def test_a_row_that_a_later_one_has_replaced_is_its_messages_own_no_more() -> None:
    """What the data refuses of the later one is no fault of the earlier message."""
    rows, early, late = Rows(), held([[1, "early"], [2, "early"]], 1), held([[1, "late"]], 2)

    rows.need(rows.ask([early, late]))

    assert rows.wants(early)
    assert (rows.own(early), rows.own(late)) == ([2], [1])


def test_a_message_may_hold_several_rows_of_one_id() -> None:
    rows, one = Rows(), held([[1, "a"], [2, "b"], [1, "c"]])

    assert rows.ask([one]) == [[1, "a"], [2, "b"], [1, "c"]], "in their order"
    rows.need([[1, "a"], [2, "b"], [1, "c"]])

    assert rows.chunk == [[1, "a"], [2, "b"], [1, "c"]]
    assert len(rows) == 2


def test_the_latest_row_that_is_left_takes_the_place_of_one_that_has_gone() -> None:
    rows = Rows()
    early, middle, late = (held([[1, second]], second) for second in (1, 2, 3))
    rows.ask([early, middle, late])
    rows.need([[1, 3]])

    rows.drop([late], [middle, early])

    assert rows.chunk == [[1, 2]]
    rows.drop([middle, early], [])
    assert len(rows) == 0


def test_a_message_that_needs_nothing_is_let_go_before_the_next_ones_are_asked_for() -> None:
    """It may have megabytes of text, and more come meanwhile."""
    rows, one = Rows(), held([[1, "a"]])
    rows.ask([one])
    kept = weakref.ref(one.delivery.message)

    rows.need([])
    del one

    assert kept() is None


@pytest.mark.parametrize(("rows", "most_messages", "most_mib"), [(Ids, 301, 1), (Rows, 51, 12)])
def test_what_is_done_on_the_way_is_not_kept(
    rows: type[Ids | Rows], most_messages: int, most_mib: float
) -> None:
    """A sweep of which little is stale goes by; its bodies and ids do not stay in memory.

    Of rows it has to be known when they were meant: a start has room for so many.
    """
    start = Start(rows(), MOST_MESSAGES, 1000)
    came = 0

    def come(chunk: list[Any], needed: list[Any]) -> None:
        one = held(chunk)
        start.held.append(one)
        start.rows.ask([one])
        start.rows.need(needed)
        if not start.rows.wants(one):
            one.outcome = DONE
        start.let_go()

    def entries(ids: Iterable[int]) -> list[Any]:
        return [known if rows is Ids else [known, "text"] for known in ids]

    come(entries([1]), entries([1]))
    tracemalloc.start()
    try:
        for first in range(1000, 301_000, 1000):
            if start.has_room():
                came += 1
                come(entries(range(first, first + 1000)), [])
        kept_mib = tracemalloc.get_traced_memory()[0] / 2**20
    finally:
        tracemalloc.stop()

    assert (len(start.held), start.rows.chunk) == (1, entries([1]))
    assert came + 1 == most_messages
    assert kept_mib < most_mib
