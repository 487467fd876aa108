"""The kinds of reasons: what each means for whoever waits."""

from __future__ import annotations

import re
from logging import DEBUG, ERROR, INFO, WARNING
from pathlib import Path
from typing import NamedTuple

import pytest

from aioworker.errors import (
    BrokerError,
    DatabaseError,
    QueueMissingError,
    TurnLostError,
)
from aioworker.mysql.errors import ER, MySQLError
from aioworker.reasons import Reason, ReasonKind, State
from aioworker.status.presence import kind_of

OPERATIONS = Path(__file__).parents[2] / "docs/operations.md"
KIND_LENGTH = 40  # of the column


class Meaning(NamedTuple):
    """What a kind says of itself."""

    level: int
    state: State
    traits: str = ""


WAITS, STALLS = State.WAITING, State.STALLED
MEANINGS = {
    ReasonKind.STARTING: Meaning(DEBUG, State.STARTING, "steady"),
    ReasonKind.RUNNING: Meaning(DEBUG, State.RUNNING, "steady"),
    ReasonKind.EMPTY: Meaning(INFO, WAITS, "steady ends_burst"),
    ReasonKind.BUDGET: Meaning(INFO, WAITS, "steady routine timed"),
    ReasonKind.FIRST_WRITE: Meaning(DEBUG, WAITS, "steady routine timed"),
    ReasonKind.GATHERING: Meaning(DEBUG, WAITS, "steady routine timed"),
    ReasonKind.TURN: Meaning(INFO, WAITS, "steady routine"),
    ReasonKind.TURN_UNOWNED: Meaning(INFO, WAITS, "steady routine"),
    ReasonKind.PAUSED: Meaning(INFO, WAITS, "ends_burst fails_burst"),
    ReasonKind.OTHER_BUDGET: Meaning(WARNING, WAITS, "ends_burst fails_burst"),
    ReasonKind.BREAKER: Meaning(ERROR, STALLS, "red ends_burst"),
    ReasonKind.TWO_SERVERS: Meaning(ERROR, STALLS, "red ends_burst fails_burst"),
    ReasonKind.STALLED: Meaning(ERROR, STALLS, "red ends_burst fails_burst"),
    ReasonKind.RUN_HANGS: Meaning(ERROR, STALLS, "red"),
    ReasonKind.BROKER_UNREACHABLE: Meaning(WARNING, WAITS, "ends_burst"),
    ReasonKind.BROKER_REFUSES: Meaning(ERROR, WAITS, "ends_burst"),
    ReasonKind.COPY_NOT_CONFIRMED: Meaning(WARNING, WAITS, "ends_burst"),
    ReasonKind.DATABASE_UNREACHABLE: Meaning(WARNING, WAITS, "ends_burst"),
    ReasonKind.DATABASE_REFUSES: Meaning(ERROR, WAITS, "ends_burst"),
    ReasonKind.CONTENTION: Meaning(ERROR, WAITS, "ends_burst"),
    ReasonKind.TURN_LOST: Meaning(ERROR, WAITS, "ends_burst"),
    ReasonKind.NO_WORKER: Meaning(ERROR, STALLS, "red"),
    ReasonKind.DUE: Meaning(INFO, WAITS),
    ReasonKind.UNKNOWN: Meaning(INFO, WAITS, "steady"),
}


@pytest.mark.parametrize("kind", ReasonKind)
def test_each_kind_says_what_it_means(kind: ReasonKind) -> None:
    """Its line's level, what `health` makes of it, whether a burst waits for it."""
    traits = [
        name
        for name in ("steady", "routine", "timed", "red", "ends_burst", "fails_burst")
        if getattr(kind, name)
    ]

    assert Meaning(kind.level, kind.state, " ".join(traits)) == MEANINGS[kind]


@pytest.mark.parametrize("kind", ReasonKind)
def test_each_kind_is_a_word_for_programs(kind: ReasonKind) -> None:
    """Such as the label of a metric; it fits into its column, and the documents tell it."""
    assert re.fullmatch(r"[a-z]+(_[a-z]+)*", kind)
    assert len(kind) <= KIND_LENGTH
    assert f"`{kind}`" in OPERATIONS.read_text()
    assert ReasonKind.of(str(kind)) is kind


@pytest.mark.parametrize("text", [None, "", "not_yet_known"], ids=["earlier", "nothing", "later"])
def test_a_kind_of_another_version_is_unknown(text: str | None) -> None:
    """Workers of several versions write into one table."""
    assert ReasonKind.of(text) is ReasonKind.UNKNOWN


def test_a_reason_is_its_words() -> None:
    assert str(Reason(ReasonKind.EMPTY, "nothing queued")) == "nothing queued"


def caused(number: int) -> DatabaseError:
    """Return an error that the server's number made, as `explain` does."""
    error = DatabaseError("cannot use MySQL")
    error.__cause__ = MySQLError(number, "words")
    return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (BrokerError("gone", unreachable=True), ReasonKind.BROKER_UNREACHABLE),
        (BrokerError("refused"), ReasonKind.BROKER_REFUSES),
        (QueueMissingError("missing"), ReasonKind.BROKER_REFUSES),
        (DatabaseError("gone", unreachable=True), ReasonKind.DATABASE_UNREACHABLE),
        (DatabaseError("no row"), ReasonKind.DATABASE_REFUSES),
        (caused(ER.NO_SUCH_TABLE), ReasonKind.DATABASE_REFUSES),
        (caused(ER.LOCK_WAIT_TIMEOUT), ReasonKind.CONTENTION),
        (TurnLostError("lost"), ReasonKind.TURN_LOST),
    ],
    ids=lambda one: str(one) if isinstance(one, ReasonKind) else None,
)
def test_each_error_of_a_server_is_one_kind(
    error: BrokerError | DatabaseError, kind: ReasonKind
) -> None:
    assert kind_of(error) is kind
