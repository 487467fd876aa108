"""Who runs beside whom in one process: all of them, unless one is to run alone."""

from __future__ import annotations

import asyncio
from collections import Counter

PATIENCE_SECONDS = 60.0
_WHY = "a message may have killed its worker"


class Gate:
    """Lets the runs of a process's tasks in: any number at once, or one alone.

    A message whose worker died while it ran may have killed it, or may have run beside the one
    that did. Alone, it shows which. Nobody waits in here with a message in hand: whoever is
    not let in gives it back, and asks `closed_to` before it takes another.
    """

    def __init__(self) -> None:
        self._inside: Counter[str] = Counter()
        self._alone: str | None = None  # the task that runs alone, or is to
        self._until = 0.0

    def closed_to(self, task: str) -> str | None:
        """Return why no run of a task is let in now; None where one is."""
        expired = _now() > self._until
        if self._alone == task:
            others = sorted(self._inside.keys() - {task})
            if others and not expired:
                return f"to run alone, without {', '.join(others)}: {_WHY}"
        elif self._alone is not None and not expired:
            return f"{self._alone} runs alone: {_WHY}"
        return None

    def enter(self, task: str, *, alone: bool) -> bool:
        """Begin a run, unless the gate is closed to it; return whether it began.

        One that is to run alone and cannot closes the gate to other tasks, for a minute at
        most: what has not ended by then is run beside. Its own run keeps others out no longer.
        """
        if self.closed_to(task) is not None:
            return False
        if not alone and self._alone == task:
            self._alone = None  # what was to run alone went elsewhere
        if alone and self._inside and not self._waited(task):
            self._alone, self._until = task, _now() + PATIENCE_SECONDS
            return False
        if alone:
            self._alone, self._until = task, _now() + PATIENCE_SECONDS
        self._inside[task] += 1
        return True

    def leave(self, task: str, *, alone: bool) -> None:
        """End a run."""
        self._inside[task] -= 1
        if not self._inside[task]:
            del self._inside[task]
        if alone:
            self._alone = None

    def _waited(self, task: str) -> bool:
        return self._alone == task and _now() < self._until + PATIENCE_SECONDS


def _now() -> float:
    return asyncio.get_running_loop().time()
