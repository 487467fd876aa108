"""Headers that a copy of a message carries on: as AMQP can send them, in one frame."""

from __future__ import annotations

import reprlib
import struct
from collections.abc import Collection
from typing import Any

import aio_pika
from pamqp.encode import encode_table_value, field_table
from pamqp.header import ContentHeader

FRAME_BYTES = 131_072 - 8  # RabbitMQ's `frame_max`, less what surrounds a frame's content
TEXT_BYTES = 16_000  # of a reason or a traceback: a thousand ids are 11,000
NAME_BYTES = 128  # of a header: pamqp sends no more
LEFT_OUT = "x-aioworker-left-out"  # the names of headers that found no room in a copy
LEFT_OUT_BYTES = 1000
# What says why a letter lies where it does begins so.
_TELLING = ("x-aioworker-", "x-death", "x-first-death-", "x-last-death-")


def line(text: str) -> str:
    """Return a text in one line, and no longer than a header may be."""
    cut = " ".join(text.split()).encode(errors="replace")[:TEXT_BYTES]
    return cut.decode(errors="ignore")


def portable(value: Any) -> Any:
    """Return what AMQP can carry: some of what it can bring, it cannot take back."""
    try:
        carried = _with_bytes(value)
        encode_table_value(carried)
    except (TypeError, ValueError, OverflowError, RecursionError, struct.error):
        return reprlib.repr(value)
    return carried


def _with_bytes(value: Any) -> Any:
    """Return text that is no UTF-8, which arrives as bytes, as an array of bytes."""
    match value:
        case bytes():
            return bytearray(value)
        case list():
            return [_with_bytes(one) for one in value]
        case dict():
            return {name: _with_bytes(one) for name, one in value.items()}
    return value


def fitting(copy: aio_pika.Message, own: Collection[str] = ()) -> aio_pika.Message:
    """Leave headers out of a copy that is too large for a frame; their names stay, as `LEFT_OUT`.

    All properties of a message travel in one frame, and RabbitMQ ends the connection at one
    that is too large. Yet it sends such messages itself, once it has added `x-death`.

    Args:
        copy: The copy, which is changed.
        own: The headers that stay: the copy is made for them.
    """
    if (excess := _excess(copy)) <= 0:
        return copy
    sizes = {name: len(field_table({name: value})) for name, value in copy.headers.items()}

    def rank(name: str) -> tuple[bool, bool, int]:
        telling = name.startswith(_TELLING) and sizes[name] <= TEXT_BYTES + NAME_BYTES
        return name in own, telling, -sizes[name]

    excess += LEFT_OUT_BYTES + NAME_BYTES
    before = copy.headers.get(LEFT_OUT)
    left_out = [] if before is None else [str(before)]
    for name in sorted(sizes, key=rank):
        if excess <= 0:
            break
        excess -= sizes[name] - len(field_table({}))
        del copy.headers[name]
        left_out.append(name)
    names = ", ".join(left_out).encode(errors="replace")[:LEFT_OUT_BYTES]
    copy.headers[LEFT_OUT] = names.decode(errors="ignore")
    return copy


def add_if_it_fits(copy: aio_pika.Message, name: str, value: str) -> None:
    """Give a copy that fits into its frame one more header, unless that would not fit."""
    copy.headers[name] = value
    if _excess(copy) > 0:
        del copy.headers[name]


def _excess(copy: aio_pika.Message) -> int:
    """Return by how many bytes a copy's properties are too large for a frame; negative: room."""
    header = ContentHeader(body_size=len(copy.body), properties=copy.properties)
    return len(header.marshal()) - FRAME_BYTES
