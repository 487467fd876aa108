"""The same tasks for each of several task queues: see `benchmarks.noop` and `benchmarks.peers`."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

MESSAGES = int(os.environ.get("NOOP_MESSAGES", "20000"))
_lock = threading.Lock()
_done = 0
_began = 0.0


def begin() -> None:
    """Note when the first run began, where that takes time."""
    global _began
    with _lock:
        _began = _began or time.perf_counter()


def tick() -> None:
    """Count a run; write the seconds from the first to the last where the parent looks."""
    global _done
    begin()
    with _lock:
        _done += 1
        if _done == MESSAGES:
            target = Path(os.environ["NOOP_RESULT"])
            part = target.with_suffix(".part")
            part.write_text(str(time.perf_counter() - _began))
            part.rename(target)
