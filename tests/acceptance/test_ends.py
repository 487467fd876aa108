"""What is set at run time for a while: it ends by itself, by the database's clock."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import Lanes, Run, Worker, eventually, execute, rows, simple_addons

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

Start = Callable[..., Worker]
TASK = "update_current_version"
MOMENT = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC"
# As if the server's clock had been set forward by three hours: what is noted was earlier by them.
FORWARD = "UPDATE aioworker_budget SET " + ", ".join(
    f"{column} = {column} - INTERVAL 3 HOUR"
    for setting in ("paused", "set")
    for column in (f"{setting}_at", f"{setting}_until", f"{setting}_until_of")
)
BACK = FORWARD.replace("- INTERVAL", "+ INTERVAL")


async def chunk(lanes: Lanes, addon: int) -> None:
    await lanes.send(json.dumps([[[addon]], {}, None]).encode())


def controls(shop: Connection[Cursor]) -> dict[str, Any]:
    """Return what is set at run time, and by whom."""
    columns = "paused, paused_until, paused_by, gap_us, set_until, gap_after_us, set_by"
    [found] = rows(shop, f"SELECT {columns} FROM aioworker_budget WHERE task = '{TASK}'")
    return dict(zip(columns.split(", "), found, strict=True))


def budget(run: Run) -> Any:
    return json.loads(run("status", TASK, "--json").stdout)["budget"]


async def test_a_pause_ends_by_itself(
    run: Run, start: Start, shop: Connection[Cursor], lanes: Lanes
) -> None:
    """No start is charged before its end, and the first worker that sees that clears the row."""
    simple_addons(shop, 1)
    said = run("pause", "--for", "4s", "--reason", "copy").stdout
    until = controls(shop)["paused_until"]
    await chunk(lanes, 1)

    worker = start("consume", "--rate-limit", "100/s")

    eventually(lambda: rows(shop, "SELECT current_version FROM addons") == [(10_001,)], "written")
    assert re.fullmatch(
        rf"{TASK}: paused until {MOMENT}, in 4 s; what runs stops, nothing new begins\n", said
    )
    [[charged]] = rows(shop, "SELECT last_charge FROM aioworker_budget")
    assert charged >= until
    found = controls(shop)
    assert (found["paused"], found["paused_until"], found["paused_by"]) == (0, None, "end")
    assert re.search(rf"paused by \S+ since {MOMENT} until {MOMENT}: copy", worker.log)
    assert (
        "rate limit changed task=update_current_version old=paused new=100/s by=end" in worker.log
    )


async def test_a_rate_ends_by_itself_and_the_one_before_counts_again(
    run: Run, start: Start, shop: Connection[Cursor], lanes: Lanes
) -> None:
    """Also if it was changed once more meanwhile, with an end."""
    run("rate-limit", "4/h")
    said = run("rate-limit", "10/m", "--for", "8h", "--reason", "night").stdout
    run("rate-limit", "20/m", "--for", "2h")
    assert re.fullmatch(
        rf"{TASK}: rate limit 10/m, run time until {MOMENT}, in 8 h \(was 4/h, run time\)\n", said
    )
    assert controls(shop)["gap_us"] == 3_000_000
    worker = start("consume", "--rate-limit", "1/h")
    eventually(lambda: "new=20/m" in worker.log, "a worker goes by it")

    execute(shop, FORWARD)

    eventually(lambda: controls(shop)["set_by"] == "end", "a worker has seen it")
    found = controls(shop)
    assert (found["gap_us"], found["gap_after_us"], found["set_until"]) == (900_000_000, None, None)
    eventually(lambda: "old=20/m new=4/h by=end" in worker.log, "and says so")


def test_without_a_rate_before_the_workers_own_counts_again(
    run: Run, shop: Connection[Cursor]
) -> None:
    """A command sees the end, too."""
    run("rate-limit", "none", "--for", "2h")
    execute(shop, FORWARD)
    assert (budget(run)["rate"], budget(run)["set_until"]) == ("2/m", None)
    assert controls(shop)["gap_us"] == 0, "to look changes nothing"

    said = run("rate-limit", "5/m").stdout

    assert said == f"{TASK}: rate limit 5/m, run time (was 2/m, task)\n"
    assert controls(shop)["gap_after_us"] is None


def test_a_rate_without_an_end_replaces_one_that_has_one(
    run: Run, shop: Connection[Cursor]
) -> None:
    run("rate-limit", "10/m", "--for", "2h")
    run("rate-limit", "20/m")
    assert controls(shop)["set_until"] is None

    run("rate-limit", "10/m", "--for", "2h")
    run("rate-limit", "--reset")

    found = controls(shop)
    assert (found["gap_us"], found["set_until"], found["gap_after_us"]) == (None, None, None)


def test_a_shorter_pause_does_not_replace_a_longer_one(run: Run, shop: Connection[Cursor]) -> None:
    run("pause", "--for", "2h", "--reason", "copy")
    before = controls(shop)

    refused = run("pause", "--for", "1h")

    assert (refused.returncode, refused.stdout) == (1, "")
    assert re.fullmatch(
        rf"aioworker: {TASK}: paused by \S+ since {MOMENT} until {MOMENT}: copy; nothing was"
        r" changed: a pause is not replaced by a shorter one\n",
        refused.stderr,
    )
    assert controls(shop) == before

    assert run("pause", "--for", "3h").returncode == 0
    longer = controls(shop)["paused_until"]
    assert longer - before["paused_until"] > timedelta(minutes=59)
    assert run("pause").returncode == 0
    assert controls(shop)["paused_until"] is None, "the longest of all"
    assert run("pause", "--for", "300d").returncode == 1
    assert controls(shop)["paused_until"] is None


def test_a_pause_of_no_rate_has_an_end_too(run: Run, shop: Connection[Cursor]) -> None:
    assert "paused until " in run("rate-limit", "0/m", "--for", "2h").stdout
    assert controls(shop)["paused_until"] is not None


@pytest.mark.parametrize(("step", "paused"), [(FORWARD, False), (BACK, True)])
def test_a_step_of_the_clock_moves_the_end(
    run: Run, shop: Connection[Cursor], step: str, paused: bool
) -> None:
    run("pause", "--for", "2h")

    execute(shop, step)

    assert budget(run)["paused"] is paused


def test_status_shows_the_time_that_is_left(run: Run, shop: Connection[Cursor]) -> None:
    run("rate-limit", "10/m", "--for", "8h")
    run("pause", "--for", "2h", "--reason", "copy")

    found, shown = budget(run), run("status").stdout

    assert 7100 < found["paused_until_seconds"] <= 7200
    assert 28_700 < found["set_until_seconds"] <= 28_800
    ends = datetime.fromisoformat(found["paused_until"])
    assert ends - datetime.fromisoformat(found["paused_at"]) == timedelta(hours=2)
    rate = rf"^rate +10/m of all workers, set at run time until {MOMENT}, for (8 h|7 h 59 min) more"
    assert re.search(rate, shown, re.MULTILINE)
    assert re.search(r"^next start +not while paused, which ends in (2 h|1 h 59 min)$", shown, re.M)


@pytest.mark.parametrize("ends", [True, False])
def test_what_plain_sql_sets_meanwhile_has_no_end(
    run: Run, shop: Connection[Cursor], ends: bool
) -> None:
    """As by a command of an earlier version, which knows of none."""
    run("pause", "--for", "2h")
    run("rate-limit", "10/m", "--for", "2h")
    if not ends:
        execute(
            shop,
            "UPDATE aioworker_budget SET paused = FALSE",
            "UPDATE aioworker_budget SET paused = TRUE, paused_at = UTC_TIMESTAMP(6),"
            " gap_us = 1000000, set_at = UTC_TIMESTAMP(6)",
        )

    execute(shop, FORWARD)

    found = budget(run)
    assert (found["paused"], found["rate"]) == ((False, "2/m") if ends else (True, "60/m"))
    assert (found["paused_until"], found["set_until"]) == (None, None)


def test_all_tasks_of_the_database(run: Run, shop: Connection[Cursor]) -> None:
    """Row by row; a longer pause stays, and is no error."""
    execute(
        shop,
        "INSERT INTO aioworker_budget (task, last_start, server)"
        " SELECT 'shop.left', last_start, server FROM aioworker_budget",
    )
    run("pause", "shop.left", "--reason", "first")

    paused = run("pause", "--all", "--for", "2h", "--reason", "incident")

    assert paused.returncode == 0
    kept, new = paused.stdout.splitlines()
    assert re.fullmatch(
        rf"shop.left: paused by \S+ since {MOMENT}: first; nothing was changed", kept
    )
    assert new.startswith(f"{TASK}: paused until ")
    resumed = run("resume", "--all").stdout.splitlines()
    assert [line.partition(",")[0] for line in resumed] == [
        "shop.left: resumed",
        f"{TASK}: resumed",
    ]
    assert rows(shop, "SELECT SUM(paused) FROM aioworker_budget") == [(0,)]


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (("pause", "--for", "2"), "expected --for with a time such as 30m, 2h or 7d, got: '2'"),
        (("pause", "--for", "0s"), "expected --for from 1s to 366d, got: '0s'"),
        (("rate-limit", "2/m", "--for", "400d"), "expected --for from 1s to 366d, got: '400d'"),
        (
            ("rate-limit", "--reset", "--for", "2h"),
            "expected --reset or --for, got both: the workers' own rate has no end",
        ),
        (("pause", TASK, "--all"), f"expected a task, --budget or --all, got: {TASK}, --all"),
        (
            ("resume", "--task", TASK, "--all"),
            f"expected a task, --budget or --all, got: {TASK}, --all",
        ),
    ],
)
def test_a_wrong_end_is_refused_in_one_line(
    run: Run, shop: Connection[Cursor], command: tuple[str, ...], line: str
) -> None:
    before = controls(shop)

    refused = run(*command)

    assert (refused.returncode, refused.stderr) == (2, f"aioworker: {line}\n")
    assert controls(shop) == before
