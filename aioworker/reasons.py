"""The reason of a wait: one of a closed set of kinds, and the words for a person.

A program goes by the kind: what the log, `aioworker_worker` and `aioworker status --json` give
beside the words. Nothing reads the words again.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Flag, StrEnum, auto
from logging import DEBUG, ERROR, INFO, WARNING


class State(StrEnum):
    """What a worker does, in a word."""

    STARTING = "starting"
    RUNNING = "running"
    WAITING = "waiting"
    STALLED = "stalled"  # it waits, and somebody is needed


class _Trait(Flag):
    NONE = 0
    STEADY = auto()
    ROUTINE = auto()
    TIMED = auto()
    RED = auto()
    ENDS_BURST = auto()


# Short names for the table below.
_STEADY, _ROUTINE, _TIMED = _Trait.STEADY, _Trait.ROUTINE, _Trait.TIMED
_RED, _ENDS_BURST = _Trait.RED, _Trait.ENDS_BURST


class ReasonKind(StrEnum):
    """Why a worker, or a task, waits; or that it does not.

    Each has the level of its log line, and what it means for whoever waits.
    """

    STARTING = "starting", DEBUG, _STEADY
    RUNNING = "running", DEBUG, _STEADY
    EMPTY = "empty", INFO, _STEADY | _ENDS_BURST
    BUDGET = "budget", INFO, _STEADY | _ROUTINE | _TIMED
    FIRST_WRITE = "first_write", DEBUG, _STEADY | _ROUTINE | _TIMED
    TURN = "turn", INFO, _STEADY | _ROUTINE
    TURN_UNOWNED = "turn_unowned", INFO, _STEADY | _ROUTINE  # it is no live worker's
    PAUSED = "paused", INFO, _ENDS_BURST
    BREAKER = "breaker", ERROR, _RED | _ENDS_BURST
    TWO_SERVERS = "two_servers", ERROR, _RED | _ENDS_BURST  # both write the budget's row
    STALLED = "stalled", ERROR, _RED | _ENDS_BURST  # a start is due, and nothing starts
    RUN_HANGS = "run_hangs", ERROR, _RED  # its time is up, and its thread does not return
    BROKER_UNREACHABLE = "broker_unreachable", WARNING, _ENDS_BURST
    BROKER_REFUSES = "broker_refuses", ERROR, _ENDS_BURST  # a queue, the login, a right
    COPY_NOT_CONFIRMED = "copy_not_confirmed", WARNING, _ENDS_BURST
    DATABASE_UNREACHABLE = "database_unreachable", WARNING, _ENDS_BURST
    DATABASE_REFUSES = "database_refuses", ERROR, _ENDS_BURST  # a table, a row, a right
    CONTENTION = "contention", ERROR, _ENDS_BURST  # somebody else holds a lock for too long
    TURN_LOST = "turn_lost", ERROR, _ENDS_BURST
    NO_WORKER = "no_worker", ERROR, _RED  # this one and the next two are `status`'s own
    DUE = "due", INFO, _Trait.NONE
    UNKNOWN = "unknown", INFO, _STEADY  # nothing is known to be wrong

    level: int
    _traits: _Trait

    def __new__(cls, value: str, level: int, traits: _Trait) -> ReasonKind:
        """Make one of the rows below."""
        kind = str.__new__(cls, value)
        kind._value_ = value
        kind.level = level
        kind._traits = traits
        return kind

    @classmethod
    def of(cls, text: str | None) -> ReasonKind:
        """Return the kind that a worker has written into its row.

        A worker of an earlier version writes none (NULL), one of a later version perhaps a kind
        that this one does not know: both are `UNKNOWN`.
        """
        return next((kind for kind in cls if kind == text), cls.UNKNOWN)

    @property
    def state(self) -> State:
        """The state of a worker that gives it."""
        if self is ReasonKind.STARTING:
            return State.STARTING
        if self is ReasonKind.RUNNING:
            return State.RUNNING
        return State.STALLED if self.red else State.WAITING

    @property
    def steady(self) -> bool:
        """Whether it is nothing to worry about."""
        return _STEADY in self._traits

    @property
    def routine(self) -> bool:
        """Whether it comes with each start: it is not logged again and again."""
        return _ROUTINE in self._traits

    @property
    def timed(self) -> bool:
        """Whether it ends by itself at a moment that is known."""
        return _TIMED in self._traits

    @property
    def red(self) -> bool:
        """Whether somebody is needed: `aioworker health` exits 1."""
        return _RED in self._traits

    @property
    def ends_burst(self) -> bool:
        """Whether a burst ends with it, and does not wait."""
        return _ENDS_BURST in self._traits


@dataclass(frozen=True, slots=True)
class Reason:
    """Why something waits, or what it does.

    Args:
        kind: What a program goes by.
        words: What a person reads, in one line, with names, moments and numbers.
    """

    kind: ReasonKind
    words: str

    def __str__(self) -> str:
        return self.words
