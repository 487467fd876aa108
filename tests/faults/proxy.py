"""A network between a worker and a server that a test can break: a TCP proxy on loopback."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Literal

from support.servers import HOST

if TYPE_CHECKING:
    from asyncio import StreamReader, StreamWriter
    from collections.abc import Coroutine

PIECE = 65_536
POLL_SECONDS = 0.01
BASIC_GET = bytes([0, 60, 0, 70])  # class and method of an AMQP frame
BASIC_ACK = bytes([0, 60, 0, 80])
RESET = struct.pack("ii", 1, 0)  # lingering for no time
Side = Literal["client", "server"]
MOST_PIECES = 16  # under way in one direction
Pieces = asyncio.Queue[tuple[float, bytes]]  # with the loop's time at which each arrives


class Proxy:
    """Forwards to a server what it gets, as long as the test lets it; `with` runs it.

    Args:
        target: The server's port.

    Attributes:
        port: Where it listens.
        accepted: How many connections it has accepted.
    """

    def __init__(self, target: int) -> None:
        self.port = self.accepted = 0
        self._target = target
        self._delay = 0.0
        self._closed = self._holding = False
        self._pattern = b""
        self._times = 0
        self._held = threading.Event()
        self._links: list[dict[Side, StreamWriter]] = []
        self._server: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self) -> Proxy:
        self._thread.start()
        self.forward()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def forward(self) -> None:
        """Forward everything, also what waited; listen again after a reset."""
        self._delay, self._closed = 0.0, False
        self._run(self._listen())

    def redirect(self, target: int) -> None:
        """Connect who comes from now on to a server at another port."""
        self._target = target

    def delay(self, seconds: float) -> None:
        """Let each piece arrive so long after it was sent, in each direction."""
        self._delay = seconds

    def black_hole(self) -> None:
        """Accept and keep connections, but forward nothing, not even their ends."""
        self._closed = True

    def half_close(self, side: Side) -> None:
        """Tell one side of each connection that the other one sends nothing more."""
        self._run(self._half_close(side))

    def reset(self) -> None:
        """Reset each connection on both sides, and refuse new ones until `forward`."""
        self._run(self._reset())

    def hold_at(self, pattern: bytes, times: int = 1) -> threading.Event:
        """Hold the client that sends *pattern*, once, before the server has it.

        What that client sends afterwards waits too; if it goes away meanwhile, the server
        never gets any of it. Returns what is set when that is so; `release` ends it.

        Args:
            pattern: What is waited for.
            times: How often it is sent until then.
        """
        self._held, self._holding, self._times = threading.Event(), True, times
        self._pattern = pattern
        return self._held

    def release(self) -> None:
        """Forward what is held, and hold nothing more."""
        self._pattern, self._holding = b"", False

    # What follows runs in the proxy's own loop.

    def _run(self, action: Coroutine[None, None, None]) -> None:
        asyncio.run_coroutine_threadsafe(action, self._loop).result()

    async def _listen(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, HOST, self.port)
            self.port = self._server.sockets[0].getsockname()[1]

    async def _half_close(self, side: Side) -> None:
        for link in self._links:
            if side in link:
                _end(link[side])

    async def _reset(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in [writer for link in self._links for writer in link.values()]:
            with suppress(OSError):
                writer.get_extra_info("socket").setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, RESET
                )
            writer.transport.abort()

    async def _end(self) -> None:
        await self._reset()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, client: StreamReader, writer: StreamWriter) -> None:
        self.accepted += 1
        link: dict[Side, StreamWriter] = {"client": writer}
        self._links.append(link)
        with suppress(OSError, asyncio.CancelledError):  # there is no server; the end
            await self._may_pass()
            server, link["server"] = await asyncio.open_connection(HOST, self._target)
            await asyncio.gather(
                self._forward(client, link["server"], watched=True), self._forward(server, writer)
            )
        self._links.remove(link)
        for opened in link.values():
            opened.close()

    async def _forward(
        self, reader: StreamReader, writer: StreamWriter, *, watched: bool = False
    ) -> None:
        under_way = Pieces(MOST_PIECES)
        sending = asyncio.create_task(self._send(reader, under_way, watched=watched))
        try:
            await self._deliver(under_way, writer)
        finally:
            sending.cancel()

    async def _send(self, reader: StreamReader, under_way: Pieces, *, watched: bool) -> None:
        """Put what is read under way, each piece with its delay, and at last the end."""
        before = b""
        while True:
            try:
                piece = await reader.read(PIECE)
                pattern = self._pattern if watched else b""
                end = before[max(len(before) - len(pattern) + 1, 0) :]  # it may come in two pieces
                if pattern:
                    self._times -= (end + piece).count(pattern)
                    if self._times <= 0:
                        piece = await self._hold(reader, piece)
            except OSError:
                piece = b""
            await under_way.put((self._loop.time() + self._delay, piece))
            if not piece:
                return
            before = piece

    async def _deliver(self, under_way: Pieces, writer: StreamWriter) -> None:
        """Write each piece when its time has come, as long as the other side takes any."""
        with suppress(OSError, RuntimeError):  # RuntimeError: the direction was closed
            while True:
                due, piece = await under_way.get()
                await asyncio.sleep(due - self._loop.time())
                await self._may_pass()
                if not piece:
                    break
                writer.write(piece)
                await writer.drain()
        _end(writer)

    async def _hold(self, reader: StreamReader, piece: bytes) -> bytes:
        """Return what came up to the release; nothing where the client went away before."""
        self._pattern = b""
        self._held.set()
        while self._holding:
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS):
                    more = await reader.read(PIECE)
                if not more:
                    return b""
                piece += more
        return piece

    async def _may_pass(self) -> None:
        while self._closed:  # noqa: ASYNC110 - set by the test's thread
            await asyncio.sleep(POLL_SECONDS)


def _end(writer: StreamWriter) -> None:
    with suppress(OSError, RuntimeError):
        writer.write_eof()
