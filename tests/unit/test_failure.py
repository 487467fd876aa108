"""What is told of the error of a failed attempt, and what is left of it."""

from __future__ import annotations

import logging
import weakref
from collections import Counter
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
from aioworker.logs import LOOKED_AT, ConsoleFormatter, JsonFormatter
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


DEPTH = 22  # 4 million paths
MANY = 100_000
MOST = 50  # looks at one error, over all that is told of it
_asked: Counter[int] = Counter()


def _ask(error: BaseException) -> None:
    _asked[id(error)] += 1
    if _asked[id(error)] > MOST:
        raise AssertionError("asked too often")


class AskedError(Exception):
    """Counts what it is asked."""

    def __getattribute__(self, name: str) -> object:
        _ask(self)
        return super().__getattribute__(name)

    def __str__(self) -> str:
        _ask(self)
        return "no shop"


class AskedGroup(ExceptionGroup[Exception]):
    """Likewise."""

    def __getattribute__(self, name: str) -> object:
        _ask(self)
        return super().__getattribute__(name)

    def __str__(self) -> str:
        _ask(self)
        return "group"


def _shared() -> Exception:
    error: Exception = AskedError()
    for _ in range(DEPTH):
        error = AskedGroup("all", [error, error])
    return error


def _chained() -> Exception:
    error: Exception = AskedError()
    for _ in range(DEPTH):
        step = AskedGroup("all", [error, error])
        step.__cause__ = AskedGroup("cause", [error, error])
        step.__context__ = error
        error = step
    return error


def _causes() -> Exception:
    error: Exception = AskedError()
    for _ in range(MANY):
        step = AskedError()
        step.__cause__ = step.__context__ = error
        error = step
    return error


def _wide() -> Exception:
    return AskedGroup("all", [AskedError() for _ in range(MANY)])


def _wide_and_shared() -> Exception:
    many = tuple(AskedError() for _ in range(1000))
    return AskedGroup("all", [AskedGroup("one", many) for _ in range(1000)])


def _deep() -> Exception:
    error: Exception = AskedError()
    for _ in range(MANY):
        error = AskedGroup("all", [error])
    return error


@pytest.mark.parametrize("shape", [_shared, _chained, _causes, _wide, _wide_and_shared, _deep])
def test_each_error_is_asked_a_few_times_whatever_group_it_is_in(
    shape: Callable[[], Exception],
) -> None:
    """A group that held another one twice, 22 deep, kept the worker busy for minutes."""
    error = shape()
    _asked.clear()

    failure = Failure.of(error)
    record = logging.LogRecord("a", 40, "a", 1, "chunk failed", (), (type(error), error, None))
    lines = [ConsoleFormatter().format(record), JsonFormatter().format(record)]
    let_go(error)

    assert max(_asked.values()) <= MOST
    assert len(_asked) <= LOOKED_AT
    assert "cannot be told" not in failure.words
    assert all(text.count("group") + text.count("no shop") for text in (failure.traceback, *lines))
    if shape is not _deep:
        assert failure.words.startswith("AskedError: no shop")


@pytest.mark.parametrize("late", [DeadLetter("no shop"), ValueError("a")])
def test_a_group_too_large_to_look_at_may_be_tried_again(late: Exception) -> None:
    errors = [DeadLetter("no shop") for _ in range(LOOKED_AT)]
    failure = Failure.of(ExceptionGroup("all", [*errors, late]))

    assert failure.fault is Fault.ATTEMPT
    assert failure.error is not None


def test_each_member_of_a_group_as_large_as_a_chunk_counts() -> None:
    """The last of a thousand may be the one for which another attempt does."""
    errors: list[Exception] = [DeadLetter("no shop") for _ in range(1000)]

    assert Failure.of(ExceptionGroup("all", errors)).fault is Fault.MESSAGE
    assert Failure.of(ExceptionGroup("all", [*errors, ValueError()])).fault is Fault.ATTEMPT


def test_what_many_came_from_is_told_with_the_first_of_them() -> None:
    """The stored lines end with the group itself, and have one of its errors in front."""
    errors = [refused(Body(), RuntimeError) for _ in range(1000)]
    error = _caught(ExceptionGroup("all", errors))

    told = Failure.of(error).traceback

    assert told.endswith("ExceptionGroup: all (1000 sub-exceptions)")
    assert "in _fail" in told
    assert "LookupError: " in told


def _caught(error: Exception) -> Exception:
    try:
        _raise(error)()
    except Exception as caught:  # noqa: BLE001 - as the worker catches it
        return caught
