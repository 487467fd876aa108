"""Tasks: functions registered under a name, and how they are called."""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial, update_wrapper
from types import CodeType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, ParamSpec, Protocol, TypeVar, overload

from aioworker.errors import RateLimitError, TaskError, TaskExitError, UnknownTaskError, UsageError
from aioworker.limits import NoLimit, RateLimit, parse_limit
from aioworker.rabbitmq.message import LONGEST_RUN_SECONDS, RETRIES_LIMIT, brief
from aioworker.tasks import threads
from aioworker.tasks.chunk import CHUNK_LIMIT, LARGEST_ID, part_of
from aioworker.tasks.context import Context
from aioworker.tasks.loop_monitor import NAME_PREFIX
from aioworker.tasks.signature import Signature

if TYPE_CHECKING:
    from aioworker.mysql.database import Database

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])
Pages = AsyncIterator[list[Any]] | Iterable[list[Any]] | Awaitable[Iterable[list[Any]]]
Keys = Callable[..., Pages]

NAME_LENGTH = 100
_NAME = re.compile(rf"[A-Za-z0-9_.-]{{1,{NAME_LENGTH}}}")
_RESERVED = (".urgent", ".retry", ".dead")


class Publishes(Protocol):
    """What a task is published with: a `Producer`."""

    async def publish(
        self, task: Task[..., Any] | str, /, *args: Any, urgent: bool = False, **kwargs: Any
    ) -> str:
        """Publish one message; return its id once RabbitMQ has confirmed it."""


@dataclass(frozen=True, slots=True)
class Options:
    """How a task is run, where it does not leave that to the worker's settings.

    Args:
        rate_limit: How often it may start; None is no limit.
        max_retries: Attempts after the first; None is the worker's setting.
        timeout: Seconds a run may take; None is the worker's setting.
        constants: What a sweep passes behind each chunk.
    """

    rate_limit: RateLimit | None = None
    max_retries: int | None = None
    timeout: float | None = None
    constants: tuple[Any, ...] = ()


@dataclass(eq=False)
class Task(Generic[P, R]):
    """A function that can be published to, made by `task`; called, it is the function itself.

    Args:
        name: What it is registered, published and queued under.
        function: The function, as written.
        options: How it is run.
        keys: What yields the ids or rows of a sweep; None for a task without sweeps.
        largest_id: The largest id of its chunks.
        size: Returns how many ids a sweep that begins behind an id has, where that is cheap.
        check: Called before the first message and after failures, to see that the task can
            work at all; what it raises of the database is waited for with no message in hand.
        signature: What the function can be called with.
        reader: What `needed` registers.
        reads: What that can be called with.
    """

    # The package sets it: what publishes lies above, and imports a client of RabbitMQ.
    publisher: ClassVar[Callable[..., str]]

    name: str
    function: Callable[P, R]
    options: Options = field(default_factory=Options)
    keys: Keys | None = None
    check: Callable[[Context], Awaitable[None]] | None = None
    largest_id: int = LARGEST_ID
    size: Callable[[Context, int], Awaitable[int]] | None = None
    signature: Signature = field(init=False)
    reader: Callable[..., Any] | None = field(init=False, default=None)
    reads: Signature | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.signature = Signature.of(self.name, self.function)
        update_wrapper(self, self.function, updated=())
        # An object's attributes, or a decorator's, are its task's, but for the task's own.
        self.__dict__ = getattr(self.function, "__dict__", {}) | self.__dict__

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function itself."""
        return self.function(*args, **kwargs)

    @property
    def takes_chunks(self) -> bool:
        """Whether its first argument is a chunk: it has `keys`, or `needed`."""
        return self.keys is not None or self.reader is not None

    @property
    def needs_database(self) -> bool:
        """Whether a run may use the database: it gets a `Context`, or asks what is needed."""
        return self.signature.context or self.reader is not None

    @property
    def rate_limit(self) -> RateLimit | None:
        """How often it may start, where nothing else is set."""
        return self.options.rate_limit

    def needed(self, reader: F) -> F:
        """Register a function that returns which ids or rows of a chunk still need writing.

        It only reads, and is called as the task is: with a `Context`, where its first
        parameter is one, and the chunk. What needs nothing costs nothing of the rate limit.
        What it returns that is not of the chunk fails the message.

        Raises:
            TaskError: The task, or this function, takes no chunk.
        """
        self.signature.expect_chunk("needed")
        self.reads = self.signature.expect_reader(reader)
        self.reader = reader
        return reader

    async def publish(
        self, producer: Publishes, /, *args: Any, urgent: bool = False, **kwargs: Any
    ) -> str:
        """Publish one message with *producer*; see `Producer.publish`."""
        return await producer.publish(self, *args, urgent=urgent, **kwargs)

    def publish_sync(self, /, *args: Any, urgent: bool = False, **kwargs: Any) -> str:
        """Publish one message where no event loop is; see the function `publish_sync`."""
        return Task.publisher(self, *args, urgent=urgent, **kwargs)

    def checked(self, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
        """Return the positional arguments as the function gets them, chunk first.

        Raises:
            UsageError: The function cannot be called with these.
        """
        largest_id = self.largest_id if self.takes_chunks else None
        return self.signature.checked(args, kwargs, largest_id)

    async def read_needed(self, ctx: Context, chunk: list[Any]) -> list[Any]:
        """Return what of a chunk needs writing: all of it where the task cannot tell.

        Raises:
            TaskError: What `needed` returned is no part of a chunk.
        """
        if self.reader is None or self.reads is None:
            return chunk
        call = partial(self.reader, *([ctx] if self.reads.context else []), chunk)
        found = await self._call(call, self.reads.coroutine, ctx.database)
        if not isinstance(found, Collection) or isinstance(found, str):
            raise TaskError(
                f"task {self.name!r}: expected needed to return a list of ids or rows,"
                f" got: {brief(found)}"
            )
        try:
            return part_of(chunk, found)
        except UsageError as error:
            raise TaskError(f"task {self.name!r}: needed: {error}") from None

    async def run(self, ctx: Context, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Run the function with checked arguments: a coroutine here, anything else in a thread."""
        function: Callable[..., Any] = self.function
        call = partial(function, *([ctx] if self.signature.context else []), *args, **kwargs)
        used = ctx.database if self.needs_database else None
        await self._call(call, self.signature.coroutine, used)

    async def _call(
        self, call: Callable[[], Any], coroutine: bool, database: Database | None
    ) -> Any:
        """Call a coroutine function, anything else in a thread; return what it returns.

        It has an asyncio task of its own, which it may cancel without harm to ours.

        Raises:
            TaskExitError: It raised what would end the worker: `sys.exit()`, a cancellation of
                something of its own.
        """
        name = f"{NAME_PREFIX}{self.name}"  # whose it is, for the loop monitor
        running = asyncio.create_task(self._contained(call, coroutine, database), name=name)
        try:
            return await running
        except asyncio.CancelledError as error:
            ours = asyncio.current_task()
            if ours is not None and ours.cancelling():
                raise  # not the task's: its time is up, or the worker ends
            raise TaskExitError.of(error) from error

    async def _contained(
        self, call: Callable[[], Any], coroutine: bool, database: Database | None
    ) -> Any:
        """Call it, and let out nothing that would end an event loop."""
        try:
            found = call() if coroutine else await threads.run(call, database, self.name)
            # What looked like a plain function may have made something to await.
            return await found if inspect.isawaitable(found) else found
        except (Exception, asyncio.CancelledError):
            raise
        except SystemExit as error:
            raise TaskExitError(f"the task called sys.exit({brief(error.code)})") from error
        except BaseException as error:
            raise TaskExitError.of(error) from error


AnyTask = Task[..., Any]
_registry: dict[str, AnyTask] = {}
_places: dict[str, _Place] = {}


@overload
def task(function: Callable[P, R], /) -> Task[P, R]: ...


@overload
def task(
    *,
    name: str | None = None,
    rate_limit: str | None = None,
    keys: Keys | None = None,
    constants: Sequence[Any] = (),
    max_retries: int | None = None,
    timeout: float | None = None,
) -> Callable[[Callable[P, R]], Task[P, R]]: ...


def task(
    function: Callable[P, R] | None = None,
    /,
    *,
    name: str | None = None,
    rate_limit: str | None = None,
    keys: Keys | None = None,
    constants: Sequence[Any] = (),
    max_retries: int | None = None,
    timeout: float | None = None,
) -> Task[P, R] | Callable[[Callable[P, R]], Task[P, R]]:
    """Register a function, `async def` or `def`, as a task.

    It must leave the same rows when called twice with the same arguments. A first parameter
    annotated `Context` receives one. A `def` runs in a thread, which cannot be cancelled.

    Args:
        function: The function, where there is nothing else to say: a bare `@task`.
        name: What it is published and queued under: letters, digits, `_`, `-` and `.`, up
            to 100; the function's name without it.
        rate_limit: Starts in a unit of time over all workers, such as `"2/m"` or `"20/h"`;
            `"0/m"` is a pause; `"none"`, like None, no limit.
        keys: A function that yields the ids (or rows) of a sweep in pages, as lists; plain
            or async, called with a `Context` where its first parameter is annotated so, and
            with `after`, the id behind which to begin, where it has a parameter of that
            name. It makes the task's first argument a chunk: up to 1000 ids as
            `list[int]`; rows where it is annotated otherwise, such as
            `list[tuple[int, float]]`; JSON makes them lists.
        constants: Arguments that a sweep passes behind each chunk.
        max_retries: Attempts after the first before a dead letter, 0 to 1000; None is the
            worker's setting.
        timeout: Seconds a run may take, 1 to 1500; None is the worker's setting.

    Raises:
        TaskError: It cannot be registered like that.
        RateLimitError: `rate_limit` is not COUNT/UNIT.
    """

    def register(registered: Callable[P, R]) -> Task[P, R]:
        if not callable(registered):
            raise TaskError(f"expected @task, or @task(name=…, …), got: @task({registered!r})")
        called = name if name is not None else getattr(registered, "__name__", "")
        options = _checked_options(called, rate_limit, max_retries, timeout, constants)
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


def check_name(name: object) -> None:
    """Refuse what no task can be called.

    Raises:
        TaskError: It is that.
    """
    if not isinstance(name, str) or _NAME.fullmatch(name) is None or name.endswith(_RESERVED):
        raise TaskError(
            f"expected a task's name of 1 to {NAME_LENGTH} letters, digits, '_', '-' and '.', not"
            f" ending in {', '.join(_RESERVED)}, got: {brief(name)}"
        )


def _register(made: AnyTask) -> None:
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


@dataclass(frozen=True, slots=True)
class _Place:
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
) -> tuple[str, list[Any]]:
    """Return a task's name and the arguments to publish, checked as far as they can be.

    Raises:
        UsageError: The task cannot be called with them.
    """
    if not isinstance(made, Task):
        check_name(made)
    known = made if isinstance(made, Task) else _registry.get(made)
    if known is None:
        return str(made), list(args)
    try:
        checked = known.checked(args, kwargs)
    except UsageError as error:
        raise UsageError(f"task {known.name!r}: {error}") from None
    if known.takes_chunks and not checked[0]:
        raise UsageError(
            f"task {known.name!r}: expected a chunk of 1 to {CHUNK_LIMIT} ids or rows, got: []"
        )
    return known.name, checked
