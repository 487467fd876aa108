"""Arguments, read from JSON by the types of the parameters that take them.

pydantic does it, in its strict mode: text with a date in it becomes a `datetime`, but `"42"` is
no `int`. What it has no schema for is passed on as it is. What JSON would hold as another value
is not sent.
"""

from __future__ import annotations

import inspect
import re
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from datetime import date, datetime, timedelta
from decimal import Decimal
from itertools import chain
from types import GenericAlias, NoneType
from typing import TYPE_CHECKING, Any

from pydantic import Secret, SecretBytes, SecretStr, TypeAdapter, ValidationError
from pydantic_core import SchemaSerializer, core_schema, to_json, to_jsonable_python

from aioworker.errors import UsageError
from aioworker.rabbitmq.message import BRIEF_LENGTH, brief

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_SHOULD = re.compile(r"^[\w ]+? should (?:be|have) ")  # so most of pydantic's messages begin
# What JSON holds whole, as a number or as text; a thousand rows have thousands of these.
_WHOLE = {str, int, float, bool, NoneType, Decimal, date, datetime, timedelta}
_SECRETS = (Secret, SecretStr, SecretBytes)
_LISTS = (list, tuple, set, frozenset, deque)
_OBJECTS = SchemaSerializer(core_schema.any_schema())


def as_json(value: Any) -> Any:
    """Return a value as JSON has it: a date as text, a set or a tuple as a list.

    Raises:
        UsageError: JSON cannot hold it, or not all of it.
    """
    try:
        sent = to_jsonable_python(value)
    except ValueError as error:
        raise UsageError(f"expected arguments that JSON can hold, got: {error}") from error
    _expect_whole(value, sent)
    return sent


def _expect_whole(value: Any, sent: Any) -> None:
    """Refuse what JSON would hold as another value, such as a secret as `**********`.

    Raises:
        UsageError: There is such a value, however deep inside.
    """
    pairs = [(value, sent)]
    for one, held in pairs:  # while it grows
        if _plain(one, held):
            continue
        if _lost(one, held):
            raise UsageError(
                f"expected arguments that JSON can hold, got: {type(one).__name__}, of which JSON"
                f" holds {brief(held)}: publish text, numbers or lists, or an id to look it up by"
            )
        pairs += _parts(one, held)


def _lost(value: Any, sent: Any) -> bool:
    """Whether JSON holds less than this value itself says."""
    if isinstance(value, _LISTS):
        return False
    if isinstance(value, dict):
        return isinstance(sent, dict) and len(sent) < len(value)  # 1 and "1" are one key
    if isinstance(value, _SECRETS):  # a serializer of the user's may tell it
        return isinstance(sent, str) and sent != "" and sent in str(value)
    if isinstance(value, re.Pattern):
        return not isinstance(sent, str) or re.compile(sent) != value  # without its flags
    return isinstance(value, Iterator)  # nothing is left in it to publish once more


def _parts(value: Any, sent: Any) -> Iterable[tuple[Any, Any]]:
    """Return what is in a value, each beside what JSON holds of it."""
    if isinstance(value, _LISTS) and isinstance(sent, list):
        return zip(value, sent, strict=False)
    if isinstance(value, dict) and isinstance(sent, dict):
        values = zip(value.values(), sent.values(), strict=False)
        return chain(zip(value, sent, strict=False), values)
    inside = _inside(value)
    return () if type(inside) is type(value) else [(inside, sent)]


def _plain(value: Any, sent: Any) -> bool:
    """Whether there is nothing to look for: ids, which stay as they are, or rows of numbers."""
    with suppress(Exception):  # whatever somebody's `__eq__` may raise
        if value == sent:
            return True
    level: Sequence[Any] = [value]
    while kinds := set(map(type, level)) - _WHOLE:
        if not kinds <= {list, tuple}:
            return False
        level = list(chain.from_iterable(one for one in level if type(one) not in _WHOLE))
    return True


def _inside(value: Any) -> Any:
    """Return a dataclass or a model as a dictionary, what is in it as it is; all else unchanged."""
    try:
        return _OBJECTS.to_python(value, warnings=False)
    except Exception:  # noqa: BLE001 - whatever somebody's serializer may raise
        return value


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
