"""The same task that does nothing, for each of several task queues: see `benchmarks.noop`."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

MESSAGES = int(os.environ.get("NOOP_MESSAGES", "20000"))
_lock = threading.Lock()
_done = 0
_began = 0.0


def tick() -> None:
    """Count a run; write the seconds from the first to the last where the parent looks."""
    global _done, _began
    with _lock:
        _done += 1
        if _done == 1:
            _began = time.perf_counter()
        if _done == MESSAGES:
            target = Path(os.environ["NOOP_RESULT"])
            part = target.with_suffix(".part")
            part.write_text(str(time.perf_counter() - _began))
            part.rename(target)
