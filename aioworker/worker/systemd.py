"""What the worker tells systemd, by the datagrams of sd_notify(3)."""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping


class Notifier:
    """Sends states to the manager that started the process; without one, does nothing.

    The worker never waits for the manager and never fails because of it.

    Args:
        environment: Where the manager says how: in `NOTIFY_SOCKET`, a path, or `@name` for an
            abstract socket; in `WATCHDOG_USEC`, the microseconds after which it takes a process
            that says nothing for dead; and in `WATCHDOG_PID`, which process that is.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        path = environment.get("NOTIFY_SOCKET")
        mine = environment.get("WATCHDOG_PID") in (None, str(os.getpid()))
        patience = environment.get("WATCHDOG_USEC", "")
        self._patience = int(patience) / 1e6 if mine and patience.isdecimal() else 0.0
        self._path = "\0" + path[1:] if path and path.startswith("@") else path
        self._socket: socket.socket | None = None
        if path:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)

    def send(self, **states: str) -> None:
        """Send states, such as `READY="1"` or `STATUS="waiting"`."""
        if self._socket is None:
            return
        # A line is a state: a value may not begin one of its own.
        text = "\n".join(f"{name}={' '.join(value.split())}" for name, value in states.items())
        try:
            self._socket.sendto(text.encode(), self._path or "")
        except OSError:
            return  # the manager's socket is full or gone; the work goes on

    @asynccontextmanager
    async def alive(self) -> AsyncIterator[None]:
        """Tell the manager, inside, that the event loop runs: one that stands still is ended."""
        telling = asyncio.create_task(self._tell_alive())
        try:
            yield
        finally:
            telling.cancel()
            await asyncio.gather(telling, return_exceptions=True)

    async def _tell_alive(self) -> None:
        while self._patience:
            self.send(WATCHDOG="1")
            await asyncio.sleep(self._patience / 2)
