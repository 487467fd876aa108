"""A frame that cannot be decoded gives way to one that can; every other comes through as it was."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Set

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp import frame
from pamqp.body import ContentBody
from pamqp.commands import Basic
from pamqp.header import ContentHeader
from pamqp.heartbeat import Heartbeat

from aioworker.rabbitmq.frames import SHOWN_BYTES, Frames, PlainConnection
from aioworker.rabbitmq.message import PROPERTIES, SMALL_BYTES, UNREADABLE, WITHHELD
from tests.faults.junk import UNDECODABLE, Properties

BODY_SIZE = 7
FIRST_BYTES, REST_BYTES = 1, 6


async def read(sent: bytes, small: Set[int] = frozenset()) -> list[bytes]:
    """Read frames as aiormq does, behind those of a login, until none is left."""
    login = [frame.marshal(Basic.Ack(one), 0) for one in range(3)]
    source = asyncio.StreamReader()
    source.feed_data(b"".join(login) + sent)
    source.feed_eof()
    frames, found = Frames(source, tolerant=True, small=small), []
    while not frames.at_eof():
        head = await frames.readexactly(FIRST_BYTES) + await frames.readexactly(REST_BYTES)
        size = frame.frame_parts(head)[2]
        assert size is not None
        found.append(head + await frames.readexactly(size + 1))
    assert found[:3] == login
    return found[3:]


@given(
    st.lists(
        st.just(Heartbeat())
        | st.binary(min_size=1, max_size=20).map(ContentBody)
        | st.just(Basic.Ack(3))
        | st.text(max_size=40).map(
            lambda text: ContentHeader(
                body_size=BODY_SIZE, properties=Basic.Properties(message_id=text, headers={"": 1})
            )
        )
    )
)
async def test_what_can_be_decoded_is_unchanged(sent: list[frame.FrameTypes]) -> None:
    """Also where a part is as long as the one that tells a frame's length."""
    encoded = [frame.marshal(one, 258) for one in sent]

    assert await read(b"".join(encoded)) == encoded


@pytest.mark.parametrize("error", UNDECODABLE)
async def test_properties_that_cannot_be_decoded_say_so(error: str) -> None:
    properties = UNDECODABLE[error]
    header = ContentHeader(body_size=BODY_SIZE, properties=Properties(properties))
    sent = [frame.marshal(one, 258) for one in (header, ContentBody(b"no JSON"))]

    found = await read(b"".join(sent))

    _length, channel, told = frame.unmarshal(found[0])
    assert isinstance(told, ContentHeader)
    headers = told.properties.headers or {}
    assert (channel, told.body_size, found[1:]) == (258, BODY_SIZE, sent[1:])
    assert headers.keys() == {UNREADABLE, PROPERTIES}
    assert str(headers[UNREADABLE]).startswith(error)
    assert headers[PROPERTIES] == properties[:SHOWN_BYTES].hex()


@pytest.mark.parametrize(
    "method",
    [
        Basic.GetOk(2**63 - 1, False, "exchange", "caf\N{LATIN SMALL LETTER E WITH ACUTE}", 200),
        Basic.Deliver("mine", 255, True, "exchange", "caf\N{LATIN SMALL LETTER E WITH ACUTE}"),
    ],
)
async def test_a_routing_key_that_cannot_be_decoded_has_question_marks(
    method: Basic.GetOk | Basic.Deliver,
) -> None:
    """The rest of the message can be read: it is served as any other."""
    right = frame.marshal(method, 258)
    wrong = right.replace("\u00e9".encode(), b"\xe9\xe9")

    [found] = await read(wrong)

    assert await read(right) == [right]
    assert found == right.replace("\u00e9".encode(), b"??")


@pytest.mark.parametrize("properties", UNDECODABLE.values(), ids=UNDECODABLE)
async def test_a_large_body_is_kept_away_whatever_its_properties_are(properties: bytes) -> None:
    header = ContentHeader(body_size=SMALL_BYTES + 1, properties=Properties(properties))

    [found] = await read(frame.marshal(header, 7), {7})

    _length, _channel, told = frame.unmarshal(found)
    assert isinstance(told, ContentHeader)
    assert told.properties.headers == {WITHHELD: True}


@pytest.mark.parametrize("sizes", [[SMALL_BYTES + 1], [131_064, 131_064, 1]])
async def test_a_large_body_is_kept_away_from_a_channel_that_takes_small_ones(
    sizes: list[int],
) -> None:
    """Whoever waits for its end knows that the peer still sends."""
    size = sum(sizes)
    bodies: list[frame.FrameTypes] = [ContentBody(b"L" * part) for part in sizes]
    large = [frame.marshal(one, 7) for one in (ContentHeader(body_size=size), *bodies)]
    properties = Basic.Properties(message_id="small")
    small_header = ContentHeader(body_size=SMALL_BYTES, properties=properties)
    small = [frame.marshal(one, 7) for one in (small_header, ContentBody(b"s" * SMALL_BYTES))]
    others = [
        frame.marshal(one, 8)
        for one in (ContentHeader(body_size=size, properties=properties), *bodies)
    ]
    mixed = [one for pair in zip(large, others, strict=True) for one in pair]

    found = await read(b"".join([*mixed, *small]), {7})

    assert found[1 : 2 * len(others) : 2] == others
    assert found[2 : 2 * len(others) : 2] == [frame.marshal(Heartbeat(), 0)] * len(sizes)
    assert found[2 * len(others) :] == small
    _length, channel, told = frame.unmarshal(found[0])
    assert isinstance(told, ContentHeader)
    assert (channel, told.body_size, told.properties.headers) == (7, 0, {WITHHELD: True})


def test_a_connection_that_is_garbage_is_closed_by_nobody() -> None:
    """Any thread may collect it; aio-pika's `__del__` leaves a coroutine behind where no loop runs.

    pytest fails a test that does.
    """
    loop = asyncio.new_event_loop()
    made = PlainConnection("amqp://127.0.0.1/", loop=loop)

    del made
    gc.collect()

    loop.close()
