"""Signals: heard by the event loop, and by the process that they were sent to alone."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable
from functools import partial

from aioworker import early

STOPS = (signal.SIGTERM, signal.SIGINT)
ALL = (signal.SIGHUP, *STOPS)
_heard: set[signal.Signals] = set()
_forking = threading.local()  # the mask of a thread that forks


def on_signal(number: signal.Signals, react: Callable[[], None]) -> None:
    """Call *react* in the running event loop at each signal."""
    asyncio.get_running_loop().add_signal_handler(number, react)
    _heard.add(number)


def on_stop(react: Callable[[signal.Signals], object]) -> None:
    """Call *react* at the first SIGTERM or SIGINT; a second one ends the process at once."""
    loop = asyncio.get_running_loop()

    def first(received: signal.Signals) -> None:
        for number in STOPS:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)
            if os.getpid() == 1:
                end_as_first_process(number)
        react(received)

    for number in STOPS:
        on_signal(number, partial(first, number))


def end_as_first_process(number: signal.Signals) -> None:
    """Let a signal end the process: the kernel drops its default action for a container's first."""

    def end(number: int, _frame: object) -> None:
        os._exit(128 + number)

    signal.signal(number, end)


def block() -> None:
    """Let signals wait; the code that this process goes on with has them by `keep_early`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, ALL)


def unblock() -> None:
    """Let signals come again."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ALL)


def keep_early() -> Callable[[], None]:
    """Keep what comes while modules are imported; return what raises it again once all listen."""
    early.keep()
    _heard.update(map(signal.Signals, early.kept))

    def raise_again() -> None:
        for number in early.came:
            signal.raise_signal(number)

    return raise_again


# A forked child, such as one of multiprocessing, has its parent's handlers, which end nothing, and
# the socket by which the parent's event loop hears: a task that terminated its child would stop
# the worker. Nothing arrives between the fork and its end of that.


def _before_fork() -> None:
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _heard)


def _in_parent() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _in_child() -> None:
    if _heard:
        signal.set_wakeup_fd(-1)
    for number in _heard:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)
