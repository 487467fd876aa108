"""What reaches a terminal: no character of it does anything but be seen."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aioworker import console


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
    assert console.printable(value) == shown


@given(st.text())
def test_a_line_stays_one_line_that_is_printable(value: str) -> None:
    assert console.printable(value).isprintable()


@given(st.text())
def test_json_stays_json(value: str) -> None:
    """Also after it was made printable: a program reads it."""
    assert json.loads(console.printable(console.as_json({value: [value]}))) == {value: [value]}
