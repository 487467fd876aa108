"""Arguments, read from JSON by the types of the parameters that take them.

pydantic does it, in its strict mode: text with a date in it becomes a `datetime`, but `"42"` is
no `int`. What it has no schema for is passed on as it is.
"""

from __future__ import annotations

import inspect
import re
from types import GenericAlias
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json, to_jsonable_python

from aioworker.errors import UsageError
from aioworker.rabbitmq.message import BRIEF_LENGTH, brief

if TYPE_CHECKING:
    from collections.abc import Sequence

_SHOULD = re.compile(r"^[\w ]+? should (?:be|have) ")  # so most of pydantic's messages begin


def as_json(value: Any) -> Any:
    """Return a value as JSON has it: a date as text, a set or a tuple as a list.

    Raises:
        UsageError: JSON cannot hold it.
    """
    try:
        return to_jsonable_python(value)
    except ValueError as error:
        raise UsageError(f"expected arguments that JSON can hold, got: {error}") from error


class Reader:
    """Reads what one parameter takes.

    Args:
        parameter: The parameter; what `*args` or `**kwargs` take is read as a whole.
    """

    def __init__(self, parameter: inspect.Parameter) -> None:
        self._name = parameter.name
        try:
            self._type = _adapter(parameter)
        except Exception:  # noqa: BLE001 - whatever somebody's types may raise
            self._type = None  # not checked

    def read(self, value: Any) -> Any:
        """Return an argument as its function gets it.

        Args:
            value: What JSON has.

        Raises:
            UsageError: It is not of the parameter's type.
        """
        if self._type is None:
            return value
        try:
            return self._type.validate_json(to_json(value), strict=True)
        except ValidationError as error:
            raise UsageError(f"argument {_in_one_line(self._name, value, error)}") from None
        except ValueError as error:  # half a character
            raise UsageError(f"expected arguments that JSON can hold, got: {error}") from error


def _adapter(parameter: inspect.Parameter) -> TypeAdapter[Any] | None:
    annotation: Any = parameter.annotation
    # An `Iterable` would be read while the function runs, and not strictly.
    if TypeAdapter(annotation).core_schema["type"] in ("any", "generator"):
        return None
    if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
        annotation = GenericAlias(tuple, (annotation, ...))
    if parameter.kind is inspect.Parameter.VAR_KEYWORD:
        annotation = GenericAlias(dict, (str, annotation))
    return TypeAdapter(annotation)


def _in_one_line(name: str, value: Any, error: ValidationError) -> str:
    """Return pydantic's several lines as one; of a union, what each of its types expects."""
    found = error.errors(include_url=False, include_context=False)
    places = [_place(name, value, one["loc"]) for one in found]
    here = [one["msg"] for one, place in zip(found, places, strict=True) if place == places[0]]
    words = " or ".join(dict.fromkeys(_SHOULD.sub("", one) for one in here))
    words = " ".join(words.split())[:BRIEF_LENGTH]
    words = f"expected {words}" if _SHOULD.match(here[0]) else words[:1].lower() + words[1:]
    return f"{places[0]}: {words}, got: {brief(found[0]['input'])}"


def _place(name: str, value: Any, steps: Sequence[int | str]) -> str:
    """Return what part of an argument is meant: `rows[3][1]`."""
    for step in steps:
        try:
            value = value[step]
        except TypeError:  # the name of one of a union's types
            continue
        except LookupError:  # what is missing
            pass
        name += f"[{step!r}]"
    return name
