"""What RabbitMQ sends, as far as it can be decoded.

A message's properties come in a frame of their own. aiormq ends the connection at one that it
cannot decode (a header's name in Latin-1, a time in microseconds), and RabbitMQ sends the same
message again over the next: from a quorum queue for four minutes, from a classic one for ever.
On a tolerant connection such properties give way to one header that says what is wrong with
them, so that the message can be set aside like any other. It decodes all properties twice, which
costs a seventh of the small messages a second; so a worker is tolerant only after it was cut off
by one.
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
from pamqp.commands import Basic
from pamqp.constants import AMQP, FRAME_END_CHAR, FRAME_HEADER, FRAME_METHOD
from pamqp.header import ContentHeader

from aioworker.rabbitmq.message import PROPERTIES, UNREADABLE

if TYPE_CHECKING:
    from asyncio import StreamReader, StreamWriter

    from yarl import URL

SHOWN_BYTES = 30_000  # of the properties themselves, which leaves room for other headers
_FIXED_BYTES = 12  # class, weight, size of the body
_METHOD_BYTES = 4
_TAG_BYTES = 9  # of a delivery, and whether it comes again
_NO_ASCII = bytes(byte if byte < 128 else ord("?") for byte in range(256))
LOGIN_FRAME_BYTES = 65_536  # RabbitMQ's own are a few hundred
_LOGIN_PARTS = 9  # three frames, each read in three parts
_FIRST = (bytes([FRAME_METHOD, 0, 0]), AMQP)  # a method on channel 0, or the version it speaks
_TLS_ALERT = b"\x15\x03"
_REST_BYTES = 6  # of a frame's first seven bytes: its type is read before them
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
        self.kwargs["transport_factory"] = _Transport(tolerant=self.tolerant)

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
    """Connects as aiormq does, and reads by `_First`, and by `Frames` if tolerant."""

    def __init__(self, *, tolerant: bool) -> None:
        self._tolerant = tolerant

    async def create(self, url: URL, **kwargs: Any) -> tuple[StreamReader, StreamWriter]:
        """Open the connection to *url*; the arguments are aiormq's."""
        secure = url.scheme == "amqps"
        own = TLSTransportFactory() if secure else TCPTransportFactory()
        opened, writer = await own.create(url, **kwargs)
        reader = cast("StreamReader", _First(opened))
        return cast("StreamReader", Frames(reader)) if self._tolerant else reader, writer


class _First:
    """Reads the frames of the login, which may come from anybody: no large one is taken."""

    def __init__(self, reader: StreamReader) -> None:
        self.at_eof = reader.at_eof
        self.read = reader.read
        self._read = reader.readexactly
        self._left = _LOGIN_PARTS
        self._head = b""

    async def readexactly(self, count: int) -> bytes:
        """Return the next part of a frame.

        Raises:
            IncompleteReadError: The connection ended before.
            ForeignError: The first frame is none of RabbitMQ's.
            ValueError: It is larger than any of a login.
        """
        if not self._left:
            return await self._read(count)
        if count > LOGIN_FRAME_BYTES:
            raise ValueError(f"a frame of {count} bytes before the login")
        self._left -= 1
        part = await self._read(count)
        if len(self._head) <= _REST_BYTES:
            self._head += part
            _check_first(self._head)
        return part


def _check_first(head: bytes) -> None:
    """Refuse what no RabbitMQ says first, such as a database's greeting, once it is there."""
    if len(head) <= _REST_BYTES or head.startswith(_FIRST):
        return
    if head.startswith(_TLS_ALERT):
        raise ForeignError("it speaks TLS on this port, which amqps:// is for")
    raise ForeignError("what answers there is no RabbitMQ")


class Frames:
    """Reads frames as aiormq asks for them: a byte, six bytes, and what they announce.

    Args:
        reader: Where they come from.
    """

    def __init__(self, reader: StreamReader) -> None:
        self.at_eof = reader.at_eof
        self.read = reader.read
        self._read = reader.readexactly
        self._type = b""
        self._ahead: bytes | None = None

    async def readexactly(self, count: int) -> bytes:
        """Return the next part of a frame; of unreadable properties, of the frame in their place.

        Raises:
            IncompleteReadError: The connection ended before.
        """
        if self._ahead is not None:
            rest, self._ahead = self._ahead, None
            return rest
        part = await self._read(count)
        if count == 1:
            self._type = part
        elif count == _REST_BYTES and (read := _READ.get(self._type)) is not None:
            channel, size = struct.unpack(">HI", part)
            payload = read((await self._read(size + 1))[:-1])
            self._ahead = payload + FRAME_END_CHAR
            part = struct.pack(">HI", channel, len(payload))
        return part


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


_READ = {bytes([FRAME_HEADER]): readable, bytes([FRAME_METHOD]): legible}
