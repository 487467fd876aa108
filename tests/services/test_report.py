"""What the log tells of a run that failed: where, and not again and again."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import pytest

from aioworker import DeadLetter, Retry
from aioworker.logs import ConsoleFormatter, JsonFormatter
from aioworker.tasks.task import AnyTask, Task
from tests.conftest import TASK, Lanes, make_database, make_worker

if TYPE_CHECKING:
    from support.servers import Servers

Serve = Callable[..., Awaitable[list[logging.LogRecord]]]


@pytest.fixture
def serve(
    pair: Servers, lanes: Lanes, stop: asyncio.Event, shop: object, caplog: pytest.LogCaptureFixture
) -> Serve:
    """Serve a message for each argument; return the lines that tell what they came to."""

    async def run(
        task: AnyTask, *arguments: Any, level: int = logging.INFO, rate_limit: str | None = None
    ) -> list[logging.LogRecord]:
        caplog.set_level(level, "aioworker")
        for one in arguments:
            await lanes.send(json.dumps([[one], {}, None]).encode())
        database = make_database(pair)
        worker = make_worker(pair, database, task=task, task_timeout=2, rate_limit=rate_limit)
        await worker.run(stop)
        database.close()
        return [one for one in caplog.records if "outcome" in getattr(one, "fields", {})]

    return run


def shown(record: logging.LogRecord) -> str:
    """Return a line's traceback as it was printed; nothing if it has none."""
    return record.exc_text or ""


async def coroutine(shop: object) -> None:
    raise ValueError("coroutine")


def function(shop: object) -> None:
    raise ValueError("function")


def careless(shop: object) -> None:
    next(iter(()))


async def leaving(shop: object) -> None:
    sys.exit(3)


async def slow(shop: object) -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("task", "line"),
    [
        (coroutine, 'raise ValueError("coroutine")'),
        (function, 'raise ValueError("function")'),
        (careless, "next(iter(()))"),
        (leaving, "sys.exit(3)"),
    ],
)
async def test_the_line_of_a_run_that_failed_shows_where(
    serve: Serve, task: Callable[..., Any], line: str
) -> None:
    """Without it nobody knows which of a task's lines raised `KeyError: 'id'`."""
    [record] = await serve(Task(TASK, task), 1)

    assert record.getMessage() == "chunk failed"
    assert line in shown(record)


async def test_a_run_that_was_cut_off_shows_what_it_waited_for(serve: Serve) -> None:
    [record] = await serve(Task(TASK, slow), 1)

    assert "await asyncio.Event().wait()" in shown(record)


async def test_a_function_that_says_what_is_needed_shows_where_it_failed(serve: Serve) -> None:
    async def rate(shops: list[int]) -> None: ...

    def needed(shops: list[int]) -> list[int]:
        raise LookupError("no shops")

    task = Task(TASK, rate)
    task.needed(needed)

    [record] = await serve(task, [1], rate_limit="100/s")

    assert record.getMessage() == "chunk failed"
    assert 'raise LookupError("no shops")' in shown(record)


async def test_a_traceback_is_shown_once_a_minute_for_each_kind_of_error(serve: Serve) -> None:
    """A task that fails at every message fills no disk; a second fault is seen at once."""

    def fail(shop: int) -> None:
        if shop < 4:
            raise ValueError(f"shop {shop}")
        raise KeyError(shop)

    records = await serve(Task(TASK, fail), 1, 2, 3, 4, 5)

    ends = [shown(one).rpartition("\n")[2] for one in records]
    assert ends == ["ValueError: shop 1", "", "", "KeyError: 4", ""]


async def test_an_error_that_quotes_its_message_fills_no_log(serve: Serve) -> None:
    """Some libraries' errors hold all that they were given, here a megabyte."""

    def quote(shop: int) -> None:
        raise ValueError("x" * 1_000_000)

    for formatter in (ConsoleFormatter(), JsonFormatter()):
        [*_, record] = await serve(Task(TASK, quote), 1, level=logging.DEBUG)
        record.exc_text = None

        assert 16_000 < len(formatter.format(record)) < 40_000


async def test_every_traceback_is_shown_at_the_level_debug(serve: Serve) -> None:
    records = await serve(Task(TASK, coroutine), 1, 2, 3, level=logging.DEBUG)

    assert ['raise ValueError("coroutine")' in shown(one) for one in records] == [True] * 3


@pytest.mark.parametrize(
    "error",
    [
        DeadLetter("no such shop"),
        Retry("not yet"),
        ExceptionGroup("all", [DeadLetter("no such shop"), Retry("not yet")]),
    ],
    ids=["dead letter", "retry", "group"],
)
async def test_what_is_expected_shows_no_traceback(serve: Serve, error: Exception) -> None:
    def fail(shop: int) -> None:
        raise error

    [record] = await serve(Task(TASK, fail), 1, level=logging.DEBUG)

    assert record.fields["reason"]  # type: ignore[attr-defined]
    assert shown(record) == ""


async def test_a_message_that_is_refused_shows_no_traceback(serve: Serve) -> None:
    def two(shop: int, stars: int) -> None: ...

    [record] = await serve(Task(TASK, two), 1)

    assert record.getMessage() == "message refused"
    assert shown(record) == ""
