"""Words from outside, on a person's terminal."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tests.conftest import QUEUES, Lanes, Run

if TYPE_CHECKING:
    from pathlib import Path

    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

# Clears the screen, links, writes into the clipboard, rings, turns the order of what is read.
EVIL = "\x1b[2J\x1b]8;;http://evil\x1b\\x\x1b]52;c;ZXZpbA==\x07\u202e\u2066é"
FORGED = f"{EVIL}\nforged 2026-01-01T00:00:00+00:00 lane=bulk all is well\r"


def assert_seen(text: str) -> None:
    """See that every line is printable, and none is a value's own."""
    for line in text.split("\n"):
        assert line.isprintable(), repr(line)
        assert not line.startswith("forged")


async def letter(lanes: Lanes, **more: Any) -> None:
    """Put a letter that has it everywhere."""
    await lanes.send(
        FORGED.encode(),
        QUEUES.dead,
        headers={
            "id": f"id{FORGED}",
            "task": FORGED,
            "x-aioworker-reason": FORGED,
            "x-aioworker-error": FORGED,
            "x-aioworker-lane": FORGED,
            "x-aioworker-failed-at": FORGED,
            FORGED: FORGED,
        },
        **more,
    )


async def test_dead_letters_print_no_escapes(
    run: Run, lanes: Lanes, shop: Connection[Cursor]
) -> None:
    """A message's publisher could write into the clipboard of whoever looked at it."""
    await letter(lanes)

    for command in (
        ("dead", "list"),
        ("dead", "show", f"id{FORGED}"),
        ("dead", "drop"),
        ("dead", "show", FORGED),
        ("dead", "list", "--older-than", FORGED),
        ("dead", "requeue", "--id", FORGED),
    ):
        done = run(*command, text="n\n")
        assert_seen(done.stdout + done.stderr)
        assert "\\x1b[2J" in done.stdout + done.stderr
    shown = run("dead", "show", f"id{FORGED}").stdout
    first, *rest = shown.splitlines()
    assert first.startswith("id\\x1b[2J")
    assert [line for line in rest if not line.startswith("    ")] == [""]
    assert rest[rest.index("") + 1].startswith("    body: \\x1b[2J")
    assert json.loads(run("dead", "show", f"id{FORGED}", "--json").stdout)["body"] == FORGED
    assert json.loads(run("dead", "list", "--json").stdout)["reason"] == FORGED


async def test_a_letter_is_found_by_the_id_that_was_printed(
    run: Run, lanes: Lanes, shop: Connection[Cursor]
) -> None:
    """Its escapes were shown as text, by which no letter was known."""
    await letter(lanes)

    for encoding in ("utf-8", "ascii"):
        printed = run("dead", "list", PYTHONIOENCODING=encoding).stdout.split()[0]
        assert run("dead", "list", "--id", printed).stdout.count("\n") == 1
        assert run("dead", "show", printed).returncode == 0
    dropped = run("dead", "drop", "--id", printed, "--yes")
    assert (dropped.returncode, dropped.stderr) == (0, "")


async def test_an_odd_encoding_shows_what_it_can(
    run: Run, lanes: Lanes, shop: Connection[Cursor]
) -> None:
    await letter(lanes)

    done = run("dead", "list", PYTHONIOENCODING="ascii")

    assert (done.returncode, "\\xe9" in done.stdout) == (0, True)


async def test_status_and_health_print_no_escapes(
    run: Run, lanes: Lanes, shop: Connection[Cursor]
) -> None:
    """The rows of workers can be written by whoever may write to the database."""
    with shop.cursor() as cursor:
        cursor.execute(
            "UPDATE aioworker_budget SET paused = 1, paused_why = %s, paused_by = %s", (EVIL, EVIL)
        )
    shop.commit()

    done = run("status")

    assert done.returncode == 0
    assert "\\x1b[2J" in done.stdout
    assert_seen(done.stdout)


def test_an_error_prints_no_escapes_in_a_traceback_either(run: Run, tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(f"raise ValueError({FORGED!r})")

    for options in ((), ("--debug",)):
        done = run(*options, "init", "--print", "--app", "evil")
        assert done.returncode == 2
        assert "\\x1b[2J" in done.stderr
        assert all(line.isprintable() for line in done.stderr.split("\n"))
