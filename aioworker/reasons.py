"""The reason of a wait: one of a closed set of kinds, and the words for a person.

A program goes by the kind: what the log, `aioworker_worker` and `aioworker status --json` give
beside the words. Nothing reads the words again.
"""

from __future__ import annotations

from enum import StrEnum
from logging import DEBUG, ERROR, INFO, WARNING
from typing import NamedTuple


class State(StrEnum):
    """What a worker does, in a word."""

    STARTING = "starting"
    RUNNING = "running"
    WAITING = "waiting"
    STALLED = "stalled"  # it waits, and somebody is needed


class ReasonKind(StrEnum):
    """Why a worker, or a task, waits; or that it does not.

    Each has the level of its log line, and which of the attributes below hold.

    Attributes:
        level: The level of its log line.
        steady: Whether it is nothing to worry about.
        routine: Whether it comes with each start: it is not logged again and again.
        timed: Whether it ends by itself at a moment that is known.
        red: Whether somebody is needed: `aioworker health` exits 1.
        ends_burst: Whether a burst ends with it, and does not wait.
        fails_burst: Whether that burst exits 1.
    """

    STARTING = "starting", DEBUG, "steady"
    RUNNING = "running", DEBUG, "steady"
    EMPTY = "empty", INFO, "steady", "ends_burst"
    BUDGET = "budget", INFO, "steady", "routine", "timed"
    FIRST_WRITE = "first_write", DEBUG, "steady", "routine", "timed"
    GATHERING = "gathering", DEBUG, "steady", "routine", "timed"  # messages for the next start
    TURN = "turn", INFO, "steady", "routine"
    TURN_UNOWNED = "turn_unowned", INFO, "steady", "routine"  # it is no live worker's
    PAUSED = "paused", INFO, "ends_burst", "fails_burst"
    OTHER_BUDGET = "other_budget", WARNING, "ends_burst", "fails_burst"  # until old code ends
    BREAKER = "breaker", ERROR, "red", "ends_burst"
    TWO_SERVERS = (
        "two_servers",
        ERROR,
        "red",
        "ends_burst",
        "fails_burst",
    )  # both write the budget's row
    STALLED = (
        "stalled",
        ERROR,
        "red",
        "ends_burst",
        "fails_burst",
    )  # a start is due, and nothing starts
    RUN_HANGS = "run_hangs", ERROR, "red"  # its time is up, and its thread does not return
    BROKER_UNREACHABLE = "broker_unreachable", WARNING, "ends_burst"
    BROKER_REFUSES = "broker_refuses", ERROR, "ends_burst"  # a queue, the login, a right
    COPY_NOT_CONFIRMED = "copy_not_confirmed", WARNING, "ends_burst"
    DATABASE_UNREACHABLE = "database_unreachable", WARNING, "ends_burst"
    DATABASE_REFUSES = "database_refuses", ERROR, "ends_burst"  # a table, a row, a right
    CONTENTION = "contention", ERROR, "ends_burst"  # somebody else holds a lock for too long
    TURN_LOST = "turn_lost", ERROR, "ends_burst"
    NO_WORKER = "no_worker", ERROR, "red"  # this one and the next two are `status`'s own
    DUE = "due", INFO
    UNKNOWN = "unknown", INFO, "steady"  # nothing is known to be wrong

    level: int
    steady: bool
    routine: bool
    timed: bool
    red: bool
    ends_burst: bool
    fails_burst: bool

    def __new__(cls, value: str, level: int, *traits: str) -> ReasonKind:
        """Make one of the rows above."""
        kind = str.__new__(cls, value)
        kind._value_ = value
        kind.level = level
        kind.steady = "steady" in traits
        kind.routine = "routine" in traits
        kind.timed = "timed" in traits
        kind.red = "red" in traits
        kind.ends_burst = "ends_burst" in traits
        kind.fails_burst = "fails_burst" in traits
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


class Reason(NamedTuple):
    """Why something waits, or what it does.

    Args:
        kind: What a program goes by.
        words: What a person reads, in one line, with names, moments and numbers.
    """

    kind: ReasonKind
    words: str

    def __str__(self) -> str:
        return self.words
