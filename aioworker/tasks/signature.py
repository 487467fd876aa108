"""What a function can be called with: seen from its signature, before it runs."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, get_type_hints

from aioworker.errors import TaskError, UsageError
from aioworker.tasks import chunk, hints
from aioworker.tasks.context import Context

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
TO_PUBLISH = "urgent"  # a keyword of `publish`, which the function would never get
AFTER = "after"  # the parameter of `keys` that gets the id behind which to begin


@dataclass(frozen=True, slots=True)
class Signature:
    """What a task's function can be called with.

    Args:
        task: The task's name, for errors.
        context: Whether its first parameter receives a `Context`.
        coroutine: Whether it is an `async def`.
        parameters: The parameters behind that.
        takes: What the first of them takes a chunk of, as `hints.chunk_of` has it.
    """

    task: str
    context: bool
    coroutine: bool
    parameters: inspect.Signature
    takes: str | None

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
        try:
            whole = read(function)
        except ValueError as error:  # a built-in one, perhaps
            raise TaskError(f"task {task!r}: expected a function in Python: {error}") from None
        if TO_PUBLISH in whole.parameters:
            raise TaskError(
                f"task {task!r}: a parameter cannot be named {TO_PUBLISH!r}: publishing takes that"
                " for the lane"
            )
        resolved = _hints(function)
        parameters = [
            one.replace(annotation=resolved.get(one.name, one.annotation))
            for one in whole.parameters.values()
        ]
        context = cls.wants_context(function)
        if context:
            del parameters[0]
        elif parameters and parameters[0].name in ("self", "cls"):
            raise TaskError(
                f"task {task!r}: nothing is passed as {parameters[0].name!r}: register a function,"
                " or the method of an object, as in `task(shop.refresh)`"
            )
        for one in parameters:
            if _mentions_context(one.annotation):
                raise TaskError(
                    f"task {task!r}: expected `Context` itself as an annotation, of the first"
                    f" positional parameter alone, got: {one}"
                )
        taken = hints.chunk_of(parameters[0].annotation) if parameters else None
        whole = whole.replace(parameters=parameters)
        return cls(task, context, cls.is_coroutine(function), whole, taken)

    @staticmethod
    def wants_context(function: Callable[..., Any]) -> bool:
        """Whether the first parameter is a positional one annotated `Context`."""
        first = next(iter(read(function).parameters.values()), None)
        if first is None or first.kind not in _POSITIONAL:
            return False
        found = hints.behind(_hints(function).get(first.name, first.annotation))
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
        return self.takes == hints.IDS

    def expect_chunk(self, why: str) -> None:
        """Refuse a function that takes no chunk of ids or rows.

        Raises:
            TaskError: It is one.
        """
        if self.chunk is None:
            raise TaskError(
                f"task {self.task!r}: expected a parameter for the chunk, since it has {why},"
                f" got: {self.shown}"
            )
        if self.takes is None:
            raise TaskError(
                f"task {self.task!r}: expected its chunk annotated as ids, list[int], or as rows,"
                f" such as list[tuple[int, str]], got: {self.chunk}"
            )

    def expect_keys(self, keys: Callable[..., Any]) -> None:
        """Refuse a function that cannot be called as `keys` is.

        Raises:
            TaskError: It cannot.
        """
        try:
            found = read(keys)
            given = [None] if Signature.wants_context(keys) else []
            found.bind(*given, **({AFTER: 0} if AFTER in found.parameters else {}))
        except (TypeError, ValueError) as error:
            raise TaskError(
                f"task {self.task!r}: keys are called with a first parameter annotated `Context`"
                f" and with {AFTER!r}, where they have them: {error}"
            ) from None

    def expect_reader(self, reader: Callable[..., Any]) -> Signature:
        """Return what `needed` can be called with, unless that is not a chunk alone.

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
        return found

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
    try:
        while isinstance(function, partial):
            function = function.func
        written = inspect.unwrap(function)
        called = written if inspect.isroutine(written) else getattr(written, "__call__", written)  # noqa: B004
        return get_type_hints(called)
    except Exception:  # noqa: BLE001 - whatever evaluating somebody's annotations may raise
        return {}


def _mentions_context(annotation: Any) -> bool:
    found = hints.behind(annotation)
    inherits = isinstance(found, type) and issubclass(found, Context)
    return inherits or Context.__name__ in re.findall(r"\w+", _text(found))


def _text(annotation: Any) -> str:
    if annotation is inspect.Parameter.empty:
        return ""
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
