"""What reaches a terminal: no character of it does anything but be seen."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aioworker import words


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("\x1b[2J", "\\x1b[2J"),
        ("\x1b]8;;http://x\x07y", "\\x1b]8;;http://x\\x07y"),
        ("\x9b2J", "\\x9b2J"),
        ("a\r\nb\tc", "a\\r\\nb\\tc"),
        ("\u202eabc\u2066", "\\u202eabc\\u2066"),
        ("\u2028\x85", "\\u2028\\x85"),
        ("\udc80", "\\udc80"),
        ("\U000e0041", "\\U000e0041"),
        ("déjà 注 \U0001f600 \\x1b", "déjà 注 \U0001f600 \\x1b"),
    ],
)
def test_what_is_not_printable_is_shown_as_what_it_is(value: str, shown: str) -> None:
    assert words.printable(value) == shown


@given(st.text())
def test_a_line_stays_one_line_that_is_printable(value: str) -> None:
    assert words.printable(value).isprintable()


@given(st.text())
def test_json_stays_json(value: str) -> None:
    """Also after it was made printable: a program reads it."""
    assert json.loads(words.printable(words.as_json({value: [value]}))) == {value: [value]}


WATCH = """
import asyncio, sys
from aioworker.cli import console

async def main():
    shown = []

    async def show():
        shown.append(1)
        if len(shown) > 1:
            sys.exit()
        return sys.argv[1]

    await console.watch(show, 0)

asyncio.run(main())
"""


def watched(text: str, rows: int, columns: int) -> list[str]:
    """Return the lines that a terminal of this size has when a text is watched."""
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        [sys.executable, "-c", WATCH, text],
        stdin=terminal,
        stdout=terminal,
        env=environment | {"TERM": "xterm"},
    )
    os.close(terminal)
    printed = b""
    try:
        while part := os.read(controller, 4096):
            printed += part
    except OSError:  # its end
        pass
    os.close(controller)
    assert process.wait(timeout=60) == 0
    *_, last = printed.decode().split("\x1b[H")  # each is drawn from the upper left corner on
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", last).split("\n")
    return [line.rstrip() for line in lines[:rows]]


def lines_up_to(number: int) -> list[str]:
    """Return so many lines."""
    return [f"line {n}" for n in range(1, number + 1)]


def test_what_a_terminal_has_no_room_for_is_counted() -> None:
    """Workers beyond the last line were cut off without a word."""
    assert watched("\n".join(lines_up_to(9)), 5, 40) == [
        *lines_up_to(4),
        "… 5 more lines do not fit",
    ]


def test_a_terminal_with_room_for_all_shows_all() -> None:
    assert watched("\n".join(lines_up_to(5)), 5, 40) == lines_up_to(5)


def test_a_line_that_is_broken_takes_the_room_of_several() -> None:
    text = "\n".join([" ".join(["words"] * 12), *lines_up_to(4)])

    assert watched(text, 5, 30)[-2:] == ["line 1", "… 3 more lines do not fit"]
