"""What a function can be called with: seen from its signature, before it runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from aioworker import chunk
from aioworker.context import Context
from aioworker.errors import TaskError, UsageError

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
TO_PUBLISH = "urgent"  # a keyword of `publish`, which the function would never get
# A chunk of anything else is one of rows.
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
        whole = inspect.signature(function)
        context = cls.wants_context(function)
        if TO_PUBLISH in whole.parameters:
            raise TaskError(
                f"task {task!r}: a parameter cannot be named {TO_PUBLISH!r}: publishing takes that"
                " for the lane"
            )
        parameters = list(whole.parameters.values())[1 if context else 0 :]
        return cls(task, context, cls.is_coroutine(function), whole.replace(parameters=parameters))

    @staticmethod
    def wants_context(function: Callable[..., Any]) -> bool:
        """Whether the first parameter is annotated `Context`."""
        first = next(iter(inspect.signature(function).parameters.values()), None)
        if first is None:
            return False
        found = first.annotation
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
        if found is inspect.Parameter.empty:
            return True
        text = found if isinstance(found, str) else inspect.formatannotation(found)
        return text.rpartition("typing.")[2].rpartition("collections.abc.")[2] in _IDS

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

    def expect_constants(self, constants: Sequence[Any]) -> None:
        """Refuse constants that the function does not take behind its chunk.

        Raises:
            TaskError: It does not.
        """
        if not constants:
            return
        try:
            self.parameters.bind([], *constants)
        except TypeError as error:
            raise TaskError(f"task {self.task!r}: constants: {error}") from None

    def checked(self, args: Sequence[Any], kwargs: dict[str, Any], *, chunk: bool) -> list[Any]:
        """Return positional arguments as the function gets them.

        Args:
            args: Positional arguments, a chunk first where one is taken.
            kwargs: Keyword arguments.
            chunk: Whether the first argument is a chunk.

        Raises:
            UsageError: The function cannot be called with these, or the chunk is none.
        """
        try:
            self.parameters.bind(*args, **kwargs)
        except TypeError as error:
            raise UsageError(f"expected arguments {self.shown}: {error}") from None
        if not chunk:
            return list(args)
        if not args:
            raise UsageError("expected the chunk as the first positional argument, got none")
        return [self._checked_chunk(args[0]), *args[1:]]

    def _checked_chunk(self, value: object) -> list[Any]:
        return chunk.check_ids(value) if self.takes_ids else chunk.check_rows(value)
