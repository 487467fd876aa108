"""What RabbitMQ sends, less what cannot be decoded and bodies for which there is no room.

A message's properties come in a frame of their own. aiormq ends the connection at one that it
cannot decode (a header's name in Latin-1, a time in microseconds), and RabbitMQ sends the same
message again over the next: from a quorum queue for four minutes, from a classic one for ever.
On a tolerant connection such properties give way to one header that says what is wrong with
them, so that the message can be set aside like any other. It decodes all properties twice, which
costs a seventh of the small messages a second; so a worker is tolerant only after it was cut off
by one.

Messages that are asked for at once come over several channels. Each might be a large one, so only
one channel takes a body of any size. A message with a larger one comes over the others without it.
"""

from __future__ import annotations

import asyncio
import struct
from typing import TYPE_CHECKING, Any, cast

import aio_pika
import aiormq
from aio_pika.abc import UnderlayConnection
from aiormq.connection import TCPTransportFactory, TLSTransportFactory
from aiormq.exceptions import InvalidFrameError
from pamqp import constants
from pamqp.commands import Basic
from pamqp.header import ContentHeader

from aioworker.rabbitmq.message import PROPERTIES, SMALL_BYTES, UNREADABLE, WITHHELD

if TYPE_CHECKING:
    from asyncio import StreamReader, StreamWriter
    from collections.abc import Set

    from aio_pika.abc import AbstractChannel
    from yarl import URL

SHOWN_BYTES = 30_000  # of the properties themselves, which leaves room for other headers
_HEAD = struct.Struct(">BHI")  # a frame's type, its channel, and how many bytes it carries
_SIZE_AT = 4  # in a header frame: behind class and weight
_FIXED_BYTES = 12  # class, weight, size of the body
_METHOD_BYTES = 4
_TAG_BYTES = 9  # of a delivery, and whether it comes again
_NO_ASCII = bytes(byte if byte < 128 else ord("?") for byte in range(256))
LOGIN_FRAME_BYTES = 65_536  # RabbitMQ's own are a few hundred
_LOGIN_FRAMES = 3
# A method on channel 0, or the version that it speaks.
_FIRST = (bytes([constants.FRAME_METHOD, 0, 0]), constants.AMQP)
_TLS_ALERT = b"\x15\x03"
# What decoding raises; a table in a table in a table, without end, the last of them.
_FAILURES = (ValueError, OverflowError, OSError, struct.error, RecursionError)


def undecodable(error: BaseException | None) -> bool:
    """Return whether a connection ended for a message that aiormq could not decode."""
    if isinstance(error, InvalidFrameError | OverflowError | RecursionError):
        return True
    return type(error) is OSError  # a time beyond the platform's; the network's are its kinds


class ForeignError(ValueError):
    """What answers is something else than RabbitMQ, or speaks TLS; the text says which."""


class PlainConnection(aio_pika.Connection):
    """A connection that never heals by itself, and believes no size before the login.

    Whoever opened it closes it.
    """

    tolerant = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._small: set[int] = set()
        transport = _Transport(tolerant=self.tolerant, small=self._small)
        self.kwargs["transport_factory"] = transport

    def keep_small(self, channel: AbstractChannel) -> None:
        """Let no body of more than `SMALL_BYTES` come over a channel.

        A message with a larger one comes without it, and has the header `WITHHELD`.
        """
        if (number := channel.number) is not None:
            self._small.add(number)
            # The number may be another channel's later, which a consumer uses.
            channel.close_callbacks.add(lambda *_: self._small.discard(number))

    def __del__(self) -> None:
        """Do nothing: aio-pika begins to close it, in whatever thread collects garbage."""

    async def connect(self, timeout: float | None = None) -> None:
        """Connect as aio-pika does, over a connection of aiormq's that tells of a silent peer."""
        self.transport = await _Underlay.connect(
            self.url, self._on_connection_close, timeout=timeout, **self.kwargs
        )
        await self._on_connected()


class _Underlay(UnderlayConnection):
    @classmethod
    async def make_connection(
        cls, url: URL, timeout: float | None = None, **kwargs: Any
    ) -> _Connection:
        async with asyncio.timeout(timeout):
            made = _Connection(url, **kwargs)
            await made.connect()
            return made


class _Connection(aiormq.Connection):
    async def close(
        self, exc: aiormq.abc.ExceptionType | None = None, timeout: float | None = None
    ) -> None:
        """Close it; whoever waits for an answer is told of a peer that said nothing for too long.

        aiormq ends its own reader then, and so would cancel whoever waits.
        """
        if self.connected.is_set() and isinstance(exc, asyncio.CancelledError):
            exc = ConnectionError("it has sent nothing for too long")
        await super().close(exc, timeout)


class TolerantConnection(PlainConnection):
    """A plain connection that no message can end."""

    tolerant = True


class _Transport(aiormq.TransportFactory):
    """Connects as aiormq does, and reads by `Frames`."""

    def __init__(self, *, tolerant: bool, small: set[int]) -> None:
        self._tolerant = tolerant
        self._small = small

    async def create(self, url: URL, **kwargs: Any) -> tuple[StreamReader, StreamWriter]:
        """Open the connection to *url*; the arguments are aiormq's."""
        secure = url.scheme == "amqps"
        own = TLSTransportFactory() if secure else TCPTransportFactory()
        opened, writer = await own.create(url, **kwargs)
        frames = Frames(opened, tolerant=self._tolerant, small=self._small)
        return cast("StreamReader", frames), writer


class Frames:
    """Reads a frame, and hands it out as aiormq asks for it: a byte, six bytes, and the rest.

    The frames of the login may come from anybody: no large one is taken.

    Args:
        reader: Where they come from.
        tolerant: Whether what cannot be decoded gives way to what can.
        small: The channels over which no body larger than `SMALL_BYTES` comes.
    """

    def __init__(
        self, reader: StreamReader, *, tolerant: bool = False, small: Set[int] = frozenset()
    ) -> None:
        self.at_eof = reader.at_eof
        self.read = reader.read
        self._read = reader.readexactly
        self._tolerant = tolerant
        self._small = small
        self._withheld: set[int] = set()  # the channels whose last message comes without its body
        self._login = _LOGIN_FRAMES  # that are still to come
        self._parts: list[bytes] = []  # of the frame that was read last, the next one at the end

    async def readexactly(self, _count: int) -> bytes:
        """Return the next part of a frame, or of what is in its place.

        Raises:
            IncompleteReadError: The connection ended before.
            ForeignError: The first frame is none of RabbitMQ's.
            ValueError: It is larger than any of a login.
        """
        if not self._parts:
            self._parts = await self._next()
        return self._parts.pop()

    async def _next(self) -> list[bytes]:
        """Read a frame."""
        head = await self._read(_HEAD.size)
        kind, channel, size = _HEAD.unpack(head)
        if self._login:
            self._login -= 1
            if self._login == _LOGIN_FRAMES - 1:
                _check_first(head)
            if head.startswith(constants.AMQP):  # aiormq says so, and reads no more
                return [head[1:], head[:1]]
            if size > LOGIN_FRAME_BYTES:
                raise ValueError(f"a frame of {size} bytes before the login")
        rest = await self._read(size + 1)
        if (instead := self._instead(kind, channel, rest)) is not None:
            kind, channel, payload = instead
            head = _HEAD.pack(kind, channel, len(payload))
            rest = payload + constants.FRAME_END_CHAR
        return [rest, head[1:], head[:1]]

    def _instead(self, kind: int, channel: int, rest: bytes) -> tuple[int, int, bytes] | None:
        """Return what is in a frame's place: its type, channel, and payload; None if it can stay.

        Args:
            kind: The frame's type.
            channel: Its channel.
            rest: Its payload, and the byte at its end.
        """
        if channel in self._small:
            if kind == constants.FRAME_HEADER:
                if _size(rest) > SMALL_BYTES:
                    self._withheld.add(channel)
                    return kind, channel, withholding(rest)
                self._withheld.discard(channel)
            elif kind == constants.FRAME_BODY and channel in self._withheld:
                # aiormq takes a peer for silent if no frame is handed to it.
                return constants.FRAME_HEARTBEAT, 0, b""
        if self._tolerant and kind in _READ:
            return kind, channel, _READ[kind](rest[:-1])
        return None


def _size(header: bytes) -> int:
    """Return how many bytes a message's body has, by its header frame."""
    return int.from_bytes(header[_SIZE_AT:_FIXED_BYTES])


def _check_first(head: bytes) -> None:
    """Refuse what no RabbitMQ says first, such as a database's greeting, once it is there."""
    if head.startswith(_FIRST):
        return
    if head.startswith(_TLS_ALERT):
        raise ForeignError("it speaks TLS on this port, which amqps:// is for")
    raise ForeignError("what answers there is no RabbitMQ")


def withholding(payload: bytes) -> bytes:
    """Return the payload of a header frame of a message without its body, that says so."""
    properties = Basic.Properties(headers={WITHHELD: True})
    return payload[:_SIZE_AT] + bytes(_FIXED_BYTES - _SIZE_AT) + properties.marshal()


def readable(payload: bytes) -> bytes:
    """Return the payload of a header frame; where it cannot be decoded, one that says why."""
    try:
        ContentHeader().unmarshal(payload)
    except _FAILURES as error:
        properties = payload[_FIXED_BYTES:]
        instead = Basic.Properties(
            headers={
                UNREADABLE: f"{type(error).__name__}: {' '.join(str(error).split())}",
                PROPERTIES: properties[:SHOWN_BYTES].hex(),
            }
        )
        return payload[:_FIXED_BYTES] + instead.marshal()
    return payload


def legible(payload: bytes) -> bytes:
    """Return the payload of a method frame; what is no ASCII in names, as question marks.

    The routing key, and the exchange's name, are a publisher's to choose.
    """
    start = _names_at(payload)
    if start is None:
        return payload
    found = bytearray(payload)
    for _ in range(2):
        end = start + 1 + found[start]
        try:
            found[start + 1 : end].decode()
        except UnicodeDecodeError:
            found[start + 1 : end] = found[start + 1 : end].translate(_NO_ASCII)
        start = end
    return bytes(found)


def _names_at(payload: bytes) -> int | None:
    """Return where a delivery's exchange and routing key stand; None for another method."""
    match int.from_bytes(payload[:_METHOD_BYTES]):
        case Basic.GetOk.index:
            return _METHOD_BYTES + _TAG_BYTES
        case Basic.Deliver.index:  # behind the consumer's own name
            return _METHOD_BYTES + 1 + payload[_METHOD_BYTES] + _TAG_BYTES
    return None


_READ = {constants.FRAME_HEADER: readable, constants.FRAME_METHOD: legible}
