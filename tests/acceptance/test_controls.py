"""What an operator turns while the workers run: it acts on all, and outlives them."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from aioworker.budget import schema
from tests.conftest import (
    Lanes,
    Run,
    Worker,
    database_name,
    eventually,
    execute,
    rows,
    simple_addons,
    summary,
)

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

    from support.servers import Servers

Start = Callable[..., Worker]


@pytest.fixture
def pair_of_workers(start: Start) -> Callable[[], list[Worker]]:
    """Start two workers at one start an hour."""
    return lambda: [start("consume", "--rate-limit", "1/h") for _ in range(2)]


async def chunk(lanes: Lanes, addon: int) -> None:
    await lanes.send(json.dumps([[[addon]], {}, None]).encode())


def done(shop: Connection[Cursor]) -> list[int]:
    """Return the add-ons that are right."""
    statement = "SELECT id FROM addons WHERE current_version IS NOT NULL ORDER BY id"
    return [addon for [addon] in rows(shop, statement)]


def told(shop: Connection[Cursor], words: str) -> bool:
    """Whether both workers say that they wait for this."""
    found = rows(shop, "SELECT reason FROM aioworker_worker")
    return len(found) == 2 and all(reason.startswith(words) for [reason] in found)


def status(run: Run) -> Any:
    return json.loads(run("status", "--json").stdout)


def stop(workers: list[Worker]) -> None:
    for worker in workers:
        worker.process.send_signal(signal.SIGTERM)
    assert [worker.process.wait(30) for worker in workers] == [0, 0]


async def test_a_rate_acts_on_all_workers_and_outlives_them(
    run: Run,
    shop: Connection[Cursor],
    lanes: Lanes,
    pair_of_workers: Callable[[], list[Worker]],
) -> None:
    simple_addons(shop, 4)
    await chunk(lanes, 1)
    workers = pair_of_workers()
    eventually(lambda: done(shop) == [1], "one start")
    await chunk(lanes, 2)
    eventually(lambda: told(shop, "budget: "), "then both wait")

    faster = run("rate-limit", "100/s", "--reason", "night window")

    assert faster.stdout == (
        "update_current_version: rate limit 100/s, run time (was 1/h, workers)\n"
    )
    eventually(lambda: done(shop) == [1, 2], "the new rate acts")
    changed = "rate limit changed task=update_current_version old=1/h new=100/s by="
    eventually(lambda: all(changed in one.log for one in workers), "both say old and new")
    assert all('why="night window"' in one.log for one in workers)

    stop(workers)
    assert rows(shop, "SELECT * FROM aioworker_worker") == []
    workers = pair_of_workers()
    await chunk(lanes, 3)

    eventually(lambda: done(shop) == [1, 2, 3], "the rate outlived both")
    budget = status(run)["budget"]
    assert (budget["rate"], budget["source"]) == ("100/s", "run time")
    assert (budget["set_why"], budget["starts"]) == ("night window", 3)

    run("rate-limit", "--reset")
    await chunk(lanes, 4)

    eventually(lambda: told(shop, "budget: next start at "), "the workers' own rate again")
    eventually(lambda: all("old=100/s new=1/h" in one.log for one in workers), "said, too")
    assert done(shop) == [1, 2, 3]


async def test_a_pause_acts_on_all_workers_and_outlives_them(
    run: Run,
    start: Start,
    shop: Connection[Cursor],
    lanes: Lanes,
    pair_of_workers: Callable[[], list[Worker]],
) -> None:
    simple_addons(shop, 2)
    workers = pair_of_workers()
    eventually(lambda: told(shop, "nothing queued"), "both are idle")

    assert run("pause", "--reason", "schema change").returncode == 0
    eventually(lambda: told(shop, "paused by "), "both follow")
    await chunk(lanes, 1)
    stop(workers)
    workers = pair_of_workers()
    eventually(lambda: told(shop, "paused by "), "it outlived both")

    found = status(run)
    assert found["waits"].endswith(" UTC: schema change")
    assert (found["queued"]["bulk"], found["budget"]["paused"], done(shop)) == (1, True, [])
    burst = run("consume", "--burst")
    assert (burst.returncode, burst.stderr.splitlines()[-1]) == (
        1,
        f"aioworker: {found['waits']}",
    )

    resumed = run("resume", "--reason", "all clear")
    assert resumed.stdout == "update_current_version: resumed, rate limit 1/h, workers\n"
    eventually(lambda: done(shop) == [1], "work goes on")
    said = "old=paused new=1/h by="
    eventually(lambda: all(said in one.log for one in workers), "both say who and why")
    assert all('why="all clear"' in one.log for one in workers)


async def test_a_dba_does_the_same_by_plain_sql(
    shop: Connection[Cursor], lanes: Lanes, pair_of_workers: Callable[[], list[Worker]]
) -> None:
    simple_addons(shop, 1)
    execute(
        shop,
        "UPDATE aioworker_budget SET paused = TRUE, paused_by = 'dba',"
        " paused_at = UTC_TIMESTAMP(6), paused_why = 'backup'",
    )
    await chunk(lanes, 1)
    pair_of_workers()
    eventually(lambda: told(shop, "paused by dba since "), "both follow")

    execute(shop, "UPDATE aioworker_budget SET paused = FALSE")

    eventually(lambda: done(shop) == [1], "work goes on")


def test_setting_what_is_set_changes_nothing(run: Run, shop: Connection[Cursor]) -> None:
    """Who paused first, and why, stays in the row."""
    run("pause", "--reason", "first")
    before = rows(shop, "SELECT * FROM aioworker_budget")

    again = run("pause", "--reason", "second")

    assert again.returncode == 0
    assert again.stdout.endswith(": first; nothing was changed\n")
    assert rows(shop, "SELECT * FROM aioworker_budget") == before
    assert run("resume").returncode == run("resume").returncode == 0


def test_a_rate_of_nothing_is_a_pause(run: Run, shop: Connection[Cursor]) -> None:
    assert run("rate-limit", "0/m").stdout == (
        "update_current_version: paused; what runs stops, nothing new begins\n"
    )
    assert rows(shop, "SELECT paused, gap_us FROM aioworker_budget") == [(1, None)]


@pytest.mark.parametrize(
    ("command", "variables", "line"),
    [
        (("rate-limit",), {}, "expected rate-limit [TASK] RATE, got: nothing"),
        (
            ("rate-limit", "update_current_version", "--reset", "2/m"),
            {},
            "expected rate-limit [TASK] --reset, got: update_current_version 2/m",
        ),
        (
            ("rate-limit", "2/min"),
            {},
            "expected rate limit as COUNT/UNIT, such as '2/m', or none, got: '2/min'; write '2/m'",
        ),
        (
            ("rate-limit", "-1/m"),
            {},
            "expected rate limit as COUNT/UNIT, such as '2/m', or none, got: '-1/m'; write '0/m'"
            " to pause, or 'none' for no limit",
        ),
        (
            ("rate-limit", "update_curent_version", "2/m"),
            {},
            "unknown task 'update_curent_version', did you mean update_current_version?",
        ),
        (
            ("pause", "update_curent_version"),
            {},
            "unknown task 'update_curent_version', did you mean update_current_version?",
        ),
        (
            ("pause", "--reason", "x" * 501),
            {},
            "--reason: expected up to 500 printable characters, got: 501, beginning with"
            " 'xxxxxxxxxxxxxxxxxxxx'",
        ),
        (
            ("resume",),
            {"AIOWORKER_BUDGET": "worker"},
            "AIOWORKER_BUDGET=worker: each worker keeps its own budget, and nothing can be set at"
            " run time",
        ),
    ],
)
def test_a_wrong_control_is_refused_in_one_line(
    run: Run,
    shop: Connection[Cursor],
    command: tuple[str, ...],
    variables: dict[str, str],
    line: str,
) -> None:
    before = rows(shop, "SELECT * FROM aioworker_budget")

    refused = run(*command, **variables)

    assert (refused.returncode, refused.stderr) == (2, f"aioworker: {line}\n")
    assert rows(shop, "SELECT * FROM aioworker_budget") == before


@pytest.mark.parametrize("command", [("pause",), ("resume",), ("rate-limit", "2/m")])
def test_without_the_table_the_cure_is_named(
    run: Run, pair: Servers, shop: Connection[Cursor], command: tuple[str, ...]
) -> None:
    execute(shop, "DROP TABLE aioworker_budget")

    refused = run(*command)

    assert refused.returncode == 1
    table = f"{database_name(pair)}.aioworker_budget"
    assert refused.stderr.startswith(f"aioworker: Table '{table}' doesn't exist")
    assert refused.stderr.endswith(": run `aioworker init`, or set AIOWORKER_BUDGET=worker\n")
    assert refused.stderr.count("\n") == 1


@pytest.mark.parametrize("command", [("pause",), ("resume",), ("rate-limit", "2/m")])
def test_a_control_makes_no_row(
    run: Run, shop: Connection[Cursor], command: tuple[str, ...]
) -> None:
    """A task's name of another project, or one that is gone, stays out of the table."""
    execute(shop, "DELETE FROM aioworker_budget")

    refused = run(*command)

    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.endswith(": run `aioworker init`\n")
    assert refused.stderr.count("\n") == 1
    assert rows(shop, "SELECT task FROM aioworker_budget") == []


async def test_a_worker_without_a_row_waits_until_init_has_made_it(
    run: Run, start: Start, shop: Connection[Cursor], lanes: Lanes
) -> None:
    """It takes nothing, says what is missing, and goes on by itself."""
    simple_addons(shop, 1)
    execute(shop, "DELETE FROM aioworker_budget")
    await chunk(lanes, 1)
    worker = start("consume", "--rate-limit", "100/s")
    eventually(lambda: "has no row in aioworker_budget: run `aioworker init`" in worker.log, "said")
    assert await lanes.holds("aioworker.update_current_version", 1)

    assert run("init").returncode == 0

    eventually(lambda: rows(shop, "SELECT current_version FROM addons") == [(10_001,)], "written")


async def test_workers_whose_own_rates_differ_say_so(
    run: Run, start: Start, shop: Connection[Cursor], lanes: Lanes
) -> None:
    """A rolling deploy that changes the rate."""
    start("consume", "--rate-limit", "1/h")
    eventually(lambda: rows(shop, "SELECT pid FROM aioworker_worker"), "the first is there")

    second = start("consume", "--rate-limit", "2/h")

    said = 'workers differ in their own rate limit task=update_current_version rates="1/h, 2/h"'
    eventually(lambda: said in second.log, "the second says so")
    assert "warning    workers differ in their own rate: 1/h, 2/h\n" in run("status").stdout


async def test_no_limit_can_be_set_at_run_time(
    run: Run, start: Start, shop: Connection[Cursor], lanes: Lanes
) -> None:
    """Only a DBA could, by SQL."""
    simple_addons(shop, 2)
    await chunk(lanes, 1)
    worker = start("consume", "--rate-limit", "1/h")
    eventually(lambda: done(shop) == [1], "one start")
    await chunk(lanes, 2)

    said = run("rate-limit", "none").stdout

    assert said == "update_current_version: rate limit none, run time (was 1/h, workers)\n"
    eventually(lambda: done(shop) == [1, 2], "nothing is waited for")
    assert "rate limit changed task=update_current_version old=1/h new=none by=" in worker.log
    assert "rate       none of all workers, set at run time" in run("status").stdout


@pytest.mark.parametrize(
    ("option", "variables"),
    [(["--rate-limit", "none"], {}), ([], {"AIOWORKER_RATE_LIMIT": "none"})],
    ids=["option", "variable"],
)
async def test_no_limit_can_be_set_for_a_worker(
    run: Run, shop: Connection[Cursor], lanes: Lanes, option: list[str], variables: dict[str, str]
) -> None:
    """It wins over the task's own 2/m, and what lies in the lanes goes into one start."""
    simple_addons(shop, 3)
    for addon in (1, 2, 3):
        await chunk(lanes, addon)

    burst = run("consume", "--burst", *option, **variables)

    assert burst.stdout == summary(3, 1)
    assert "worker started task=update_current_version rate_limit=none " in burst.stderr


async def test_a_budget_of_its_own_begins_with_one_interval_of_waiting(
    start: Start, shop: Connection[Cursor], lanes: Lanes
) -> None:
    """The process cannot know what the one before it has started."""
    simple_addons(shop, 1)
    execute(shop, f"DROP TABLE {', '.join(schema.NAMES)}")
    await chunk(lanes, 1)

    worker = start("consume", "--rate-limit", "1/h", AIOWORKER_BUDGET="worker")

    eventually(lambda: "budget: next start at " in worker.log, "it waits")
    assert "counts this process's starts alone: AIOWORKER_BUDGET=worker" in worker.log
    assert await lanes.holds("aioworker.update_current_version", 1)


def test_nothing_is_set_on_a_server_that_only_reads(
    run: Run, shop: Connection[Cursor], lanes: Lanes
) -> None:
    """A user who may write all the same writes into what its primary overwrites."""
    execute(shop, "SET GLOBAL read_only = 1")
    try:
        done = [run("pause"), run("rate-limit", "1/h"), run("status")]
    finally:
        execute(shop, "SET GLOBAL read_only = 0")

    assert [one.returncode for one in done] == [1, 1, 1]
    words = "this server only reads: is it a replica? check AIOWORKER_MYSQL_URL"
    assert all(words in one.stderr + one.stdout for one in done)
    assert rows(shop, "SELECT paused, gap_us FROM aioworker_budget") == [(0, None)]
