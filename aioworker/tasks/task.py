"""A task: a function with a name, how it is run, and how it is called."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Iterable,
    Sequence,
)
from dataclasses import dataclass, field
from functools import partial, update_wrapper
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, ParamSpec, Protocol, TypeVar

from aioworker.errors import TaskError, TaskExitError, UsageError
from aioworker.limits import RateLimit
from aioworker.rabbitmq.message import brief
from aioworker.tasks import threads
from aioworker.tasks.chunk import LARGEST_ID, part_of
from aioworker.tasks.context import Context
from aioworker.tasks.loop_monitor import NAME_PREFIX
from aioworker.tasks.signature import Signature

if TYPE_CHECKING:
    from aioworker.mysql.database import Database
    from aioworker.tasks.budget import Budget

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])
Pages = AsyncIterator[list[Any]] | Iterable[list[Any]] | Awaitable[Iterable[list[Any]]]
Keys = Callable[..., Pages]


class Publishes(Protocol):
    """What a task is published with: a `Producer`."""

    async def publish(
        self, task: Task[..., Any] | str, /, *args: Any, urgent: bool = False, **kwargs: Any
    ) -> str:
        """Publish one message; return its id once RabbitMQ has confirmed it."""


class Options(NamedTuple):
    """How a task is run, where it does not leave that to the worker's settings.

    Args:
        rate_limit: How often it may start; None is no limit.
        max_retries: Attempts after the first; None is the worker's setting.
        timeout: Seconds a run may take; None is the worker's setting.
        constants: What a sweep passes behind each chunk.
        gather: Whether several messages may go into one start.
        chunk_size: Ids that need a write, before a start takes no more messages; None is the
            worker's setting.
        budget: What it shares with other tasks; None for nothing.
    """

    rate_limit: RateLimit | None = None
    max_retries: int | None = None
    timeout: float | None = None
    constants: tuple[Any, ...] = ()
    gather: bool = True
    chunk_size: int | None = None
    budget: Budget | None = None


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
    def gathers(self) -> bool:
        """Whether several of its messages may go into one start."""
        return self.takes_chunks and self.options.gather

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
        parameter is one, and the chunk. Ids that need no write do not count against the rate
        limit. What it returns that is not of the chunk fails the message.

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

    def checked(
        self, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        """Return arguments of JSON as the function gets them, a chunk first.

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

    def run(
        self, ctx: Context, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Coroutine[Any, Any, Any]:
        """Run the function with checked arguments: a coroutine here, anything else in a thread."""
        function: Callable[..., Any] = self.function
        call = partial(function, *([ctx] if self.signature.context else []), *args, **kwargs)
        used = ctx.database if self.needs_database else None
        return self._call(call, self.signature.coroutine, used)

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
