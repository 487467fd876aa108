"""The log line of a settled delivery, and now and then the traceback of what failed in it."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from aioworker.errors import let_go, name_of, traceback_of
from aioworker.logs import Seldom, fields
from aioworker.rabbitmq.headers import line
from aioworker.rabbitmq.message import brief
from aioworker.rabbitmq.queues import RETRY_TTL_MS
from aioworker.settling.outcome import Kind, Outcome

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from aioworker.errors import BrokerError
    from aioworker.settling.failure import Failure
    from aioworker.settling.start import Start
    from aioworker.tasks.context import Context

log = logging.getLogger("aioworker.consumer")

_FIELDS = frozenset(
    {
        *("time", "level", "logger", "event", "traceback"),
        *("task", "message_id", "lane", "attempt", "of", "outcome", "reason", "ran"),
        *("wait_seconds", "run_seconds", "age_seconds", "retry_seconds"),
    }
)


LARGEST = 10**18  # of a count; Python refuses to show numbers of thousands of digits


class Report:
    """Tells what a task's deliveries came to.

    Args:
        max_retries: Attempts after the first, before a message becomes a dead letter.
        now: Returns the time of day, UTC.
    """

    def __init__(self, max_retries: int, now: Callable[[], datetime]) -> None:
        self._now = now
        self._attempts = max_retries + 1
        self._idle_since = time.monotonic()
        self._tracebacks = Seldom()

    def settled(self, start: Start) -> None:
        """Log the one line of a settled delivery.

        It carries the traceback of what failed in a task's own code: once a minute for each
        kind of failure, and always at the level debug.
        """
        values, result = self._values(start), start.outcome
        if start.again:
            values["ran"] = "before"
        if result.reason:
            values["reason"] = line(result.reason)
        if result.kind in (Kind.RETRY, Kind.POSTPONED):
            values["of"] = result.attempts or self._attempts
            values["retry_seconds"] = RETRY_TTL_MS / 1000
        values["outcome"] = str(result.kind)
        phrase, level = _phrase(result)
        failure = result.failure
        error = None if failure is None else failure.error
        try:
            info = None
            if failure is not None and error is not None and self._is_shown(start, failure, level):
                info = (type(error), error, traceback_of(error))
            log.log(level, phrase, exc_info=info, extra=fields(**values))
        finally:
            let_go(error)

    def unsettled(self, start: Start, error: BrokerError) -> None:
        """Log that a delivery could not be settled, and why: RabbitMQ delivers it again."""
        reason = str(error)
        if start.outcome.reason:
            reason += f"; it came to: {start.outcome.reason}"
        log.warning("not settled", extra=fields(**self._values(start), reason=line(reason)))

    def _values(self, start: Start) -> dict[str, Any]:
        began, ended = start.began or start.taken, start.ended or time.monotonic()
        waited, self._idle_since = max(began - self._idle_since, 0.0), ended
        values = {
            "task": start.ctx.task,
            "message_id": start.ctx.message_id,
            "lane": start.delivery.lane,
            "attempt": start.ctx.attempt,
            **_counts(start.ctx),
            "wait_seconds": waited,
            "run_seconds": ended - began,
        }
        if (published := start.delivery.published) is not None:
            # By two clocks: the publisher's may be ahead.
            values["age_seconds"] = max((self._now() - published).total_seconds(), 0.0)
        return values

    def _is_shown(self, start: Start, failure: Failure, level: int) -> bool:
        """Whether the traceback is, of a failure that has one."""
        if start.outcome.away is not None or not log.isEnabledFor(level):
            return False
        new = self._tracebacks.allows((start.ctx.task, failure.fingerprint))
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
        case Kind.RELEASED | Kind.RETRY | Kind.POSTPONED:  # all: mypy misses a new one here
            return "chunk failed", logging.WARNING


def _counts(ctx: Context) -> dict[str, Any]:
    """Return what a task counted, as plain values: its keys and numbers may be any objects."""
    try:
        return {_counted(name): _plain(value) for name, value in list(ctx.counts.items())}
    except BaseException as error:  # noqa: BLE001 - of a user's code, run by looking at it
        return {"counts": f"cannot be told: their own code raises {name_of(error)}"}


def _counted(name: object) -> str:
    """Return what a task's count is called in the log line: it may not take a name of ours."""
    plain = str(_plain(name))
    return f"counts.{plain}" if plain in _FIELDS else plain


def _plain(value: object) -> str | int | float | None:
    if value is None or type(value) in (str, int, float, bool):
        found: str | int | float | None = value  # type: ignore[assignment]  # one of these
        return found if type(value) is not int or abs(value) < LARGEST else brief(value)
    return brief(value)
