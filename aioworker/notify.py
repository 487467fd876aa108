"""What the worker tells systemd, by the datagrams of sd_notify(3)."""

from __future__ import annotations

import socket


class Notifier:
    """Sends states to the manager that started the process; without one, does nothing.

    The worker never waits for the manager and never fails because of it.

    Args:
        path: The value of `NOTIFY_SOCKET`: a path, or `@name` for an abstract socket.
    """

    def __init__(self, path: str | None) -> None:
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
