"""Monitors the event loop: says that it is blocked, by which line, and for how long.

A blocked loop answers no heartbeat; the servers close its connections, and would be blamed.
A thread monitors it, and names the line while that still blocks. If the thread did not run
either, it was the whole process that stood still.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import sys
import threading
import time
import traceback
from itertools import takewhile

from aioworker.logs import Seldom, fields

log = logging.getLogger(__name__)

CHECK_SECONDS = 0.5
LONGEST_SECONDS = 5.0  # more than a slow machine or a collection of garbage takes
RECENT_SECONDS = 10.0  # a connection that it cost is missed by then
NAME_PREFIX = "aioworker "  # what the names of a task's threads and asyncio tasks begin with
_MACHINERY = (
    os.path.dirname(asyncio.__file__) + os.sep,
    os.path.dirname(os.path.dirname(__file__)) + os.sep,
)


class LoopMonitor:
    """Monitors the running event loop from a thread, while inside: `with LoopMonitor()`."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._end = threading.Event()
        self._lock = threading.Lock()
        self._seldom = Seldom()
        self._checked_at = self._cpu = 0.0  # of the last check: its time, the CPU time used by then
        self._asked_at: float | None = None  # when the loop was asked, while it has not answered
        self._place: dict[str, str] | None = None  # what blocks the loop, once that is said
        self._level = logging.WARNING
        self._words, self._ended = "", -math.inf
        self._watching = threading.Thread(
            target=self._watch, name=f"{NAME_PREFIX}loop", daemon=True
        )

    def __enter__(self) -> LoopMonitor:
        self._checked_at, self._cpu = time.monotonic(), time.process_time()
        self._watching.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._end.set()
        self._watching.join()

    def recent(self) -> str:
        """Return what stood still and for how long, if that ended a moment ago, else nothing."""
        self._check()  # the thread may wake up later than whoever asks
        return self._words if time.monotonic() - self._ended < RECENT_SECONDS else ""

    def _watch(self) -> None:
        while not self._end.wait(CHECK_SECONDS):
            self._check()
            if self._asked_at is None:
                self._asked_at = self._checked_at
                self._loop.call_soon_threadsafe(self._answer)

    def _check(self) -> None:
        """See how long ago the last check was, and whether the loop has answered."""
        with self._lock:
            now, cpu = time.monotonic(), time.process_time()
            idle, busy = now - self._checked_at, cpu - self._cpu
            self._checked_at, self._cpu = now, cpu
            if idle > LONGEST_SECONDS:
                self._report_process(idle, busy)
            elif self._asked_at is not None and now - self._asked_at > LONGEST_SECONDS:
                self._report_loop()

    def _report_process(self, seconds: float, cpu_seconds: float) -> None:
        """Say that nothing ran, no thread either."""
        if self._asked_at is not None:
            self._asked_at = self._checked_at  # the loop has its time from now on
        # Code in C that keeps Python's lock lets it go where it was called. What the loop does
        # after a stop may be anything.
        kept = cpu_seconds > seconds / 2
        place = self._where() if kept else {}
        cause = "code in C let no thread run" if kept else "stopped, suspended or out of CPU"
        self._remember("the process", seconds, place)
        log.log(
            self._level_for("process"),
            "process stood still: %s",
            cause,
            extra=fields(**place, seconds=seconds),
        )

    def _report_loop(self) -> None:
        """Say, once, that the loop has not answered for too long."""
        if self._place is None:
            self._place = self._where()
            self._level = self._level_for(self._place.get("task"))
            log.log(
                self._level,
                "event loop stands still: an `async def` must not block; a `def` runs in a thread",
                extra=fields(**self._place),
            )

    def _answer(self) -> None:
        """Note that the loop runs, and say for how long it did not."""
        with self._lock:
            asked, self._asked_at = self._asked_at, None
            place, self._place = self._place, None
            if asked is not None and place is not None:
                seconds = time.monotonic() - asked
                self._remember("the event loop", seconds, place)
                log.log(
                    self._level, "event loop stood still", extra=fields(**place, seconds=seconds)
                )

    def _level_for(self, what: str | None) -> int:
        return logging.WARNING if self._seldom.allows(what) else logging.DEBUG

    def _remember(self, what: str, seconds: float, place: dict[str, str]) -> None:
        during = f" while {place['task']} ran" if place else ""
        self._words = f"{what} stood still for {seconds:.0f} s{during}"
        self._ended = time.monotonic()

    def _where(self) -> dict[str, str]:
        """Return which task the event loop runs now, and where; nothing between two of them."""
        running = asyncio.current_task(self._loop)
        if running is None:
            return {}
        outwards = traceback.walk_stack(sys._current_frames()[self._thread])
        stack = [(frame.f_code.co_filename, line, frame.f_code.co_name) for frame, line in outwards]
        theirs = list(takewhile(lambda one: not one[0].startswith(_MACHINERY), stack)) or stack[:1]
        ends = dict.fromkeys((theirs[-1], theirs[0]))  # where it began, and where it has got to
        at = ", ".join(f"{file}:{line} in {name}" for file, line, name in ends)
        return {"task": running.get_name().removeprefix(NAME_PREFIX), "at": at}
