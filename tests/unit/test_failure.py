"""What is told of the error of a failed attempt, and what is left of it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import pytest
from pymysql.err import DataError, OperationalError, ProgrammingError

from aioworker.errors import (
    DeadLetter,
    MessageRefusedError,
    RowsRefusedError,
    TurnLostError,
    family,
    let_go,
)
from aioworker.settling.failure import Failure, Fault


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
    whole = ExceptionGroup("all", [error]) if grouped else error
    failure = Failure.of(whole)
    if told:
        let_go(whole)

    del body, error, whole

    # Of our own errors the words say it all.
    assert (left() is None) == (told or kind is MessageRefusedError)
    assert failure.words


@pytest.mark.parametrize(
    ("errors", "fault", "words"),
    [
        ([DeadLetter("no shop")], Fault.MESSAGE, "no shop"),
        ([ValueError("a"), KeyError()], Fault.ATTEMPT, "ValueError: a; KeyError"),
        ([DeadLetter("no shop"), ValueError("a")], Fault.ATTEMPT, "no shop; ValueError: a"),
        (
            [ValueError("a"), OperationalError(2006, "gone")],
            Fault.ATTEMPT,
            "ValueError: a; database, error: gone (2006)",
        ),
        ([ExceptionGroup("in", [DeadLetter("no shop")])], Fault.MESSAGE, "no shop"),
    ],
)
def test_a_group_comes_to_what_is_gentlest(
    errors: list[Exception], fault: Fault, words: str
) -> None:
    """A task group raises one whatever was raised in it."""
    failure = Failure.of(ExceptionGroup("all", errors))

    assert (failure.fault, failure.words) == (fault, words)


def test_one_row_is_not_told_as_rows() -> None:
    assert str(RowsRefusedError({7: "frozen"}, 1)).startswith("1 row refused by the database: ")
    assert str(RowsRefusedError({7: "a", 8: "a"}, 1)).startswith("2 rows refused by the database: ")


@pytest.mark.parametrize("code", [1265, 1300, 1364, 1366])
def test_what_a_row_cannot_hold_is_not_tried_again(code: int) -> None:
    assert Failure.of(DataError(code, "no")).fault is Fault.DATA


def test_an_error_without_a_number_is_the_tasks_own() -> None:
    """The driver cannot write NaN: that is nothing of the server, whose address is right."""
    failure = Failure.of(ProgrammingError("nan can not be used with MySQL"))

    assert failure.fault is Fault.ATTEMPT
    assert failure.words == "ProgrammingError: nan can not be used with MySQL"


def test_a_turn_that_was_lost_is_a_lost_connection() -> None:
    assert Failure.of(TurnLostError("the turn was lost")).lost


def _raise(error: BaseException) -> Callable[..., NoReturn]:
    def method(*_: object) -> NoReturn:
        raise error

    return method


METHODS = (
    "__str__",
    "__repr__",
    "__eq__",
    "__hash__",
    "__bool__",
    "__getattribute__",
    "with_traceback",
)
PROPERTIES = ("__class__", "__cause__", "__context__", "__traceback__", "args")
RAISED = (ValueError("no"), SystemExit(3), KeyboardInterrupt(), RecursionError())


@pytest.mark.parametrize("raised", RAISED, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("name", [*METHODS, *PROPERTIES])
def test_whatever_an_errors_own_code_does_it_can_be_told(name: str, raised: BaseException) -> None:
    """One whose text cannot be made ended its worker at each start, and nobody said why."""
    method = _raise(raised)
    value = method if name in METHODS else property(method)
    odd = type("OddError", (Exception,), {name: value})

    failure = Failure.of(odd("words"))

    assert failure.name == "OddError"
    assert failure.words in (
        "OddError: words",
        f"OddError, which cannot be told: its own code raises {type(raised).__name__}",
    )
    assert Failure.of(ExceptionGroup("all", [odd(), ValueError()])).words


@pytest.mark.parametrize("name", [*METHODS, *PROPERTIES])
def test_whatever_an_errors_own_code_does_its_tracebacks_can_be_dropped(name: str) -> None:
    method = _raise(SystemExit())
    value = method if name in METHODS else property(method)
    odd = type("OddError", (ExceptionGroup,), {name: value, "exceptions": property(method)})
    inner = ValueError()
    error = odd("all", [inner])

    let_go(error)

    assert [one is part for one, part in zip(family(error), (error, inner), strict=True)] == [
        True,
        True,
    ]


def test_a_metaclass_cannot_keep_an_errors_name() -> None:
    meta = type("Meta", (type,), {"__name__": property(_raise(SystemExit()))})
    odd = meta("OddError", (Exception,), {})

    assert Failure.of(odd("words")).name == "OddError"
