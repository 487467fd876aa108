"""`@task`, and the tasks of this process by their names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import CodeType
from typing import Any, NamedTuple, overload

from aioworker.errors import RateLimitError, TaskError, UnknownTaskError, UsageError
from aioworker.limits import NoLimit, parse_limit
from aioworker.rabbitmq.message import LONGEST_RUN_SECONDS, RETRIES_LIMIT, brief
from aioworker.tasks.budget import Budget
from aioworker.tasks.chunk import CHUNK_LIMIT
from aioworker.tasks.names import check_name
from aioworker.tasks.task import AnyTask, Keys, Options, P, R, Task

_registry: dict[str, AnyTask] = {}
_places: dict[str, _Place] = {}


@overload
def task(function: Callable[P, R], /) -> Task[P, R]: ...


@overload
def task(
    *,
    name: str | None = None,
    rate_limit: str | None = None,
    budget: Budget | None = None,
    keys: Keys | None = None,
    constants: Sequence[Any] = (),
    max_retries: int | None = None,
    timeout: float | None = None,
    gather: bool = True,
    chunk_size: int | None = None,
) -> Callable[[Callable[P, R]], Task[P, R]]: ...


def task(  # noqa: PLR0913 - a task's options, by their names
    function: Callable[P, R] | None = None,
    /,
    *,
    name: str | None = None,
    rate_limit: str | None = None,
    budget: Budget | None = None,
    keys: Keys | None = None,
    constants: Sequence[Any] = (),
    max_retries: int | None = None,
    timeout: float | None = None,
    gather: bool = True,
    chunk_size: int | None = None,
) -> Task[P, R] | Callable[[Callable[P, R]], Task[P, R]]:
    """Register a function, `async def` or `def`, as a task.

    It must leave the same rows when called twice with the same arguments. A first parameter
    annotated `Context` receives one. Arguments are read from JSON by the types of the other
    parameters, as pydantic does in its strict mode. A `def` runs in a thread, which cannot be
    cancelled.

    Args:
        function: The function, where there is nothing else to say: a bare `@task`.
        name: What it is published and queued under: letters, digits, `_`, `-` and `.`, up
            to 100; the function's name without it.
        rate_limit: Starts in a unit of time over all workers, such as `"2/m"` or `"20/h"`;
            `"0/m"` is a pause; `"none"`, like None, no limit.
        budget: What it shares with other tasks: one turn, and one rate beside its own.
        keys: A function that yields the ids (or rows) of a sweep in pages, as lists; plain
            or async, called with a `Context` where its first parameter is annotated so, and
            with `after`, the id behind which to begin, where it has a parameter of that
            name. It makes the task's first argument a chunk: up to 1000 ids as
            `list[int]`; rows where it is annotated otherwise, such as
            `list[tuple[int, float]]`.
        constants: Arguments that a sweep passes behind each chunk.
        max_retries: Attempts after the first before a dead letter, 0 to 1000; None is the
            worker's setting.
        timeout: Seconds a run may take, 1 to 1500; None is the worker's setting.
        gather: Whether a start may hold several messages of a task that takes chunks. Then a
            run may get up to twice `chunk_size` ids, less one; they are its messages' together.
        chunk_size: Ids that need a write, 1 to 1000, before a start takes no more messages;
            None is the worker's setting.

    Raises:
        TaskError: It cannot be registered like that.
        RateLimitError: `rate_limit` is not COUNT/UNIT.
    """

    def register(registered: Callable[P, R]) -> Task[P, R]:
        if not callable(registered):
            raise TaskError(f"expected @task, or @task(name=…, …), got: @task({registered!r})")
        called = name if name is not None else getattr(registered, "__name__", "")
        options = _checked_options(called, rate_limit, max_retries, timeout, constants)
        if budget is not None and not isinstance(budget, Budget):
            raise TaskError(f"task {called!r}: expected budget as a Budget, got: {brief(budget)}")
        size = _checked_size(called, chunk_size)
        options = options._replace(gather=gather, chunk_size=size, budget=budget)
        # Under a second name it is the same function.
        function = registered.function if isinstance(registered, Task) else registered
        made = Task(called, function, options, keys)
        if keys is not None:
            if not callable(keys):
                raise TaskError(f"task {called!r}: expected keys to be a function, got: {keys!r}")
            made.signature.expect_keys(keys)
            made.signature.expect_sweep(options.constants)
        _register(made)
        return made

    return register if function is None else register(function)


def _checked_options(
    name: str,
    rate_limit: str | None,
    max_retries: int | None,
    timeout: float | None,
    constants: Sequence[Any],
) -> Options:
    check_name(name)
    if max_retries is not None and not (
        type(max_retries) is int and 0 <= max_retries <= RETRIES_LIMIT
    ):
        raise TaskError(
            f"task {name!r}: expected max_retries from 0 to {RETRIES_LIMIT}, got: {max_retries!r}"
        )
    if timeout is not None and not (
        isinstance(timeout, int | float) and 1 <= timeout <= LONGEST_RUN_SECONDS
    ):
        raise TaskError(
            f"task {name!r}: expected timeout from 1 to {LONGEST_RUN_SECONDS} seconds,"
            f" got: {timeout!r}"
        )
    if not isinstance(constants, list | tuple):
        raise TaskError(f"task {name!r}: expected constants as a tuple, got: {brief(constants)}")
    if rate_limit is not None and not isinstance(rate_limit, str):
        raise TaskError(
            f"task {name!r}: expected rate_limit such as '2/m', or none, got: {rate_limit!r}"
        )
    try:
        said = NoLimit.NONE if rate_limit is None else parse_limit(rate_limit)
    except RateLimitError as error:
        raise RateLimitError(f"task {name!r}: {error}") from None
    rate = None if said is NoLimit.NONE else said
    return Options(rate, max_retries, timeout, tuple(constants))


def _checked_size(name: str, size: int | None) -> int | None:
    if size is not None and not (type(size) is int and 1 <= size <= CHUNK_LIMIT):
        raise TaskError(
            f"task {name!r}: expected chunk_size from 1 to {CHUNK_LIMIT} ids, got: {size!r}"
        )
    return size


def _check_budget(made: AnyTask) -> None:
    """Refuse a budget of the name of another one that has another rate.

    Raises:
        TaskError: It is one.
    """
    ours = made.options.budget
    for other in _registry.values():
        theirs = other.options.budget
        if ours is None or theirs is None or ours.name != theirs.name or other.name == made.name:
            continue
        if ours.rate_limit != theirs.rate_limit:
            raise TaskError(
                f"budget {ours.name!r} has two rate limits: {theirs} for task {other.name!r} and"
                f" {ours} for {made.name!r}; make it once, and import it"
            )


def _register(made: AnyTask) -> None:
    _check_budget(made)
    place = _module_under_way()
    before = _registry.get(made.name)
    if before is not None and not place.executes_again(_places.get(made.name)):
        raise TaskError(
            f"task {made.name!r} is registered twice: by {_shown(before)} and by {_shown(made)};"
            " give one of them another name="
        )
    _registry[made.name] = made
    _places[made.name] = place


def _shown(made: AnyTask) -> str:
    function: Any = made.function
    return f"{function.__module__}.{getattr(function, '__qualname__', type(function).__name__)}"


class _Place(NamedTuple):
    """Where a task is registered: one execution of one module.

    Args:
        module: The module's file, or its name where it has none; None outside of any.
        execution: Its code, an object of its own each time that the module is executed.
    """

    module: str | None = None
    execution: CodeType | None = None

    def executes_again(self, before: _Place | None) -> bool:
        """Whether the module that registered before does so anew: its newest task is meant.

        It is reloaded, or is a script that is imported as well.
        """
        return (
            before is not None
            and self.module == before.module is not None
            and self.execution is not before.execution
        )


def _module_under_way() -> _Place:
    """Return the module that is being executed, whoever registers for it."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_name != "<module>":
        frame = frame.f_back
    if frame is None:
        return _Place()
    found = frame.f_globals
    return _Place(found.get("__file__") or found.get("__name__"), frame.f_code)


def registered() -> list[str]:
    """Return the names of all tasks that are registered, in their order."""
    return list(_registry)


def find(name: str) -> AnyTask:
    """Return the task of this name.

    Raises:
        UnknownTaskError: None is registered.
    """
    try:
        return _registry[name]
    except KeyError:
        raise UnknownTaskError(f"unknown task {name!r}") from None


def check_publishable(
    made: AnyTask | str, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[str, list[Any], dict[str, Any]]:
    """Return a task's name and the arguments to send, as JSON, checked as far as they can be.

    Raises:
        UsageError: The task cannot be called with them, or JSON cannot hold them.
    """
    from aioworker.tasks.arguments import as_json  # who publishes has imported pydantic

    if not isinstance(made, Task):
        check_name(made)
    known = made if isinstance(made, Task) else _registry.get(made)
    sent, named = as_json([list(args), kwargs])
    if known is None:
        return str(made), sent, named
    try:
        checked, _ = known.checked(sent, named)
        if known.takes_chunks:
            sent[0] = as_json(checked[0])  # each entry once
    except UsageError as error:
        raise UsageError(f"task {known.name!r}: {error}") from None
    if known.takes_chunks and not sent[0]:
        raise UsageError(
            f"task {known.name!r}: expected a chunk of 1 to {CHUNK_LIMIT} ids or rows, got: []"
        )
    return known.name, sent, named
