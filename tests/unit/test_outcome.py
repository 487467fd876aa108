"""What is left of the error of a failed attempt."""

from __future__ import annotations

import weakref

import pytest

from aioworker.errors import MessageRefusedError
from aioworker.outcome import judge, let_go


class Body:
    """What a message brings."""


def refused(body: Body) -> Exception:
    """Return an error that comes from another one, both raised where a body was at hand."""
    try:
        try:
            _fail(body)
        except LookupError as error:
            raise MessageRefusedError("no use") from error
    except MessageRefusedError as error:
        return error
    raise AssertionError


def _fail(body: Body) -> None:
    raise LookupError(str(body))


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_an_error_that_is_told_keeps_no_body(*, grouped: bool, told: bool) -> None:
    """Whoever has the outcome would keep each body, or the next search for cycles would."""
    body = Body()
    left = weakref.ref(body)
    error = refused(body)
    result = judge(ExceptionGroup("all", [error]) if grouped else error)
    if told:
        let_go(result.error)

    del body, error

    assert (left() is None) == told
