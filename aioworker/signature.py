"""What a function can be called with: seen from its signature, before it runs."""

from __future__ import annotations

import collections.abc
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

from aioworker import chunk
from aioworker.context import Context
from aioworker.errors import TaskError, UsageError

_LISTS = (list, tuple, collections.abc.Sequence, collections.abc.Iterable)
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
TO_PUBLISH = "urgent"  # a keyword of `publish`, which the function would never get
# A chunk of anything else is one of rows; for annotations that cannot be resolved, their text.
_IDS = frozenset({"", "list", "list[int]", "List[int]", "Sequence[int]", "Iterable[int]"})


@dataclass(frozen=True, slots=True)
class Signature:
    """What a task's function can be called with.

    Args:
        task: The task's name, for errors.
        context: Whether its first parameter receives a `Context`.
        coroutine: Whether it is an `async def`.
        parameters: The parameters behind that.
    """

    task: str
    context: bool
    coroutine: bool
    parameters: inspect.Signature

    @classmethod
    def of(cls, task: str, function: Callable[..., Any]) -> Signature:
        """Read a function's signature.

        Raises:
            TaskError: It is no function that can be a task.
        """
        if not callable(function) or inspect.isclass(function):
            raise TaskError(f"expected a function as a task, got: {function!r}")
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TaskError(f"task {task!r}: expected a function that returns, got a generator")
        whole = read(function)
        if TO_PUBLISH in whole.parameters:
            raise TaskError(
                f"task {task!r}: a parameter cannot be named {TO_PUBLISH!r}: publishing takes that"
                " for the lane"
            )
        hints = _hints(function)
        parameters = [
            one.replace(annotation=hints.get(one.name, one.annotation))
            for one in whole.parameters.values()
        ]
        context = cls.wants_context(function)
        for one in parameters[1 if context else 0 :]:
            if "Context" in re.findall(r"\w+", _text(one.annotation)):
                raise TaskError(
                    f"task {task!r}: expected `Context` as the annotation of its first parameter"
                    f" alone, got it in: {one}"
                )
        parameters = parameters[1 if context else 0 :]
        return cls(task, context, cls.is_coroutine(function), whole.replace(parameters=parameters))

    @staticmethod
    @cache
    def wants_context(function: Callable[..., Any]) -> bool:
        """Whether the first parameter is annotated `Context`."""
        first = next(iter(read(function).parameters.values()), None)
        if first is None:
            return False
        found = _hints(function).get(first.name, first.annotation)
        return found is Context or (
            isinstance(found, str) and found.strip("'\"").rpartition(".")[2] == Context.__name__
        )

    @staticmethod
    def is_coroutine(function: Callable[..., Any]) -> bool:
        """Whether calling it returns something to await, as far as can be told."""
        return inspect.iscoroutinefunction(function) or (
            inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004
        )

    @property
    def shown(self) -> str:
        """The parameters without their annotations: `(ids, up=False)`."""
        empty = inspect.Parameter.empty
        bare = [one.replace(annotation=empty) for one in self.parameters.parameters.values()]
        return str(inspect.Signature(bare))

    @property
    def chunk(self) -> inspect.Parameter | None:
        """The parameter that receives a chunk, where there is one to receive anything."""
        first = next(iter(self.parameters.parameters.values()), None)
        return first if first is not None and first.kind in _POSITIONAL else None

    @property
    def takes_ids(self) -> bool:
        """Whether a chunk of it is one of ids; otherwise of rows."""
        found = inspect.Parameter.empty if self.chunk is None else self.chunk.annotation
        found = getattr(found, "__value__", found)  # of `type Ids = list[int]`
        if found in (inspect.Parameter.empty, list):
            return True
        if isinstance(found, str):
            return found.rpartition("typing.")[2].rpartition("collections.abc.")[2] in _IDS
        entries = [getattr(one, "__supertype__", one) for one in get_args(found) if one is not ...]
        return get_origin(found) in _LISTS and entries in ([], [int])

    def expect_chunk(self, why: str) -> None:
        """Refuse a function that takes no chunk.

        Raises:
            TaskError: It is one.
        """
        if self.chunk is None:
            raise TaskError(
                f"task {self.task!r}: expected a parameter for the chunk, since it has {why},"
                f" got: {self.shown}"
            )

    def expect_reader(self, reader: Callable[..., Any]) -> None:
        """Refuse a function that cannot be called with a chunk alone, as `needed` is.

        Raises:
            TaskError: It cannot.
        """
        found = Signature.of(self.task, reader)
        try:
            found.parameters.bind([])
        except TypeError as error:
            raise TaskError(
                f"task {self.task!r}: expected needed to take a chunk, got {found.shown}: {error}"
            ) from None

    def expect_sweep(self, constants: Sequence[Any]) -> None:
        """Refuse a function that cannot be called as a sweep does: a chunk, then constants.

        Raises:
            TaskError: It cannot.
        """
        self.expect_chunk("keys")
        try:
            self.parameters.bind([], *constants)
        except TypeError as error:
            raise TaskError(
                f"task {self.task!r}: a sweep calls it with a chunk and {len(constants)} constants,"
                f" got {self.shown}: {error}; a context is annotated `Context`"
            ) from None

    def checked(
        self, args: Sequence[Any], kwargs: dict[str, Any], largest_id: int | None
    ) -> list[Any]:
        """Return positional arguments as the function gets them.

        Args:
            args: Positional arguments, a chunk first where one is taken.
            kwargs: Keyword arguments.
            largest_id: The largest id of a chunk; None where the first argument is none.

        Raises:
            UsageError: The function cannot be called with these, or the chunk is none.
        """
        try:
            self.parameters.bind(*args, **kwargs)
        except TypeError as error:
            raise UsageError(f"expected arguments {self.shown}: {error}") from None
        if largest_id is None:
            return list(args)
        if not args:
            raise UsageError("expected the chunk as the first positional argument, got none")
        return [self._checked_chunk(args[0], largest_id), *args[1:]]

    def _checked_chunk(self, value: object, largest_id: int) -> list[Any]:
        return chunk.check_ids(value, largest_id) if self.takes_ids else chunk.check_rows(value)


def read(function: Callable[..., Any]) -> inspect.Signature:
    """Return a function's signature, whether or not its annotations can be resolved."""
    try:
        return inspect.signature(function)
    except Exception:
        if sys.version_info >= (3, 14):  # which evaluates them here: that may raise anything
            from annotationlib import Format

            return inspect.signature(function, annotation_format=Format.STRING)
        raise


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Return a function's annotations, resolved; none where one of them cannot be."""
    called = function if inspect.isroutine(function) else getattr(function, "__call__", function)  # noqa: B004
    try:
        return get_type_hints(called)
    except Exception:  # noqa: BLE001 - whatever evaluating somebody's annotations may raise
        return {}


def _text(annotation: Any) -> str:
    if annotation is inspect.Parameter.empty:
        return ""
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
