"""Every error that aioworker raises on purpose.

Each text is one line that names the offending value and, where there is one, the cure.
"""

from __future__ import annotations

from collections.abc import Iterator

from aioworker.words import command, count


class AioworkerError(Exception):
    """The base of them all; the command line prints its text and exits 1."""


class UsageError(AioworkerError, ValueError):
    """A setting, option or argument is wrong; the command line exits 2."""


class TlsFileError(UsageError):
    """A file that an address names for TLS cannot be used; it may come back."""


class RateLimitError(UsageError):
    """A rate limit is not COUNT/UNIT."""


class TaskError(UsageError):
    """A task is registered in a way that cannot work, or its module does not import."""


class _SaidError(AioworkerError):
    def __init__(self, reason: str = "") -> None:
        super().__init__(str(reason).strip() or "no reason given")


class Retry(_SaidError):  # noqa: N818 - what a task says, not what went wrong with it
    """Raise it in a task: try this message again later, at most `max_retries` times.

    Args:
        reason: Why, in one line; for the log, and for the dead letter at the end. Without
            it they say that none was given.
    """


class DeadLetter(_SaidError):  # noqa: N818 - likewise
    """Raise it in a task: set this message aside at once, no other attempt would do.

    Args:
        reason: Why, in one line, as for `Retry`.
    """


class UnknownTaskError(UsageError, LookupError):
    """No task of this name is registered."""


class MessageRefusedError(AioworkerError, ValueError):
    """A message cannot be run as it is; its text is the dead letter's reason."""


class RowsRefusedError(AioworkerError):
    """The data refused some rows of a run; the others are written.

    Attributes:
        reasons: The server's words for each refused id.
        written: How many rows of the run were written.
    """

    def __init__(self, reasons: dict[int, str], written: int) -> None:
        self.reasons = reasons
        self.written = written
        ids = ", ".join(map(str, reasons))
        first = next(iter(reasons.values()))
        super().__init__(
            f"{count(len(reasons), 'row')} refused by the database: {first}: ids {ids}"
        )


class TaskExitError(AioworkerError):
    """A task ended its process, as far as it could: `sys.exit()` inside of a worker."""

    @classmethod
    def of(cls, error: BaseException) -> TaskExitError:
        """Tell of what a task let out, by its class alone where its own code keeps the words."""
        name = name_of(error)
        try:
            return cls(f"the task let out {name}: {error}")
        except BaseException:  # noqa: BLE001 - of a user's code, run by looking at it
            return cls(f"the task let out {name}")


class WorkerCutOffError(AioworkerError):
    """Something in the worker's process, a task perhaps, ended what the worker itself runs on."""


class NestedTransactionError(AioworkerError, RuntimeError):
    """A transaction inside another one: the inner one's end would commit both."""


class RunStoppedError(AioworkerError):
    """A run may begin no further transaction; its messages are given back, uncounted."""


class CrashLoopError(AioworkerError):
    """A message killed its worker again and again."""


class RowsContendedError(AioworkerError):
    """Other writers changed the same rows again and again between our read and our write."""


class BrokerError(AioworkerError, ConnectionError):
    """RabbitMQ cannot be reached, refuses, or did not confirm.

    Attributes:
        unreachable: Whether it is RabbitMQ itself that is away.
    """

    def __init__(self, text: str, *, unreachable: bool = False) -> None:
        super().__init__(text)
        self.unreachable = unreachable


class ConnectionLostError(BrokerError):
    """The connection was lost; what was under way on it may have arrived."""

    def __init__(self, text: str) -> None:
        super().__init__(text, unreachable=True)


class NotTakenError(BrokerError):
    """RabbitMQ answered that it did not take a message for a queue."""


class QueueMissingError(BrokerError):
    """A queue is not declared."""

    @classmethod
    def of(cls, queue: str, task: str = "") -> QueueMissingError:
        """Tell of a queue, and the cure.

        Args:
            queue: Its name.
            task: Whose it is, if that has a budget: it may be retired.
        """
        retired = f"; if {task} is retired, see docs/operations.md, Retire a task" if task else ""
        return cls(f"queue {queue} does not exist: run `{command('init')}`{retired}")


class QueueDiffersError(BrokerError):
    """A queue is declared with another argument than aioworker's."""


class DatabaseError(AioworkerError):
    """The database cannot be used; its text says why and what to do.

    Attributes:
        unreachable: Whether it is the server itself that is away.
    """

    def __init__(self, text: str, *, unreachable: bool = False) -> None:
        super().__init__(text)
        self.unreachable = unreachable


class UnhealthyError(AioworkerError):
    """No worker of this machine does its work."""


class TurnLostError(DatabaseError):
    """The turn to work on a task was lost in the middle of it."""


def name_of(thing: object) -> str:
    """Return the name of an object's class, an error's say, which no code of it can change."""
    return str.__str__(_class_name(type(thing)))


_class_name = type.__dict__["__name__"].__get__


def told(error: BaseException) -> str:
    """Return an error's class and its words in one line, whatever its own code does."""
    try:
        words = " ".join(str.__str__(str(error)).split())
    except BaseException as second:  # noqa: BLE001 - of a user's code, run by looking at it
        return f"{name_of(error)}, which cannot be told: its own code raises {name_of(second)}"
    return f"{name_of(error)}: {words}" if words else name_of(error)


def let_go(error: BaseException | None) -> None:
    """Drop the tracebacks of an error that is told, and of what it came from.

    Their frames hold a message, whose body would stay in memory until Python looks for cycles,
    or a password, which tools that collect the variables of all frames would send away.
    """
    for one in family(error):
        BaseException.with_traceback(one, None)  # a class may have another, or be frozen


def family(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, what it came from and what it is a group of, each once.

    Asks the errors' own code nothing.
    """
    rest: list[BaseException | None] = [error]
    seen = set()
    while rest:
        one = rest.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            yield one
            rest += [context_of(one), cause_of(one)]
            parts = parts_of(one)
            if id(parts) not in seen:  # many groups may have one tuple
                seen.add(id(parts))
                rest += reversed(parts)


def parts_of(error: BaseException) -> tuple[BaseException, ...]:
    """Return what an error is a group of; nothing for one that is no group."""
    return _parts(error) if issubclass(type(error), BaseExceptionGroup) else ()


# Whatever a class has in their place.
traceback_of = BaseException.__dict__["__traceback__"].__get__
cause_of = BaseException.__dict__["__cause__"].__get__
context_of = BaseException.__dict__["__context__"].__get__
_parts = BaseExceptionGroup.__dict__["exceptions"].__get__
