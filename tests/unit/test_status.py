"""Why a task waits, by what both servers and its workers tell: kinds decide, not words."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from aioworker.budget.tables import Row
from aioworker.commands.status import Limit, Queued, Status, Stored, why
from aioworker.errors import BrokerError, DatabaseError
from aioworker.rabbitmq.queues import Queues
from aioworker.reasons import Reason, ReasonKind
from aioworker.status.read import Worker

NOW = datetime(2026, 11, 29, 12, tzinfo=UTC)
LONG_AGO_US = 3_600_000_000
QUEUES = Queues.of("shop", "aioworker")
SCHEMA = Path(__file__).parents[2] / "docs/status.schema.json"
ROW = Row(
    task="shop",
    paused=False,
    gap_us=None,
    age_us=LONG_AGO_US,
    last_start=NOW,
    same_server=True,
    server="db",
    here="db",
    turn=0,
    session=1,
    starts=1,
    holder="web1:7",
    paused_by=None,
    paused_at=None,
    paused_why=None,
    paused_until=None,
    set_by=None,
    set_at=None,
    set_why=None,
    set_until=None,
    over=False,
    charge_age_us=LONG_AGO_US,
    write_age_us=LONG_AGO_US,
    bulk_next=False,
    runs=False,
    shares=None,
    urgent_starts=0,
    running=[],
    deaths={},
    now=NOW,
)
LIMIT = Limit("shared", "2/m", "task", 30, paused=False, rates_differ=False)
SOME, NONE = Queued(0, 3, 0, 0), Queued(0, 0, 0, 0)
# What a worker says, in words that nobody is to read: each would mislead who did.
WORDS = "budget: broker unreachable"


def worker(kind: ReasonKind, state: str = "waiting") -> Worker:
    """Return a worker that was seen just now."""
    return Worker("web1", 7, "1", "2/m", 5, state, kind, WORDS, NOW, NOW, 1)


def asked(
    *workers: Worker,
    queued: Queued | BrokerError = SOME,
    limit: Limit | DatabaseError = LIMIT,
    pause: str = "",
    row: Row | None = ROW,
    turn: str | None = None,
) -> Reason:
    """Return why the task waits."""
    return why("shop", QUEUES, queued, limit, pause, Stored(row, turn, list(workers), 0.0))


@pytest.mark.parametrize(
    ("told", "kind", "words"),
    [
        (
            {"queued": BrokerError("gone", unreachable=True)},
            ReasonKind.BROKER_UNREACHABLE,
            "broker unreachable: gone",
        ),
        (
            {"limit": DatabaseError("gone", unreachable=True)},
            ReasonKind.DATABASE_UNREACHABLE,
            "database unreachable: gone",
        ),
        ({"limit": DatabaseError("no table")}, ReasonKind.DATABASE_REFUSES, "no table"),
        (
            {"queued": Queued(None, 0, 0, 0), "row": None},
            ReasonKind.BROKER_REFUSES,
            "queue aioworker.shop.urgent does not exist: run `aioworker init`",
        ),
        ({"pause": "paused by alice"}, ReasonKind.PAUSED, "paused by alice"),
        ({"queued": NONE}, ReasonKind.EMPTY, "nothing queued"),
        (
            {"limit": replace(LIMIT, scope="worker"), "row": None},
            ReasonKind.BUDGET,
            "each worker for its own budget",
        ),
        ({}, ReasonKind.NO_WORKER, "no worker is running: start one with `aioworker consume`"),
    ],
)
def test_what_the_servers_tell_decides_first(
    told: dict[str, Any], kind: ReasonKind, words: str
) -> None:
    assert asked(**told) == Reason(kind, words)


@pytest.mark.parametrize(
    ("told", "kind", "words"),
    [
        (
            {"limit": replace(LIMIT, next_start_seconds=17.0)},
            ReasonKind.BUDGET,
            "budget: next start in 17 s",
        ),
        (
            {"limit": replace(LIMIT, turn="web2:8")},
            ReasonKind.TURN,
            "turn: held by web2:8",
        ),
        ({}, ReasonKind.DUE, "a start is due and not begun; web1:7 was last seen 1 s ago"),
    ],
)
def test_what_the_row_tells_of_workers_that_are_well(
    told: dict[str, Any], kind: ReasonKind, words: str
) -> None:
    assert asked(worker(ReasonKind.EMPTY), **told) == Reason(kind, words)


def test_a_worker_that_gathers_in_its_turn_says_so() -> None:
    """It has been given the turn before the next start is due."""
    limit = replace(LIMIT, turn="web1:7", next_start_seconds=17.0)

    assert asked(worker(ReasonKind.GATHERING), limit=limit).kind is ReasonKind.GATHERING
    held = asked(worker(ReasonKind.GATHERING), limit=limit, queued=NONE)
    assert held.kind is ReasonKind.GATHERING, "RabbitMQ calls none of them ready"
    assert asked(worker(ReasonKind.EMPTY), limit=limit).kind is ReasonKind.BUDGET


@pytest.mark.parametrize("kind", ReasonKind)
def test_a_worker_that_fails_says_why(kind: ReasonKind) -> None:
    """One that is well, or of another version, is not taken to fail, whatever its words are."""
    well = {
        *(ReasonKind.STARTING, ReasonKind.RUNNING, ReasonKind.EMPTY, ReasonKind.BUDGET),
        *(
            ReasonKind.FIRST_WRITE,
            ReasonKind.GATHERING,
            ReasonKind.TURN,
            ReasonKind.TURN_UNOWNED,
            ReasonKind.UNKNOWN,
        ),
    }

    found = asked(worker(kind))

    assert found.kind is (ReasonKind.DUE if kind in well else kind)


@pytest.mark.parametrize("kind", [ReasonKind.BREAKER, ReasonKind.TURN, ReasonKind.UNKNOWN])
@pytest.mark.parametrize("queued", [NONE, SOME])
def test_a_worker_that_stands_still_says_why_whatever_is_queued(
    kind: ReasonKind, queued: Queued
) -> None:
    assert asked(worker(kind, "stalled"), queued=queued) == Reason(kind, WORDS)


@pytest.mark.parametrize("kind", [ReasonKind.BROKER_UNREACHABLE, ReasonKind.EMPTY])
def test_a_worker_knows_since_when_the_broker_is_away(kind: ReasonKind) -> None:
    away = BrokerError("gone", unreachable=True)

    found = asked(worker(kind), queued=away)

    theirs = kind is ReasonKind.BROKER_UNREACHABLE
    words = WORDS if theirs else "broker unreachable: gone"
    assert found == Reason(ReasonKind.BROKER_UNREACHABLE, words)


@pytest.mark.parametrize("kind", [ReasonKind.BUDGET, ReasonKind.FIRST_WRITE, ReasonKind.TURN])
def test_a_worker_that_waits_for_its_first_write_is_believed(kind: ReasonKind) -> None:
    """Until an interval has passed since the last one: how much sooner it may start it knows."""
    recent = ROW._replace(write_age_us=20_000_000)

    found = asked(worker(kind), row=recent)

    assert found.kind is (ReasonKind.DUE if kind is ReasonKind.TURN else kind)
    assert asked(worker(kind)).kind is ReasonKind.DUE


def test_a_worker_that_runs_in_its_turn_runs() -> None:
    limit = replace(LIMIT, turn="web1:7")

    found = asked(worker(ReasonKind.RUNNING, "running"), limit=limit, turn="web1:7")

    assert found == Reason(ReasonKind.RUNNING, f"running: {WORDS}")


def test_a_row_tells_who_paused_it_while_it_is_paused() -> None:
    """Who ended a pause stands in the same columns."""
    told = ROW._replace(paused_by="alice", paused_at=NOW, paused_why="lag")

    assert told.pause == ""
    assert told._replace(paused=True).pause == "paused by alice since 2026-11-29 12:00:00 UTC: lag"


def test_the_schema_in_the_docs_is_the_codes() -> None:
    assert json.loads(SCHEMA.read_text()) == TypeAdapter(Status).json_schema()
