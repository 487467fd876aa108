"""The log line of a settled delivery, and now and then the traceback of what failed in it."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from aioworker import outcome
from aioworker.logs import Seldom, fields
from aioworker.outcome import Kind, Outcome
from aioworker.topology import RETRY_TTL_MS

if TYPE_CHECKING:
    from aio_pika.abc import AbstractIncomingMessage

    from aioworker.context import Context

log = logging.getLogger("aioworker.consumer")

_FIELDS = frozenset(
    {
        *("time", "level", "logger", "event", "traceback"),
        *("task", "message_id", "lane", "attempt", "of", "outcome", "reason"),
        *("wait_seconds", "run_seconds", "retry_seconds"),
    }
)


class Report:
    """Tells what a task's deliveries came to.

    Args:
        max_retries: Attempts after the first, before a message becomes a dead letter.
    """

    def __init__(self, max_retries: int) -> None:
        self._attempts = max_retries + 1
        self._idle_since = time.monotonic()
        self._tracebacks = Seldom()

    def values(
        self, delivery: AbstractIncomingMessage, ctx: Context, taken: float, began: float
    ) -> dict[str, Any]:
        """Return the fields of the line that tells of an attempt, which has just ended.

        Args:
            delivery: What was served.
            ctx: What its run got.
            taken: When it was taken, by the monotonic clock.
            began: When its run began; 0 for never.
        """
        began, ended = began or taken, time.monotonic()
        waited, self._idle_since = max(began - self._idle_since, 0.0), ended
        return {
            "task": ctx.task,
            "message_id": ctx.message_id,
            "lane": outcome.lane(delivery),
            "attempt": ctx.attempt,
            **{_counted(name): value for name, value in ctx.counts.items()},
            "wait_seconds": waited,
            "run_seconds": ended - began,
        }

    def settled(
        self, result: Outcome, values: dict[str, Any], error: BaseException | None = None
    ) -> None:
        """Log the one line of a settled delivery.

        Args:
            result: What it came to.
            values: Its fields.
            error: What failed in its run: the line carries its traceback, once a minute for each
                kind of error, and always at the level debug.
        """
        if result.reason:
            values["reason"] = outcome.line(result.reason)
        if result.kind is Kind.RETRY:
            values |= {"of": self._attempts, "retry_seconds": RETRY_TTL_MS / 1000}
        phrase, level = _phrase(result)
        shown = error if self._shows_traceback(error, values["task"], level) else None
        values["outcome"] = str(result.kind)
        log.log(level, phrase, exc_info=shown, extra=fields(**values))

    def _shows_traceback(self, error: BaseException | None, task: str, level: int) -> bool:
        if error is None or outcome.explained(error) or not log.isEnabledFor(level):
            return False
        new = self._tracebacks.allows((task, outcome.kind_of(error)))
        return new or log.isEnabledFor(logging.DEBUG)


def _phrase(result: Outcome) -> tuple[str, int]:
    match result.kind:
        case Kind.ACK if result.reason:
            return "chunk expired", logging.WARNING
        case Kind.ACK:
            return "chunk done", logging.INFO
        case Kind.DEAD_LETTER:
            return "message refused", logging.ERROR
        case Kind.RELEASED if not result.failed:
            return "chunk given back", logging.INFO
    return "chunk failed", logging.WARNING


def _counted(name: object) -> str:
    """Return what a task's count is called in the log line: it may not take a name of ours."""
    return f"counts.{name}" if name in _FIELDS else str(name)
