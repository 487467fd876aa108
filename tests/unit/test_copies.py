"""The copies for the retry queue and the dead letters can be sent, whatever a message brought."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import aio_pika
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pamqp.header import ContentHeader

from aioworker.rabbitmq import copies
from aioworker.rabbitmq.delivery import Delivery
from aioworker.rabbitmq.message import PUBLISHED, SWEEP, milliseconds
from aioworker.settling.failure import Failure
from tests.fakes import delivered

FRAME_BYTES = 131_072 - 8  # what RabbitMQ takes, less a frame's own
SHORT_BYTES = 255  # of a property
MOST_HEADERS_BYTES = 130_900  # of those that fit into a frame themselves
NOW = datetime(2026, 11, 28, tzinfo=UTC)
NO_ASCII = "\u6ce8"  # three bytes


def size_of(copy: aio_pika.Message) -> int:
    """Return the bytes of a copy's properties in a frame."""
    return len(ContentHeader(body_size=4, properties=copy.properties).marshal())


def short(text: str) -> str:
    """Cut a text to what a property has room for."""
    return text.encode()[:SHORT_BYTES].decode(errors="ignore")


_texts = st.text(st.sampled_from(["x", NO_ASCII, "\U0001f600"]), max_size=SHORT_BYTES)
_properties = st.none() | _texts.map(short)
_headers = st.dictionaries(
    st.sampled_from(["id", "task", "x-aioworker-first-failed-at", "x-aioworker-reason", "other"]),
    st.none()
    | _texts
    | st.integers(-(2**63), 2**63 - 1)
    | st.sampled_from([40_000, 65_000, MOST_HEADERS_BYTES]).map(lambda size: "x" * size),
    max_size=3,
)
DEATH = [{"queue": "aioworker.shop", "reason": "expired", "count": 1, "routing-keys": ["a" * 200]}]


@settings(deadline=None)
@given(headers=_headers, message_id=_properties, correlation_id=_properties, kind=_properties)
@example({"id": NO_ASCII * 100}, None, None, None)
@example({"x-aioworker-first-failed-at": "x" * MOST_HEADERS_BYTES}, None, None, None)
@example({"id": "edge", "x": "y" * MOST_HEADERS_BYTES, "x-death": DEATH}, None, None, None)
@example({f"{'n' * 100} {number}": 1 for number in range(1300)}, None, None, None)
def test_a_copy_fits_into_its_frame(
    headers: dict[str, Any],
    message_id: str | None,
    correlation_id: str | None,
    kind: str | None,
) -> None:
    """One that cannot be sent would keep its message, and its worker from any other."""
    delivery = delivered(
        headers=headers,
        message_id=message_id,
        correlation_id=correlation_id,
        content_type=kind,
        content_encoding=kind,
    )
    failure = Failure.of(ValueError("x" * 100_000))
    whole, reason = Delivery.of(delivery), NO_ASCII * 20_000

    for copy in (
        copies.retry(whole, reason, NOW, counts=True, lost=True),
        copies.dead_letter(whole, reason, failure.name, failure.traceback, "here:1", NOW),
        copies.revived(delivery),
        copies.kept(delivery, {"guest"}),
    ):
        assert size_of(copy) <= FRAME_BYTES
        assert copy.message_id


def test_a_copy_without_room_leaves_out_the_largest_header_and_names_it() -> None:
    """What RabbitMQ adds to a message made it one that no copy could be sent of."""
    headers = {"id": "edge", "small": 1, "x": "y" * MOST_HEADERS_BYTES, "x-death": DEATH}

    copy = copies.kept(delivered(headers=headers), {"guest"})

    assert copy.headers == {
        "id": "edge",
        "small": 1,
        "x-death": DEATH,
        "x-aioworker-left-out": "x",
    }


def test_a_copy_with_room_leaves_out_nothing() -> None:
    """Sixty-four KiB of others' headers were the most, though a frame holds twice that."""
    headers = {"id": "a", "task": "t", "first": "x" * 50_000, "second": "y" * 60_000}
    delivery = delivered(headers=headers)

    assert copies.kept(delivery, {"guest"}).headers == headers
    assert copies.revived(delivery).headers == headers | {"retries": 0}


def test_an_older_name_of_a_header_left_out_is_told_on() -> None:
    headers = {"x-aioworker-left-out": "before", "now": "y" * 100_000, "also": "z" * 40_000}

    copy = copies.revived(delivered(headers=headers))

    assert copy.headers["x-aioworker-left-out"] == "before, now"


def test_an_id_is_cut_between_two_characters() -> None:
    assert Delivery.of(delivered(headers={"id": NO_ASCII * 100})).id == NO_ASCII * 66


def test_when_it_failed_first_is_kept() -> None:
    noted = "2026-11-25T01:02:03.000+00:00"
    delivery = delivered(headers={"x-aioworker-first-failed-at": noted})

    copy = copies.retry(Delivery.of(delivery), "why", NOW, counts=True, lost=False)

    assert copy.headers["x-aioworker-first-failed-at"] == noted


def test_every_copy_keeps_when_its_message_was_published_and_by_which_sweep() -> None:
    """Brought back, too: what matters is how long a change has waited."""
    published = {PUBLISHED: "2026-11-25T01:02:03.456+00:00", SWEEP: "autumn"}
    second = datetime(2026, 11, 25, 1, 2, 3, tzinfo=UTC)
    delivery = delivered(headers={"id": "a", **published}, timestamp=second)
    whole = Delivery.of(delivery)

    for copy in (
        copies.retry(whole, "why", NOW, counts=True, lost=False),
        copies.dead_letter(whole, "why", "", "", "here:1", NOW),
        copies.revived(delivery),
        copies.kept(delivery, {"guest"}),
    ):
        assert copy.headers.items() >= published.items()
        assert copy.timestamp == second


@pytest.mark.parametrize(
    ("headers", "timestamp", "published"),
    [
        ({PUBLISHED: "2026-11-25T01:02:03.456+00:00"}, NOW, "2026-11-25T01:02:03.456+00:00"),
        ({}, NOW, "2026-11-28T00:00:00.000+00:00"),
        ({PUBLISHED: "lately"}, NOW, "2026-11-28T00:00:00.000+00:00"),
        ({PUBLISHED: 3}, None, None),
        ({}, None, None),
    ],
    ids=["in milliseconds", "in seconds", "no time", "a number", "not at all"],
)
def test_when_it_was_published_is_read_as_far_as_it_is_told(
    headers: dict[str, Any], timestamp: datetime | None, published: str | None
) -> None:
    found = Delivery.of(delivered(headers=headers, timestamp=timestamp)).published

    assert (found and milliseconds(found)) == published


def test_a_letter_that_stays_keeps_what_the_next_look_needs() -> None:
    """Its header in Latin-1 arrives as bytes; RabbitMQ sends to wherever `CC` says."""
    delivery = delivered(
        headers={
            "id": "a",
            "CC": ["elsewhere"],
            "latin": bytearray(b"caf\xe9"),
            "x-delivery-count": 3,
            "x-death": [{"reason": "delivery_limit"}],
        },
        user_id="zamboni",
        expiration="1",
    )

    copy = copies.kept(delivery, {"guest"})

    assert copy.headers == {
        "id": "a",
        "x-aioworker-CC": ["elsewhere"],
        "latin": bytearray(b"caf\xe9"),
        "x-death": [{"reason": "delivery_limit"}],
        "x-aioworker-user-id": "zamboni",
    }
    assert (copy.user_id, copy.expiration) == (None, None)
    assert copies.kept(delivery, {"zamboni"}).user_id == "zamboni"


def test_a_copy_carries_the_last_look_that_has_seen_it() -> None:
    """One look at a time, and none once somebody brings it back."""
    seen = copies.kept(delivered(headers={"id": "a"}), {"guest"}, "first")
    again = copies.kept(delivered(headers=seen.headers), {"guest"}, "second")
    stepped_back = copies.kept(delivered(headers=again.headers), {"guest"})

    assert [one.headers["x-aioworker-look"] for one in (seen, again, stepped_back)] == [
        *("first", "second", "second")
    ]
    assert "x-aioworker-look" not in copies.revived(delivered(headers=again.headers)).headers


def test_a_look_is_noted_only_where_there_is_room() -> None:
    """Else the sender's largest header would go for it."""
    headers = {"id": "edge", "x": "y" * MOST_HEADERS_BYTES}
    room = FRAME_BYTES - size_of(copies.kept(delivered(headers=headers), {"guest"}))
    headers["x"] += "y" * (room - len("x-aioworker-look"))
    again = headers | {"x-aioworker-look": "z"}

    for found in (headers, again):
        copy = copies.kept(delivered(headers=found), {"guest"}, "look" * 8)
        assert copy.headers == headers


def test_what_a_person_brings_back_is_to_run_now() -> None:
    """An expired letter was requeued, acknowledged unrun, and nowhere to be found."""
    headers = {"id": "a", "expires": "2026-01-01T00:00:00", "eta": "2026-01-01T00:00:00"}

    copy = copies.revived(delivered(headers={**headers, "timelimit": [3, None]}))

    assert copy.headers == {"id": "a", "timelimit": [3, None], "retries": 0}
