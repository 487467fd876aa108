"""Servers that are none: they play a part to whoever connects, and keep every byte they get."""

from __future__ import annotations

import asyncio
import struct
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from pamqp import commands, frame
from pymysql.constants import CLIENT

if TYPE_CHECKING:
    from asyncio import StreamReader, StreamWriter

    from pamqp.common import FieldTable

PIECE = 65_536
SALT = b"eight bytes, and twelve"[:20]
HTTP = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"
RANDOM = bytes((n * 7919 + 13) % 251 for n in range(4096))


class Peer:
    """Who has connected: what it sent is read all the time, whatever the part does."""

    def __init__(self, writer: StreamWriter) -> None:
        self._writer = writer
        self._got = 0
        self._more = asyncio.Event()

    def got(self, count: int) -> None:
        """Count what was read from it."""
        self._got += count
        self._more.set()

    async def send(self, data: bytes) -> None:
        """Send it something."""
        self._writer.write(data)
        await self._writer.drain()

    async def answer(self, data: bytes) -> None:
        """Send it something once it has said more."""
        self._more.clear()
        await self._more.wait()
        await self.send(data)

    async def close(self) -> None:
        """Close the connection."""
        self._writer.close()


Part = Callable[[Peer], Awaitable[None]]


class FalseServer:
    """Plays a part on a port of loopback; `with` runs it.

    Attributes:
        port: Where it listens.
        part: What it plays.
        received: All that it got, over all connections.
    """

    def __init__(self, part: Part) -> None:
        self.port = 0
        self.received = b""
        self.part = part
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self) -> FalseServer:
        self._thread.start()
        starting = asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._server = asyncio.run_coroutine_threadsafe(starting, self._loop).result()
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *exc_info: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        self._server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for one in others:
            one.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: StreamReader, writer: StreamWriter) -> None:
        peer = Peer(writer)
        playing = asyncio.ensure_future(self.part(peer))
        try:
            while data := await reader.read(PIECE):
                self.received += data
                peer.got(len(data))
        except OSError:
            pass
        finally:
            playing.cancel()
            with suppress(asyncio.CancelledError, OSError):
                await playing
            writer.close()


def says(*words: bytes, then_close: bool = False) -> Part:
    """Return a part that says one thing at once, and each other after an answer."""

    async def part(peer: Peer) -> None:
        for number, data in enumerate(words):
            await (peer.answer(data) if number else peer.send(data))
        if then_close:
            await peer.close()

    return part


def slowly(words: bytes) -> Part:
    """Return a part that says something a byte a second."""

    async def part(peer: Peer) -> None:
        for byte in words:
            await peer.send(bytes([byte]))
            await asyncio.sleep(1)

    return part


def endlessly(words: bytes) -> Part:
    """Return a part that never stops."""

    async def part(peer: Peer) -> None:
        while True:
            await peer.send(words)

    return part


def packet(number: int, payload: bytes) -> bytes:
    """Return a packet of MySQL's."""
    return struct.pack("<I", len(payload))[:3] + bytes([number]) + payload


def greeting(plugin: bytes = b"mysql_native_password", flags: int = 0) -> bytes:
    """Return a MySQL server's first packet; without `CLIENT.SSL` among *flags* it offers no TLS."""
    flags |= CLIENT.PROTOCOL_41 | CLIENT.SECURE_CONNECTION | CLIENT.PLUGIN_AUTH
    low, high = struct.pack("<H", flags & 0xFFFF), struct.pack("<H", flags >> 16)
    middle = b"\x2d\x02\x00" + high + bytes([21]) + bytes(10)
    first = b"\x0a8.4.0-false\0" + struct.pack("<I", 7) + SALT[:8] + b"\0"
    return packet(0, first + low + middle + SALT[8:] + b"\0" + plugin + b"\0")


def switch(plugin: bytes) -> bytes:
    """Return a MySQL server's wish for another way to log in."""
    return packet(2, b"\xfe" + plugin + b"\0" + SALT + b"\0")


def refusal(number: int, words: bytes) -> bytes:
    """Return a MySQL server's error."""
    return packet(number, b"\xff" + struct.pack("<H", 1130) + b"#HY000" + words)


LOGGED_IN = packet(2, b"\x00\x00\x00\x02\x00\x00\x00")
AGREED = packet(1, b"\x00\x00\x00\x02\x00\x00\x00")  # no rows, whatever the statement
WANTS_A_FILE = packet(1, b"\xfb/etc/passwd")


def start(mechanisms: str = "PLAIN", **properties: FieldTable) -> bytes:
    """Return a RabbitMQ server's first frame."""
    start = commands.Connection.Start(server_properties={**properties}, mechanisms=mechanisms)
    return frame.marshal(start, 0)


TUNE = frame.marshal(commands.Connection.Tune(channel_max=10, frame_max=131_072, heartbeat=60), 0)
OPENED = frame.marshal(commands.Connection.OpenOk(), 0)
CLOSED = frame.marshal(commands.Connection.CloseOk(), 0)
NO_FRAME = b"\x01\x00\x00\x00\x00\x00\x04\x00\x0a\x00\xff\xce"
WANTS_MORE = frame.marshal(commands.Connection.Secure(challenge="who?"), 0)
A_HUGE_FRAME = b"\x01\x00\x00\xff\xff\xff\xff"
A_HUGE_PACKET = b"\xff\xff\xff\x00"
