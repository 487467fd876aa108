"""The log line of a settled delivery, and now and then the traceback of what failed in it."""

from __future__ import annotations

import logging
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from aioworker.errors import let_go, name_of, traceback_of
from aioworker.logs import Seldom, fields
from aioworker.rabbitmq.headers import line
from aioworker.rabbitmq.message import brief
from aioworker.rabbitmq.queues import RETRY_TTL_MS
from aioworker.settling.outcome import Kind, Outcome
from aioworker.tasks.chunk import id_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from datetime import datetime

    from aioworker.errors import BrokerError
    from aioworker.settling.start import Held, Start
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
        task: The task's name.
    """

    def __init__(self, max_retries: int, now: Callable[[], datetime], task: str) -> None:
        self._task = task
        self._now = now
        self._attempts = max_retries + 1
        self._idle_since = time.monotonic()
        self._tracebacks = Seldom()

    def settled(self, start: Start, held: Sequence[Held]) -> None:
        """Log what messages came to that were settled together.

        One message has one line. Several have one for all of them, and at the level debug one
        each; those that became dead letters always have their own.
        """
        if not held:
            return
        times = self._times(start, held)
        if len(held) > 1:
            self._settled_together(start, held, times)
        for one in held:
            phrase, level = _phrase(one.outcome)
            if len(held) > 1 and one.outcome.kind is not Kind.DEAD_LETTER:
                level = logging.DEBUG
            if log.isEnabledFor(level):
                self._log(start, one, self._values(start, one, times), phrase, level)
            elif one.outcome.failure is not None:
                let_go(one.outcome.failure.error)

    def unsettled(self, start: Start, one: Held, error: BrokerError) -> None:
        """Log that a delivery could not be settled, and why: RabbitMQ delivers it again."""
        reason = str(error)
        if one.outcome.reason:
            reason += f"; it came to: {one.outcome.reason}"
        values = self._values(start, one, self._times(start, [one]))
        log.warning("not settled", extra=fields(**values, reason=line(reason)))

    def _settled_together(
        self, start: Start, held: Sequence[Held], times: dict[str, float]
    ) -> None:
        ran = held[0] in start.runs
        urgent = sum(one.delivery.lane == "urgent" for one in held)
        ages = [age for one in held if (age := self._age(one)) is not None]
        # Of a run some messages may be refused for their rows: the others say how it went.
        other = next((one for one in held if one.outcome.kind is not Kind.DEAD_LETTER), held[0])
        values: dict[str, Any] = {
            "task": self._task,
            "messages": len(held),
            "urgent": urgent,
            "bulk": len(held) - urgent,
            "needed": len(start.rows) if ran else 0,
        }
        if start.ctx is not None:
            values |= _counts(start.ctx, values)
        values["ids"] = sum(one.ids for one in held)
        values |= times
        if ages:
            values["age_seconds"] = max(ages)
        phrase, level = _phrase_together(other.outcome, ran=ran)
        self._log(start, other, values, phrase, level)

    def _log(
        self,
        start: Start,
        one: Held,
        values: dict[str, Any],
        phrase: str,
        level: int,
    ) -> None:
        """Log a line with what a message came to.

        It carries the traceback of what failed in a task's own code: once a minute for each
        kind of failure, and always at the level debug.
        """
        result, failure = one.outcome, one.outcome.failure
        if one.again:
            values["ran"] = "before"
        if result.reason:
            values["reason"] = line(result.reason)
        if result.kind in (Kind.RETRY, Kind.POSTPONED):
            values["of"] = result.attempts or self._attempts
            values["retry_seconds"] = RETRY_TTL_MS / 1000
        values["outcome"] = str(result.kind)
        error = None if failure is None else failure.error
        try:
            info = None
            if failure is not None and error is not None and self._is_shown(start, one, level):
                info = (type(error), error, traceback_of(error))
            log.log(level, phrase, exc_info=info, extra=fields(**values))
        finally:
            let_go(error)

    def _values(self, start: Start, one: Held, times: dict[str, float]) -> dict[str, Any]:
        values = {
            "task": self._task,
            "message_id": one.delivery.id,
            "lane": one.delivery.lane,
            "attempt": one.delivery.attempt,
            **_counts(one.ctx),
            **_changed(start, one),
            **times,
        }
        if (age := self._age(one)) is not None:
            values["age_seconds"] = age
        return values

    def _times(self, start: Start, held: Sequence[Held]) -> dict[str, float]:
        began = held[0].taken
        if held[0] in start.runs:
            began = start.began or began
        ended = start.ended if start.ended >= began else time.monotonic()
        waited, self._idle_since = max(began - self._idle_since, 0.0), ended
        return {"wait_seconds": waited, "run_seconds": ended - began}

    def _age(self, one: Held) -> float | None:
        """Return how long ago a message was published, in seconds."""
        if (published := one.delivery.published) is None:
            return None
        # By two clocks: the publisher's may be ahead.
        return max((self._now() - published).total_seconds(), 0.0)

    def _is_shown(self, start: Start, one: Held, level: int) -> bool:
        """Whether the traceback is, of a failure that has one."""
        failure = one.outcome.failure
        if failure is None or one.outcome.away is not None or not log.isEnabledFor(level):
            return False
        new = self._tracebacks.allows((self._task, failure.fingerprint))
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
        case Kind.MOVED if not result.failed:
            return "chunk moved", logging.INFO
        case Kind.RELEASED | Kind.RETRY | Kind.POSTPONED | Kind.MOVED:  # all: mypy misses a new one
            return "chunk failed", logging.WARNING


def _phrase_together(result: Outcome, *, ran: bool) -> tuple[str, int]:
    if result.kind is Kind.ACK and result.reason:
        return "chunks expired", logging.WARNING
    if result.kind is Kind.ACK:
        return "start done" if ran else "nothing to write", logging.INFO
    if result.failed:
        return "start failed", logging.WARNING
    return "chunks given back", logging.INFO


def _changed(start: Start, one: Held) -> dict[str, int]:
    """Return how many rows of one message of several were changed; its ids may be any objects."""
    if len(start.runs) < 2 or one not in start.runs or start.ctx is None:
        return {}
    changed = start.ctx.changed_ids
    try:
        return {"changed": sum(id_of(entry) in changed for entry in one.args[0])} if changed else {}
    except BaseException:  # noqa: BLE001 - of a user's code, run by looking at it
        return {}


def counted(ctx: Context) -> Counter[str]:
    """Return what a task counted beside its ids, as far as it is whole numbers."""
    try:
        return Counter(
            {
                name: value
                for name, value in list(ctx.counts.items())
                if type(name) is str and type(value) is int and name != "ids"
            }
        )
    except BaseException:  # noqa: BLE001 - of a user's code, run by looking at it
        return Counter()


def _counts(ctx: Context, taken: Collection[str] = ()) -> dict[str, Any]:
    """Return what a task counted, as plain values: its keys and numbers may be any objects.

    Args:
        ctx: The run's context.
        taken: Names that its line has for something else.
    """
    try:
        return {_counted(name, taken): _plain(value) for name, value in list(ctx.counts.items())}
    except BaseException as error:  # noqa: BLE001 - of a user's code, run by looking at it
        return {"counts": f"cannot be told: their own code raises {name_of(error)}"}


def _counted(name: object, taken: Collection[str]) -> str:
    """Return what a task's count is called in the log line: it may not take a name of ours."""
    plain = str(_plain(name))
    return f"counts.{plain}" if plain in _FIELDS or plain in taken else plain


def _plain(value: object) -> str | int | float | None:
    if value is None or type(value) in (str, int, float, bool):
        found: str | int | float | None = value  # type: ignore[assignment]  # one of these
        return found if type(value) is not int or abs(value) < LARGEST else brief(value)
    return brief(value)
