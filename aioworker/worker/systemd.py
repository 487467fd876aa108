"""What the worker tells systemd, by the datagrams of sd_notify(3)."""

from __future__ import annotations

import asyncio
import math
import os
import socket
from collections.abc import Callable, Collection, Mapping
from typing import TypeVar

_Result = TypeVar("_Result")


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

    async def wait(
        self,
        tasks: Collection[asyncio.Task[_Result]],
        progresses: Callable[[], bool],
        until: float = math.inf,
    ) -> set[asyncio.Task[_Result]]:
        """Wait until one of *tasks* is done; return all that are, none once the time is up.

        Meanwhile the manager hears that the process lives, but only while it progresses: one that
        does not is ended, and started again.

        Args:
            tasks: What is waited for.
            progresses: Returns whether the work goes on.
            until: When to wait no longer, by the event loop's clock.
        """
        now = asyncio.get_running_loop().time
        while True:
            if self._patience and progresses():
                self.send(WATCHDOG="1")
            seconds = min(self._patience / 2 or math.inf, until - now())
            done, _left = await asyncio.wait(
                tasks,
                timeout=None if seconds == math.inf else max(seconds, 0),
                return_when=asyncio.FIRST_COMPLETED,
            )
            if done or now() >= until:
                return done
