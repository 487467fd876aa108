"""The log line of a settled delivery, and now and then the traceback of what failed in it."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aioworker.errors import let_go, name_of, traceback_of
from aioworker.logs import Seldom, fields
from aioworker.rabbitmq.headers import line
from aioworker.rabbitmq.message import brief
from aioworker.rabbitmq.queues import RETRY_TTL_MS
from aioworker.settling.outcome import Kind, Outcome

if TYPE_CHECKING:
    from aioworker.errors import BrokerError
    from aioworker.rabbitmq.delivery import Delivery
    from aioworker.tasks.context import Context

log = logging.getLogger("aioworker.consumer")

_FIELDS = frozenset(
    {
        *("time", "level", "logger", "event", "traceback"),
        *("task", "message_id", "lane", "attempt", "of", "outcome", "reason", "ran"),
        *("wait_seconds", "run_seconds", "retry_seconds"),
    }
)


LARGEST = 10**18  # of a count; Python refuses to show numbers of thousands of digits


@dataclass(slots=True)
class Times:
    """When a delivery went how far, by the monotonic clock.

    Args:
        taken: When it was taken.
        began: When its run began; 0 for never.
        ended: When that ended; 0 for not yet.
        cut_off: Whether that was because its time was up.
    """

    taken: float
    began: float = 0.0
    ended: float = 0.0
    cut_off: bool = False


class Report:
    """Tells what a task's deliveries came to.

    Args:
        max_retries: Attempts after the first, before a message becomes a dead letter.
    """

    def __init__(self, max_retries: int) -> None:
        self._attempts = max_retries + 1
        self._idle_since = time.monotonic()
        self._tracebacks = Seldom()

    def settled(
        self,
        delivery: Delivery,
        ctx: Context,
        result: Outcome,
        times: Times,
        *,
        again: bool = False,
    ) -> None:
        """Log the one line of a settled delivery.

        It carries the traceback of what failed in a task's own code: once a minute for each
        kind of failure, and always at the level debug.

        Args:
            delivery: What was served.
            ctx: What its run got.
            result: What it came to.
            times: When.
            again: Whether its run had ended before, and could not be settled then.
        """
        values = self._values(delivery, ctx, times)
        if again:
            values["ran"] = "before"
        if result.reason:
            values["reason"] = line(result.reason)
        if result.kind in (Kind.RETRY, Kind.POSTPONED):
            values["of"] = result.attempts or self._attempts
            values["retry_seconds"] = RETRY_TTL_MS / 1000
        values["outcome"] = str(result.kind)
        phrase, level = _phrase(result)
        error = result.failure.error if result.failure is not None else None
        try:
            info = None
            if error is not None and self._shows_traceback(result, ctx.task, level):
                info = (type(error), error, traceback_of(error))
            log.log(level, phrase, exc_info=info, extra=fields(**values))
        finally:
            let_go(error)

    def unsettled(
        self,
        delivery: Delivery,
        ctx: Context,
        error: BrokerError,
        result: Outcome | None,
        times: Times,
    ) -> None:
        """Log that a delivery could not be settled, and why: RabbitMQ delivers it again."""
        values = self._values(delivery, ctx, times)
        reason = str(error)
        if result is not None and result.reason:
            reason += f"; it came to: {result.reason}"
        log.warning("not settled", extra=fields(**values, reason=line(reason)))

    def _values(self, delivery: Delivery, ctx: Context, times: Times) -> dict[str, Any]:
        began, ended = times.began or times.taken, times.ended or time.monotonic()
        waited, self._idle_since = max(began - self._idle_since, 0.0), ended
        return {
            "task": ctx.task,
            "message_id": ctx.message_id,
            "lane": delivery.lane,
            "attempt": ctx.attempt,
            **_counts(ctx),
            "wait_seconds": waited,
            "run_seconds": ended - began,
        }

    def _shows_traceback(self, result: Outcome, task: str, level: int) -> bool:
        failure = result.failure
        if failure is None or result.away is not None or not log.isEnabledFor(level):
            return False
        new = failure.error is not None and self._tracebacks.allows((task, failure.kind))
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
