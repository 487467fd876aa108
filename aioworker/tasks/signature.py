"""What a function can be called with, by its signature; and arguments held against it."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin

from aioworker.errors import TaskError, UsageError
from aioworker.tasks.chunk import check_ids, check_rows
from aioworker.tasks.context import Context

if TYPE_CHECKING:
    from aioworker.tasks.arguments import Reader

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
TO_PUBLISH = "urgent"  # a keyword of `publish`, which the function would never get
AFTER = "after"  # the parameter of `keys` that gets the id behind which to begin


@dataclass(frozen=True)
class Signature:
    """What a task's function can be called with.

    Args:
        task: The task's name, for errors.
        function: The function.
        context: Whether its first parameter receives a `Context`.
        coroutine: Whether it is an `async def`.
        parameters: The parameters behind the context.
    """

    task: str
    function: Callable[..., Any]
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
        try:
            whole = read(function)
        except ValueError as error:  # a built-in one, perhaps
            raise TaskError(f"task {task!r}: expected a function in Python: {error}") from None
        if TO_PUBLISH in whole.parameters:
            raise TaskError(
                f"task {task!r}: a parameter cannot be named {TO_PUBLISH!r}: publishing takes that"
                " for the lane"
            )
        parameters = list(whole.parameters.values())
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
        whole = whole.replace(parameters=parameters)
        return cls(task, function, context, cls.is_coroutine(function), whole)

    @staticmethod
    def wants_context(function: Callable[..., Any]) -> bool:
        """Whether the first parameter is a positional one annotated `Context`."""
        first = next(iter(read(function).parameters.values()), None)
        if first is None or first.kind not in _POSITIONAL:
            return False
        found = plain(first.annotation)
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

    @cached_property
    def takes_ids(self) -> bool:
        """Whether a chunk of it is one of ids; otherwise of rows."""
        found = plain(self.chunk.annotation) if self.chunk is not None else None
        if isinstance(found, str):
            return found.endswith("[int]")  # `Sequence[int]`, if only a type checker imports that
        return all(plain(entry) is int for entry in get_args(found)[:1])

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
        found = plain(self.chunk.annotation)
        takes_rows = all(_takes_lists(plain(entry)) for entry in get_args(found)[:1])
        if not (_takes_lists(found) and (takes_rows or self.takes_ids)):
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
    ) -> tuple[list[Any], dict[str, Any]]:
        """Return arguments of JSON as the function gets them.

        Args:
            args: Positional arguments, a chunk first where one is taken.
            kwargs: Keyword arguments.
            largest_id: The largest id of a chunk; None where the first argument is none.

        Raises:
            UsageError: The function cannot be called with these.
        """
        try:
            bound = self.parameters.bind(*args, **kwargs)
        except TypeError as error:
            raise UsageError(f"expected arguments {self.shown}: {error}") from None
        chunk = self.chunk if largest_id is not None else None
        if chunk is not None and largest_id is not None:
            if not args:
                raise UsageError("expected the chunk as the first positional argument, got none")
            checked = check_ids(args[0], largest_id) if self.takes_ids else check_rows(args[0])
            bound.arguments[chunk.name] = checked
        for name, value in bound.arguments.items():
            # That each is an int `check_ids` has seen, in less time than reading takes.
            if chunk is None or chunk.name != name or chunk.annotation != list[int]:
                bound.arguments[name] = self._readers[name].read(value)
        taken = list(bound.args)
        if chunk is not None:
            taken[0] = list(taken[0])  # whatever its type, as what is needed of it will be
        return taken, bound.kwargs

    @cached_property
    def _readers(self) -> dict[str, Reader]:
        """What reads each parameter's arguments."""
        # Here, since pydantic takes half as long to import as all else that a task needs.
        from aioworker.tasks.arguments import Reader

        # Anew: by now the names of the function's whole module are known.
        return {one.name: Reader(one) for one in read(self.function).parameters.values()}


def read(function: Callable[..., Any]) -> inspect.Signature:
    """Return a function's signature, its annotations resolved; as text those that cannot be."""
    try:
        whole = inspect.signature(function)
    except Exception:
        if sys.version_info >= (3, 14):  # which evaluates them here: that may raise anything
            from annotationlib import Format

            whole = inspect.signature(function, annotation_format=Format.STRING)
        else:
            raise
    written: Any = inspect.unwrap(function.func if isinstance(function, partial) else function)
    module = sys.modules.get(written.__module__)  # of an object that can be called
    names = getattr(written, "__globals__", getattr(module, "__dict__", {}))
    resolved = [
        one.replace(annotation=_resolved(one.annotation, names))
        for one in whole.parameters.values()
    ]
    return whole.replace(parameters=resolved)


def _resolved(annotation: Any, names: dict[str, Any]) -> Any:
    try:
        return eval(annotation, names) if isinstance(annotation, str) else annotation
    except Exception:  # noqa: BLE001 - whatever evaluating somebody's annotations may raise
        return annotation


def plain(annotation: Any) -> Any:
    """Return the type behind `X | None`, `Annotated`, `NewType` and `type X = …`."""
    given = get_args(annotation)
    if get_origin(annotation) in (Annotated, Union, UnionType):
        return plain(given[0])
    try:
        found = getattr(annotation, "__supertype__", None) or getattr(annotation, "__value__", None)
    except Exception:  # noqa: BLE001 - as above: an alias is evaluated here
        return annotation
    return annotation if found is None else plain(found[given] if given else found)


def _takes_lists(annotation: Any) -> bool:
    """Whether a list may be of a type, as far as it can be told."""
    kind = get_origin(annotation) or annotation
    if kind in (Any, inspect.Parameter.empty):
        return True
    try:
        return issubclass(kind, tuple) or issubclass(list, kind)
    except TypeError:  # a name that is not known, a protocol that cannot be asked
        return True


def _mentions_context(annotation: Any) -> bool:
    found = plain(annotation)
    inherits = isinstance(found, type) and issubclass(found, Context)
    return inherits or Context.__name__ in re.findall(r"\w+", inspect.formatannotation(annotation))
