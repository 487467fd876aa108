"""Rates and pauses of a task and of the budget that it shares, set while the workers run.

Either level holds by itself: by the rows that starts wrote, and by what is told of a wait.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from aioworker.budget import tables
from support import servers
from tests.conftest import Run, Worker, eventually, execute, rows
from tests.several import (
    BUDGET,
    Several,
    assert_never_two_at_once,
    full,
    gaps,
    of,
    stop,
)

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

TASKS = {"a": "budget=writes", "b": "budget=writes", "o": 'rate_limit="4/s"'}
SERVED = ("ab", "bo", "ao")  # by each worker
LEAST_GAP = 0.98
MANY = 150  # more messages than run while a test lasts
OWN, OTHERS = full("a"), full("b")
# As if the time of one row had come: what was set in it was set three hours earlier.
ENDED = "UPDATE aioworker_budget SET " + ", ".join(
    f"{column} = {column} - INTERVAL 3 HOUR"
    for setting in ("paused", "set")
    for column in (f"{setting}_at", f"{setting}_until", f"{setting}_until_of")
)


@pytest.fixture
def several(private: servers.Servers, tmp_path: Path) -> Iterator[Several]:
    made = Several(private, tmp_path, TASKS, "4/s")
    yield made
    made.place.end()


def workers(several: Several) -> list[Worker]:
    return [several.worker(*tasks) for tasks in SERVED]


def end(several: Several, key: str) -> None:
    """Let the time of what is set in one row have come, and wait until a worker has seen it."""
    execute(several.place.shop, f"{ENDED} WHERE task = '{key}'")
    over = f"SELECT 1 FROM aioworker_budget WHERE {tables.PAUSE_OVER} OR {tables.RATE_OVER}"
    eventually(lambda: not rows(several.place.shop, over), "a worker has cleared it")


def assert_kept(
    several: Several, *, least: float, least_own: float, faster: float | None = None
) -> None:
    """From now on starts are so far apart, and those of the task with a rate of its own.

    Args:
        several: Where.
        least: Seconds between any two.
        least_own: Seconds between two of that task.
        faster: Some have to be less far apart: the rate went up.
    """
    since = several.now()
    eventually(
        lambda: all(len(of(several.starts(since), task)) >= 4 for task in "ab"), "both tasks run"
    )
    starts = of(several.starts(since), "ab")
    assert_never_two_at_once(starts)
    assert min(gaps(starts)) >= LEAST_GAP * least, starts
    assert min(gaps(of(starts, "a"))) >= LEAST_GAP * least_own, starts
    assert faster is None or min(gaps(starts)) < faster, starts


@pytest.mark.timeout(300)
def test_the_lower_rate_of_both_levels_holds(several: Several) -> None:
    """Whichever was set first, over restarts of all workers, and when one of them ends."""
    for task in "ab":
        several.publish(task, MANY)
    alive = workers(several)
    assert_kept(several, least=0.25, least_own=0.25)

    several.say("rate-limit", "--budget", "writes", "2/s")
    assert_kept(several, least=0.5, least_own=0.5)
    several.say("rate-limit", OWN, "1/s")
    assert_kept(several, least=0.5, least_own=1)
    several.say("rate-limit", "--budget", "writes", "10/s", "--for", "2h")
    assert_kept(several, least=0.1, least_own=1, faster=0.4)

    stop(alive)
    alive = workers(several)
    assert_kept(several, least=0.1, least_own=1, faster=0.4)

    several.say("rate-limit", OWN, "20/s", "--for", "1h")
    assert_kept(several, least=0.1, least_own=0.1)
    shared = several.row(BUDGET)
    end(several, OWN)
    assert (several.row(OWN)["set_by"], several.row(OWN)["gap_us"]) == ("end", 1_000_000)
    assert several.row(BUDGET) == shared
    assert_kept(several, least=0.1, least_own=1, faster=0.4)

    own = several.row(OWN)
    end(several, BUDGET)
    assert (several.row(BUDGET)["set_by"], several.row(BUDGET)["gap_us"]) == ("end", 500_000)
    assert several.row(OWN) == own
    assert_kept(several, least=0.5, least_own=1)

    stop(alive)
    told = several.place.audit()
    assert all(told[key]["kept"] for key in (OWN, OTHERS, BUDGET)), told


def test_a_pause_holds_its_own_level_and_resume_ends_no_other(several: Several) -> None:
    """It outlives the workers as well."""
    alive = workers(several)
    eventually(lambda: all(several.waits(task, "nothing queued") for task in TASKS), "all idle")

    several.say("pause", "--budget", "writes", "--reason", "copy")
    for task in TASKS:
        several.publish(task, 2)
    held = "budget writes: paused by "
    eventually(lambda: all(several.waits(task, held) for task in "ab"), "both are held")
    eventually(lambda: len(several.starts()) == 2, "the task outside runs")
    assert [one.task for one in several.starts()] == ["o", "o"]

    several.say("pause", OWN, "--reason", "mend")
    stop(alive)
    workers(several)
    eventually(lambda: several.waits("a", "paused by ") and several.waits("b", held), "held still")
    for task, said in (("a", "paused by "), ("b", held)):
        told = several.status(task)
        assert told["waits"].startswith(said), told
        assert told["waits_kind"] == "paused"
        assert f"\nwaits      {told['waits']}\n" in several.say("status", full(task))
    assert several.status("b")["waits"].endswith(" UTC: copy")

    shared = several.row(BUDGET)
    several.say("resume", OWN)
    eventually(lambda: several.waits("a", held), "the budget's pause holds it now")
    assert several.row(BUDGET) == shared

    several.say("pause", OWN, "--reason", "mend")
    own = several.row(OWN)
    several.say("resume", "--budget", "writes")
    eventually(lambda: len(several.starts()) == 4, "the other task runs")
    eventually(lambda: several.waits("a", "paused by "), "and its own pause holds this one")
    assert several.row(OWN) == own
    assert [one.task for one in several.starts()] == ["o", "o", "b", "b"]

    several.say("resume", OWN)
    eventually(lambda: several.done() == 6, "all has run")


def test_the_end_of_a_pause_ends_no_other(several: Several) -> None:
    """Each is written down once, however many workers see it."""
    several.say("pause", "--budget", "writes", "--for", "2h")
    several.say("pause", OWN, "--for", "1h")
    workers(several)
    for task in "ab":
        several.publish(task)
    held = "budget writes: paused by "
    eventually(lambda: several.waits("a", "paused by ") and several.waits("b", held), "both held")

    shared = several.row(BUDGET)
    end(several, OWN)
    eventually(lambda: several.waits("a", held), "the budget's pause holds it now")
    assert several.row(BUDGET) == shared
    assert several.starts() == []

    several.say("pause", OWN, "--for", "1h")
    own = several.row(OWN)
    end(several, BUDGET)
    eventually(lambda: [one.task for one in several.starts()] == ["b"], "the other task runs")
    eventually(lambda: several.waits("a", "paused by "), "its own pause holds this one")
    assert several.row(OWN) == own

    end(several, OWN)
    eventually(lambda: several.done() == 2, "all has run")
    noted = "SELECT task, what FROM aioworker_change WHERE who = 'end' ORDER BY id"
    ended = "the pause ended"
    assert rows(several.place.shop, noted) == [(OWN, ended), (BUDGET, ended), (OWN, ended)]


def test_status_names_the_rate_that_is_waited_for_and_who_goes_first(several: Several) -> None:
    several.say("rate-limit", OWN, "1/h")
    several.publish("a", 2)
    workers(several)
    own = r"budget: next start at \d\d:\d\d:\d\d UTC"
    shared = r"budget writes: next start at \d\d:\d\d:\d\d UTC"

    def waits(task: str, words: str) -> bool:
        """Whether both forms of status tell that a task waits for this."""
        told = several.status(task)
        line = re.search(r"^waits +(.*)$", several.say("status", full(task)), re.MULTILINE)
        assert line is not None
        found = (told["waits_kind"], told["waits"], line[1])
        return found[0] == "budget" and all(re.fullmatch(words, one) for one in found[1:])

    eventually(lambda: waits("a", own), "one has run, the other waits for the task's own rate")
    several.publish("b")
    eventually(lambda: several.done() == 2, "the other task waits for nothing")

    several.say("rate-limit", "--budget", "writes", "1/h")
    several.say("rate-limit", OWN, "--reset")
    several.publish("b")
    eventually(lambda: waits("a", shared), "the budget's rate, and nobody goes first")
    eventually(lambda: waits("b", f"{shared}, of {OWN} first"), "its last start is longer ago")

    several.publish("b", urgent=True)
    eventually(lambda: waits("a", f"{shared}, of {OTHERS} first"), "an urgent one goes first")
    eventually(lambda: waits("b", shared), "nobody goes before that")
    assert several.done() == 2


# What is refused.


@pytest.fixture
def sharing(shop: Connection[Cursor]) -> Connection[Cursor]:
    """A database with a task, and a budget that tasks share."""
    execute(shop, tables.FIRST_ROW % {"task": f"'{BUDGET}'"})
    return shop


TASK = "update_current_version"
ONE_OF = "expected a task, --budget or --all, got:"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        *(
            ((*words, TASK, *rest, "--budget", "writes"), f"{ONE_OF} {TASK}, --budget writes")
            for words, rest in (
                (("pause",), ()),
                (("resume",), ()),
                (("rate-limit",), ("2/m",)),
                (("rate-limit", "--reset"), ()),
                (("status",), ()),
                (("audit",), ()),
            )
        ),
        *(
            ((word, "--all", "--budget", "writes"), f"{ONE_OF} --budget writes, --all")
            for word in ("pause", "resume")
        ),
        *(
            ((*words, "--budget", "writes", f"--for={span}"), line)
            for words in (("pause",), ("rate-limit", "2/m"))
            for span, line in (
                ("0s", "expected --for from 1s to 366d, got: '0s'"),
                ("0h", "expected --for from 1s to 366d, got: '0h'"),
                ("367d", "expected --for from 1s to 366d, got: '367d'"),
                ("-1h", "expected --for with a time such as 30m, 2h or 7d, got: '-1h'"),
                ("soon", "expected --for with a time such as 30m, 2h or 7d, got: 'soon'"),
                ("", "expected --for with a time such as 30m, 2h or 7d, got: ''"),
            )
        ),
        (
            ("rate-limit", "--budget", "writes", "--reset", "--for", "2h"),
            "expected --reset or --for, got both: the workers' own rate has no end",
        ),
        (
            ("rate-limit", "--budget", "writes"),
            "expected rate-limit [TASK] RATE, got: nothing",
        ),
        (("resume", "--budget", "wirtes"), "unknown budget 'wirtes': there are: writes"),
        (("pause", "--budget", BUDGET), f"unknown budget '{BUDGET}': there are: writes"),
        (("pause", "--budget", ""), "unknown budget '': there are: writes"),
    ],
    ids=" ".join,
)
def test_a_wrong_control_of_a_budget_is_refused_in_one_line(
    run: Run, sharing: Connection[Cursor], words: tuple[str, ...], line: str
) -> None:
    before = rows(sharing, "SELECT * FROM aioworker_budget")

    refused = run(*words)

    assert (refused.returncode, refused.stdout, refused.stderr) == (2, "", f"aioworker: {line}\n")
    assert rows(sharing, "SELECT * FROM aioworker_budget") == before


def test_a_shorter_pause_of_a_budget_does_not_replace_a_longer_one(
    run: Run, sharing: Connection[Cursor]
) -> None:
    run("pause", "--budget", "writes", "--for", "2h")
    before = rows(sharing, "SELECT * FROM aioworker_budget")

    refused = run("pause", "--budget", "writes", "--for", "1h")

    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.count("\n") == 1
    assert refused.stderr.startswith("aioworker: budget writes: paused by ")
    assert refused.stderr.endswith(": a pause is not replaced by a shorter one\n")
    assert rows(sharing, "SELECT * FROM aioworker_budget") == before
