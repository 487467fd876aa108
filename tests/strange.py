"""What a user's code may raise, count and return: objects whose own code does the worst.

`python -m tests.strange COUNT` puts so many errors through the place that judges them.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from random import Random
from typing import Any, NoReturn

from pamqp.header import ContentHeader
from pymysql.err import DataError, InterfaceError, OperationalError

from aioworker.clock import own_time
from aioworker.errors import (
    AioworkerError,
    BrokerError,
    CrashLoopError,
    DatabaseError,
    DeadLetter,
    MessageRefusedError,
    Retry,
    RowsRefusedError,
    TaskExitError,
    TurnLostError,
    name_of,
)
from aioworker.logs import ConsoleFormatter, JsonFormatter
from aioworker.rabbitmq import copies
from aioworker.rabbitmq.delivery import Delivery
from aioworker.settling.failure import Failure, Fault
from aioworker.settling.outcome import Kind, Outcome
from aioworker.settling.report import Report
from aioworker.settling.rows import Ids
from aioworker.settling.start import Held, Start
from aioworker.tasks.context import Context
from tests.fakes import delivered

RAISED: tuple[type[BaseException], ...] = (
    *(ValueError, AttributeError, RecursionError, MemoryError, StopIteration),
    *(SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError),
)
BASES: tuple[type[BaseException], ...] = (
    *RAISED,
    *(Exception, BaseException, OSError, KeyError, SyntaxError, TimeoutError, StopAsyncIteration),
    *(AioworkerError, BrokerError, CrashLoopError, DatabaseError, DeadLetter, MessageRefusedError),
    *(Retry, RowsRefusedError, TaskExitError, TurnLostError),
    *(DataError, InterfaceError, OperationalError),
)
METHODS = (
    *("__str__", "__repr__", "__eq__", "__hash__", "__bool__", "__len__", "__iter__", "__format__"),
    *("__getattribute__", "__setattr__", "__delattr__", "with_traceback", "add_note", "__reduce__"),
)
PROPERTIES = (
    *("__class__", "__cause__", "__context__", "__traceback__", "__suppress_context__"),
    *("__notes__", "__dict__", "args", "code", "errno", "filename", "text", "msg", "exceptions"),
    *("written", "reasons", "unreachable"),
)
OF_CLASS = ("__name__", "__module__", "__mro__", "__doc__", "__dict__")
# Without `__subclasscheck__`: Python 3.11 calls it to raise the error, and raises what it raises.
METHODS_OF_CLASS = ("__getattribute__", "__instancecheck__", "__hash__", "__eq__", "__repr__")
TEXTS = (
    *("", "no shop", "\ud800 \udfff", "\x1b[2J\r\n\u2028 INFO forged", "\0", "é" * 70_000),
    *("x" * 1_000_000, "%s %d %(name)s", "{} {0.__class__}"),
)
NUMBERS = (0, -1, 2**63, 10**5000, float("nan"), float("-inf"), 1e300, True)
NOW = datetime(2026, 11, 28, tzinfo=UTC)


def thing(random: Random, depth: int = 0) -> Any:
    """Return a value that somebody may pass, count or return."""
    match random.randrange(7):
        case 0:
            return random.choice(TEXTS)
        case 1:
            return random.choice(NUMBERS)
        case 2 if depth < 3:
            return [thing(random, depth + 1) for _ in range(random.randrange(4))]
        case 3 if depth < 3:
            return {str(number): thing(random, depth + 1) for number in range(random.randrange(4))}
        case 4:
            return random.choice((None, b"\xff", object, NOW, Ellipsis, iter(())))
        case 5:
            bases = random.choice(((), (str,), (int,), (float,), (dict,), (list,), (bytes,)))
            return _class(random, bases)()
    return object()


def error_of(random: Random, depth: int = 0) -> BaseException:
    """Return an error as a task may raise it: alone, in groups, with causes in a circle."""
    if depth < 4 and random.random() < 0.15:
        return _group(random, depth)
    made = _error(random)
    if depth < 4 and random.random() < 0.3:
        for slot in random.sample(("__cause__", "__context__"), random.randint(1, 2)):
            came_from = random.choice((made, error_of(random, depth + 1)))
            BaseException.__dict__[slot].__set__(made, came_from)
            BaseException.__dict__[random.choice(("__cause__", "__context__"))].__set__(
                came_from, made
            )
    return made


def _group(random: Random, depth: int) -> BaseException:
    inner = [error_of(random, depth + 1) for _ in range(random.randint(1, 3))]
    try:
        whole: BaseException = BaseExceptionGroup(random.choice(TEXTS[:4]), inner)
    except BaseException:  # noqa: BLE001 - it can be in no group, for anybody
        return inner[0]
    if random.random() < 0.1:
        return random.choice(SHAPES)(random, whole)
    return whole


def _deep(random: Random, inner: BaseException) -> BaseException:
    """Return it in a group in a group, and so on: deeper than Python calls."""
    for _ in range(random.choice((10, 300, 3000, 30_000))):
        inner = BaseExceptionGroup("deep", [inner])
    return inner


def _shared(random: Random, inner: BaseException) -> BaseException:
    """Return it in a group, twice, in a group, twice: by 2 to the power of the depth paths."""
    for _ in range(random.choice((5, 22, 300))):
        inner = BaseExceptionGroup("shared", [inner, inner])
    return inner


def _wide(random: Random, inner: BaseException) -> BaseException:
    """Return it among many, all of them raised, each again in the next group."""
    for _ in range(random.randint(1, 3)):
        many = [_caught(ValueError(number)) for number in range(random.choice((20, 500, 20_000)))]
        inner = BaseExceptionGroup("wide", [*many, inner, *many])
    return inner


def _chained(random: Random, inner: BaseException) -> BaseException:
    """Return what came from it, in many steps, each a group of the one before, twice."""
    for _ in range(random.choice((5, 22, 300))):
        step = BaseExceptionGroup("chained", [inner, inner])
        step.__cause__ = BaseExceptionGroup("cause", [inner, inner])
        BaseException.__dict__["__context__"].__set__(step, inner)
        inner = step
    return inner


SHAPES = (_deep, _shared, _wide, _chained)


def _caught(error: BaseException) -> BaseException:
    try:
        raised(error)
    except BaseException as caught:  # noqa: BLE001 - as the worker catches it
        return caught
    raise AssertionError


def _error(random: Random) -> BaseException:
    base = random.choice(BASES)
    kind = base if random.random() < 0.2 else _class(random, (base,))
    given = [thing(random) for _ in range(random.randrange(3))]
    try:
        made: BaseException = base.__new__(kind, *given)
    except BaseException:  # noqa: BLE001 - it cannot be made of these, by anybody
        made = base.__new__(kind)
    # Some `__init__` wants other things; what is half made is as strange.
    with suppress(BaseException):
        if random.random() < 0.5:
            base.__init__(made, *given)
    return made


def _class(random: Random, bases: tuple[type, ...]) -> Any:
    """Return a class some of whose methods and properties raise, or return what they may not."""
    body: dict[str, Any] = {}
    for name in random.sample(METHODS, random.randrange(3)):
        body[name] = _method(random)
    for name in random.sample(PROPERTIES, random.randrange(3)):
        body[name] = property(_method(random))
    meta: type[type] = type
    if random.random() < 0.2:
        of_class: dict[str, Any] = {random.choice(OF_CLASS): property(_method(random))}
        of_class |= {name: _method(random) for name in random.sample(METHODS_OF_CLASS, 1)}
        meta = type("Meta", (type,), of_class)
    return meta("Strange", bases, body)


def _method(random: Random) -> Callable[..., Any]:
    if random.random() < 0.3:
        found = random.choice((*TEXTS, *NUMBERS, None, object(), ValueError))
        return lambda *_args, **_names: found
    kind, well = random.choice(RAISED), random.choice((0, 0, 0, 1, 2, 5))

    def method(*_args: object, **_names: object) -> None:
        nonlocal well
        well -= 1
        if well < 0:  # some behave at first
            raise kind("of an object's own code")

    return method


def raised(error: BaseException) -> None:
    """Raise an error from a line of its own."""
    raise error


class Judge:
    """Puts errors and counts through all that a failed run goes through; fails where one gets out.

    Attributes:
        faults: How many came to which fault.
    """

    def __init__(self) -> None:
        self.faults = dict.fromkeys(Fault, 0)
        self._log = logging.getLogger("aioworker.consumer")
        self._report = Report(5, own_time, "strange")
        self._delivery = Delivery.of(
            delivered(headers={"id": "strange", "task": "strange"}, message_id="strange")
        )

    def judge(self, error: BaseException, counts: dict[Any, Any]) -> None:
        """Judge what a run raised and counted, tell of it, and copy its message."""
        failure = self._failure(error)
        self.faults[failure.fault] += 1
        ctx = Context(None, "strange", "strange")  # type: ignore[arg-type]  # asked nothing
        dict.update(ctx.counts, counts)
        for kind in (Kind.RETRY, Kind.DEAD_LETTER):
            result = Outcome(kind, failure.words, failure)
            if kind is Kind.RETRY:
                copy = copies.retry(
                    self._delivery, result.reason, NOW, counts=True, lost=failure.lost
                )
            else:
                copy = copies.dead_letter(
                    self._delivery, result.reason, failure.name, failure.traceback, "worker", NOW
                )
            ContentHeader(body_size=0, properties=copy.properties).marshal()
        self._report.settled(Start(Ids()), [Held(self._delivery, ctx, outcome=result)])

    def _failure(self, error: BaseException) -> Failure:
        try:
            raised(error)
        except BaseException as caught:  # noqa: BLE001 - as the worker catches it
            failure = Failure.of(caught)
        texts = (failure.name, failure.words, failure.traceback, failure.fingerprint)
        assert {type(text) for text in texts} == {str}
        assert failure.words
        assert failure.words.isprintable() or "\n" not in failure.words
        "".join(texts).encode()
        return failure


class Lines(logging.Handler):
    """Formats each record in both forms, and looks whether a line of it is forged."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Format it."""
        head, *rest = ConsoleFormatter().format(record).split("\n")
        assert head.isprintable()
        assert all(one.isprintable() and one.startswith("    ") for one in rest)
        line = JsonFormatter().format(record)
        assert line.isprintable()
        assert json.loads(line, parse_constant=_no_json)["logger"] == record.name
        self.count += 1


def _no_json(constant: str) -> NoReturn:
    raise AssertionError(f"no JSON: {constant}")


def counts_of(random: Random) -> dict[Any, Any]:
    """Return what a task may count, its keys as odd as its values."""
    found: dict[Any, Any] = {}
    for _ in range(random.randrange(4)):
        try:
            found[thing(random)] = thing(random)
        except BaseException:  # noqa: BLE001 - it can be no key, for anybody
            continue
    return found


def judge_all(numbers: range) -> dict[Fault, int]:
    """Judge the errors of these numbers; say which one got out."""
    judge, lines = Judge(), Lines()
    log = logging.getLogger("aioworker.consumer")
    before = log.level, log.propagate
    log.setLevel(logging.DEBUG)
    log.propagate = False
    log.addHandler(lines)
    try:
        for number in numbers:
            random = Random(number)
            try:
                judge.judge(error_of(random), counts_of(random))
            except BaseException as error:
                raise AssertionError(f"number {number} got out: {name_of(error)}") from error
    finally:
        log.removeHandler(lines)
        log.level, log.propagate = before
    assert lines.count == len(numbers)
    return judge.faults


if __name__ == "__main__":
    began = time.monotonic()
    found = judge_all(range(int(sys.argv[1])))
    sys.stdout.write(f"{found} in {time.monotonic() - began:.0f} s\n")
