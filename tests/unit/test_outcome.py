"""What is left of the error of a failed attempt."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import pytest
from pymysql.err import DataError, OperationalError

from aioworker.errors import DeadLetter, MessageRefusedError, RowsRefusedError, let_go
from aioworker.outcome import Kind, judge


@dataclass(frozen=True)
class StrangeError(Exception):
    """What a task may raise: nothing can be set on it, and it is no group."""

    exceptions: tuple[str, ...] = ("one", "two")


class Body:
    """What a message brings."""


def refused(body: Body, kind: type[Exception]) -> Exception:
    """Return an error that comes from another one, both raised where a body was at hand."""
    try:
        try:
            _fail(body)
        except LookupError as error:
            raise kind("no use") from error
    except kind as error:
        return error
    raise AssertionError


def _fail(body: Body) -> None:
    raise LookupError(str(body))


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("kind", [MessageRefusedError, StrangeError])
def test_an_error_that_is_told_keeps_no_body(
    kind: type[Exception], *, grouped: bool, told: bool
) -> None:
    """Whoever has the outcome would keep each body, or the next search for cycles would."""
    body = Body()
    left = weakref.ref(body)
    error = refused(body, kind)
    result = judge(ExceptionGroup("all", [error]) if grouped else error)
    if told:
        let_go(result.error)

    del body, error

    assert (left() is None) == told


@pytest.mark.parametrize(
    ("errors", "kind", "reason"),
    [
        ([DeadLetter("no shop")], Kind.DEAD_LETTER, "no shop"),
        ([ValueError("a"), KeyError()], Kind.RETRY, "ValueError: a; KeyError"),
        ([DeadLetter("no shop"), ValueError("a")], Kind.RETRY, "no shop; ValueError: a"),
        (
            [ValueError("a"), OperationalError(2006, "gone")],
            Kind.RELEASED,
            "ValueError: a; database, unavailable: gone (2006)",
        ),
        ([ExceptionGroup("in", [DeadLetter("no shop")])], Kind.DEAD_LETTER, "no shop"),
    ],
)
def test_a_group_comes_to_what_is_gentlest(
    errors: list[Exception], kind: Kind, reason: str
) -> None:
    """A task group raises one whatever was raised in it."""
    result = judge(ExceptionGroup("all", errors))

    assert (result.kind, result.reason) == (kind, reason)


def test_one_row_is_not_told_as_rows() -> None:
    assert str(RowsRefusedError({7: "frozen"}, 1)).startswith("1 row refused by the database: ")
    assert str(RowsRefusedError({7: "a", 8: "a"}, 1)).startswith("2 rows refused by the database: ")


@pytest.mark.parametrize("code", [1265, 1300, 1364, 1366])
def test_what_a_row_cannot_hold_is_not_tried_again(code: int) -> None:
    assert judge(DataError(code, "no")).kind is Kind.DEAD_LETTER


@pytest.mark.parametrize("code", [1037, 1041, 1135, 1159, 2055])
def test_a_server_in_need_counts_no_attempt(code: int) -> None:
    assert judge(OperationalError(code, "no")).kind is Kind.RELEASED
