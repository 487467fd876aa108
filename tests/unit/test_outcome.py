"""What is left of the error of a failed attempt."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import pytest

from aioworker.errors import MessageRefusedError
from aioworker.outcome import judge, let_go


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
