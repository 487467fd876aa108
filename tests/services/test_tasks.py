"""A user's functions, run from real messages: coroutines, and plain ones in threads."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from aioworker import Context, DeadLetter, Retry
from aioworker.errors import TaskError
from aioworker.logs import ConsoleFormatter
from aioworker.settling.outcome import Kind
from aioworker.tasks.task import AnyTask, Task
from tests.conftest import QUEUES, TASK, Lanes, execute, make_database, make_worker, rows

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

    from aioworker.mysql.database import Database
    from support.servers import Servers

Served = Callable[..., Any]
LATER = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
BEFORE = (datetime.now(UTC) - timedelta(seconds=1)).replace(tzinfo=None).isoformat()


@pytest.fixture
def serve(pair: Servers, lanes: Lanes, stop: asyncio.Event, shop: object) -> Served:
    """Send one message of a task, serve it, and return what it came to."""

    async def run(
        task: AnyTask, *args: Any, timeout: float = 30, headers: Any = None, **kwargs: Any
    ) -> dict[Kind, int]:
        body = json.dumps([list(args), kwargs, None]).encode()
        await lanes.send(body, headers={"task": TASK, "id": "one"} | (headers or {}))
        database = make_database(pair, timeout=timeout)
        worker = make_worker(pair, database, task=task, task_timeout=timeout)
        await worker.run(stop)
        database.close()
        return dict(worker.consumer.settled)

    return run


@pytest.fixture
def ratings(shop: Connection[Cursor]) -> Connection[Cursor]:
    """A table that the tasks write to."""
    execute(shop, "CREATE TABLE ratings (shop INT PRIMARY KEY, rating INT NOT NULL)")
    return shop


def written(shop: Connection[Cursor]) -> list[tuple[Any, ...]]:
    return rows(shop, "SELECT shop, rating FROM ratings ORDER BY shop")


async def test_a_coroutine_gets_what_was_published(serve: Served) -> None:
    got: list[Any] = []

    async def note(*args: Any, **kwargs: Any) -> None:
        got.append((args, kwargs))

    settled = await serve(Task(TASK, note), 1, "two", [3], four={"five": None})

    assert settled == {Kind.ACK: 1}
    assert got == [((1, "two", [3]), {"four": {"five": None}})]


async def test_arguments_are_read_by_their_types(serve: Served) -> None:
    got: list[Any] = []

    def note(when: datetime, *rest: float, row: tuple[int, str]) -> None:
        got.append((when, rest, row))

    settled = await serve(Task(TASK, note), LATER, 1, row=[3, "x"])

    assert settled == {Kind.ACK: 1}
    assert got == [(datetime.fromisoformat(LATER), (1.0,), (3, "x"))]


async def test_an_argument_of_another_type_is_a_dead_letter_unrun(
    serve: Served, lanes: Lanes
) -> None:
    got: list[Any] = []

    async def note(number: int) -> None:
        got.append(number)

    assert await serve(Task(TASK, note), "42") == {Kind.DEAD_LETTER: 1}
    reason = (await lanes.take(QUEUES.dead)).headers["x-aioworker-reason"]
    assert (reason, got) == ("argument number: expected a valid integer, got: '42'", [])


async def test_a_plain_function_runs_in_a_thread_of_its_own(serve: Served) -> None:
    """It may block: the event loop does not feel it."""
    ran_in: list[str] = []
    beats = 0

    def block(seconds: float) -> None:
        ran_in.append(threading.current_thread().name)
        time.sleep(seconds)

    async def beat() -> None:
        nonlocal beats
        while True:
            await asyncio.sleep(0.01)
            beats += 1

    beating = asyncio.create_task(beat())
    settled = await serve(Task(TASK, block), 0.5)
    beating.cancel()

    assert settled == {Kind.ACK: 1}
    assert ran_in == [f"aioworker {TASK}"]
    assert beats > 10


@pytest.mark.parametrize(
    "statement", ["SET autocommit = 0", "SET completion_type = CHAIN, autocommit = 0"]
)
async def test_a_transaction_that_a_task_leaves_open_takes_nothing_of_ours_back(
    pair: Servers,
    lanes: Lanes,
    database: Database,
    ratings: Connection[Cursor],
    stop: asyncio.Event,
    caplog: pytest.LogCaptureFixture,
    statement: str,
) -> None:
    """Its next charge was not committed, a pause got 1205, and a death was noted that was none."""

    async def rate(ctx: Context, number: int) -> None:
        async with ctx.transaction() as cursor:
            await cursor.execute(statement)
            await cursor.execute("INSERT INTO ratings VALUES (%s, 1)", (number,))

    for number in (1, 2):
        await lanes.send(json.dumps([[number], {}, None]).encode())
    worker = make_worker(pair, database, task=Task(TASK, rate), rate_limit="1000/s")

    assert await worker.run(stop)

    # Another session reads and writes the row: nothing is left open, nothing is kept back.
    execute(ratings, "SET innodb_lock_wait_timeout = 1", "UPDATE aioworker_budget SET paused = 1")
    assert rows(ratings, "SELECT starts, running, deaths FROM aioworker_budget") == [
        (2, None, None)
    ]
    assert [number for number, _score in written(ratings)] == [1, 2]
    assert "worker died" not in caplog.text


async def test_a_coroutines_transaction_is_whole_or_nothing(
    serve: Served, ratings: Connection[Cursor]
) -> None:
    async def rate(ctx: Context, shops: list[int]) -> None:
        for shop in shops:
            async with ctx.transaction() as cursor:
                await cursor.execute("INSERT INTO ratings VALUES (%s, 1)", (shop,))
                if shop == 2:
                    raise ValueError("closed")

    settled = await serve(Task(TASK, rate), [1, 2])

    assert settled == {Kind.RETRY: 1}
    assert written(ratings) == [(1, 1)]


async def test_a_threads_transaction_is_whole_or_nothing(
    serve: Served, ratings: Connection[Cursor]
) -> None:
    """The same words without `async`, on the same connection: the one that holds the turn."""
    found: list[Any] = []

    def rate(ctx: Context, shops: list[int]) -> None:
        for shop in shops:
            with ctx.transaction() as cursor:
                cursor.executemany("INSERT INTO ratings VALUES (%s, %s)", [(shop, 1)])
                found.append(cursor.execute("SELECT rating FROM ratings WHERE shop = %s", (shop,)))
                found.append(cursor.fetchone())
                found.append(cursor.fetchall())
                if shop == 2:
                    raise ValueError("closed")

    settled = await serve(Task(TASK, rate), [1, 2, 3])

    assert settled == {Kind.RETRY: 1}
    assert found == [1, (1,), [], 1, (1,), []]
    assert written(ratings) == [(1, 1)]


async def test_a_statement_that_a_thread_forgives_does_not_end_its_transaction(
    serve: Served, ratings: Connection[Cursor]
) -> None:
    def rate(ctx: Context) -> None:
        with ctx.transaction() as cursor:
            cursor.execute("INSERT INTO ratings VALUES (1, 1)")
            with pytest.raises(Exception, match="Duplicate"):
                cursor.execute("INSERT INTO ratings VALUES (1, 2)")
            cursor.execute("INSERT INTO ratings VALUES (2, 2)")

    assert await serve(Task(TASK, rate)) == {Kind.ACK: 1}
    assert written(ratings) == [(1, 1), (2, 2)]


@dataclass(frozen=True)
class NoShopError(DeadLetter):
    """What a task raises of its own; nothing can be set on it, not even its traceback."""

    shop: int

    def __str__(self) -> str:
        return f"no shop {self.shop}"


async def raise_frozen(ctx: Context) -> None:
    raise NoShopError(7)


async def raise_frozen_in_transaction(ctx: Context) -> None:
    async with ctx.transaction() as cursor:
        await cursor.execute("INSERT INTO ratings VALUES (7, 1)")
        raise NoShopError(7)


def raise_frozen_in_thread(ctx: Context) -> None:
    with ctx.transaction() as cursor:
        cursor.execute("INSERT INTO ratings VALUES (7, 1)")
        raise NoShopError(7)


@pytest.mark.parametrize("run", [raise_frozen, raise_frozen_in_transaction, raise_frozen_in_thread])
async def test_an_exception_that_is_a_frozen_dataclass_is_what_it_is(
    serve: Served, lanes: Lanes, ratings: Connection[Cursor], run: Callable[[Context], Any]
) -> None:
    """`contextlib` fails to carry one, and raises FrozenInstanceError in its place."""
    settled = await serve(Task(TASK, run))

    assert settled == {Kind.DEAD_LETTER: 1}
    assert (await lanes.take(QUEUES.dead)).headers["x-aioworker-reason"] == "no shop 7"
    assert written(ratings) == []


class Leaving(str):
    """A parameter whose own code ends its process, as far as it can."""

    __slots__ = ()

    def translate(self, _table: object) -> str:
        """Leave, in place of being made a part of the statement."""
        sys.exit(3)


async def test_what_a_parameters_own_code_raises_is_raised_in_the_thread_alone(
    serve: Served,
) -> None:
    """The event loop writes the statement for it; that would have ended the worker."""
    caught: list[type[BaseException]] = []

    def leave(ctx: Context) -> None:
        with ctx.transaction() as cursor:
            try:
                cursor.execute("SELECT %s", [Leaving("x")])
            except SystemExit as error:
                caught.append(type(error))

    settled = await serve(Task(TASK, leave))

    assert (settled, caught) == ({Kind.ACK: 1}, [SystemExit])


async def test_a_thread_that_is_late_writes_nothing_more_and_is_waited_for(
    serve: Served, ratings: Connection[Cursor], lanes: Lanes
) -> None:
    """A thread cannot be cancelled; its statement can, and its connection is closed."""
    after: list[str] = []

    def rate(ctx: Context) -> None:
        try:
            with ctx.transaction() as cursor:
                cursor.execute("INSERT INTO ratings VALUES (1, 1)")
                cursor.execute("INSERT INTO ratings SELECT 2, SLEEP(20)")
        except Exception as error:
            time.sleep(0.5)
            after.append(type(error).__name__)
            raise
        after.append("done")

    began = time.monotonic()
    settled = await serve(Task(TASK, rate), timeout=1)

    assert settled == {Kind.RETRY: 1}
    assert len(after) == 1
    assert after != ["done"]
    assert time.monotonic() - began < 15
    assert written(ratings) == []
    running = "SELECT info FROM information_schema.processlist WHERE info LIKE '%SLEEP(20)%'"
    assert [one for one in rows(ratings, running) if "processlist" not in one[0]] == []
    assert "cut off" in str((await lanes.take(QUEUES.retry)).headers["x-aioworker-reason"])


@pytest.mark.parametrize(("retries", "kind"), [(0, Kind.RETRY), (5, Kind.DEAD_LETTER)])
async def test_a_task_can_ask_for_another_attempt(
    serve: Served, lanes: Lanes, retries: int, kind: Kind
) -> None:
    async def rate() -> None:
        raise Retry("the other site is\ndown")

    settled = await serve(Task(TASK, rate), headers={"retries": retries})

    assert settled == {kind: 1}
    copy = await lanes.take(QUEUES.retry if kind is Kind.RETRY else QUEUES.dead)
    reason = str(copy.headers["x-aioworker-reason"])
    assert reason == "the other site is down" + ("; attempt 6 of 6" if retries else "")


@pytest.mark.parametrize("its_own", [True, False])
async def test_only_a_run_whose_time_is_up_is_said_to_be_cut_off(
    serve: Served, lanes: Lanes, *, its_own: bool
) -> None:
    async def wait() -> None:
        async with asyncio.timeout(0.05 if its_own else 60):
            await asyncio.sleep(60)

    await serve(Task(TASK, wait), timeout=30 if its_own else 1)

    copy = await lanes.take(QUEUES.retry)
    told = "TimeoutError"
    told += "" if its_own else ": the run took longer than 1 s and was cut off"
    assert copy.headers["x-aioworker-reason"] == told


async def test_whatever_a_task_counts_its_line_is_ours(
    serve: Served, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aioworker")

    async def count(ctx: Context) -> None:
        counts: dict[Any, Any] = ctx.counts
        counts.update({"outcome": 1, "lane": 2, 5: 3, ("a", 1): 4, "b\nc": 5, "plain": 6})

    assert await serve(Task(TASK, count)) == {Kind.ACK: 1}

    [told] = [record for record in caplog.records if record.message == "chunk done"]
    line = ConsoleFormatter().format(told)
    ours = "lane=bulk attempt=1 counts.outcome=1 counts.lane=2 5=3"
    assert f'{ours} "(\'a\', 1)"=4 "b\\nc"=5 plain=6 wait_seconds=' in line
    assert line.endswith(" outcome=ack")


async def test_a_task_can_set_its_message_aside(serve: Served, lanes: Lanes) -> None:
    def rate(shop: int) -> None:
        raise DeadLetter(f"no shop {shop}")

    settled = await serve(Task(TASK, rate), 7)

    assert settled == {Kind.DEAD_LETTER: 1}
    letter = await lanes.take(QUEUES.dead)
    assert (letter.headers["x-aioworker-reason"], letter.headers["x-aioworker-error"]) == (
        "no shop 7",
        "DeadLetter",
    )


async def test_arguments_that_do_not_fit_are_a_dead_letter_unrun(
    serve: Served, lanes: Lanes
) -> None:
    ran: list[int] = []

    def rate(shop: int, *, stars: int) -> None:
        ran.append(shop + stars)

    settled = await serve(Task(TASK, rate), 7, star=3)

    assert (settled, ran) == ({Kind.DEAD_LETTER: 1}, [])
    reason = str((await lanes.take(QUEUES.dead)).headers["x-aioworker-reason"])
    assert re.fullmatch(
        r"expected arguments \(shop, \*, stars\): missing a required .*argument: 'stars'", reason
    ), reason


async def test_a_body_in_another_encoding_is_not_read_as_another_text(
    pair: Servers, lanes: Lanes, database: Database, shop: object, stop: asyncio.Event
) -> None:
    got: list[str] = []

    async def note(name: str) -> None:
        got.append(name)

    body = '[["\u00c3\u00a9"], {}, null]'.encode("latin-1")
    await lanes.send(body, headers={"task": TASK}, content_encoding="iso-8859-1")

    await make_worker(pair, database, task=Task(TASK, note)).run(stop)

    assert got == []
    letter = await lanes.take(QUEUES.dead)
    told = "expected content encoding utf-8, got: 'iso-8859-1'"
    assert letter.headers["x-aioworker-reason"] == told


async def test_a_message_of_a_php_client_is_run_and_its_attempts_are_counted(
    pair: Servers, lanes: Lanes, database: Database, shop: object, stop: asyncio.Event
) -> None:
    """Its empty array is a list, its numbers are text, its type is that of a web page."""
    got: list[Any] = []

    async def note(name: str) -> None:
        got.append(name)
        raise Retry("again")

    await lanes.send(
        '[["caf\u00e9"], [], []]'.encode(),
        headers={"task": TASK, "id": "one", "retries": "3", "timelimit": [None, None]},
        content_type="Application/JSON; charset=UTF-8",
        content_encoding="UTF-8",
    )

    await make_worker(pair, database, task=Task(TASK, note)).run(stop)

    assert got == ["caf\u00e9"]
    assert (await lanes.take(QUEUES.retry)).headers["retries"] == 4


@pytest.mark.parametrize(
    ("expires", "runs"), [(LATER, 1), (BEFORE, 0), (None, 1)], ids=["later", "before", "never"]
)
async def test_a_message_past_its_time_is_acknowledged_unrun(
    serve: Served, lanes: Lanes, expires: str | None, runs: int
) -> None:
    ran: list[int] = []

    settled = await serve(Task(TASK, ran.append), 1, headers={"expires": expires})

    assert (settled, len(ran)) == ({Kind.ACK: 1}, runs)
    assert await lanes.count(QUEUES.dead) == 0


async def test_its_publisher_may_grant_a_run_less_time(serve: Served) -> None:
    async def rate() -> None:
        await asyncio.Event().wait()

    began = time.monotonic()
    settled = await serve(Task(TASK, rate), headers={"timelimit": [None, 1]})

    assert settled == {Kind.RETRY: 1}
    assert time.monotonic() - began < 15


async def test_rows_and_constants_arrive_as_published(
    serve: Served, ratings: Connection[Cursor]
) -> None:
    """Rows are told from ids by the annotation; one that comes twice is done once."""

    async def keys() -> list[list[Any]]:
        return []

    async def rate(ctx: Context, found: list[tuple[int, float]], factor: int = 1) -> None:
        async with ctx.transaction() as cursor:
            for shop, rating in found:
                await cursor.execute("INSERT INTO ratings VALUES (%s, %s)", (shop, rating * factor))

    settled = await serve(Task(TASK, rate, keys=keys), [[1, 2], [3, 4], [1, 2]], 10)

    assert settled == {Kind.ACK: 1}
    assert written(ratings) == [(1, 20), (3, 40)]


async def test_needed_that_returns_nothing_is_named(database: Database) -> None:
    """A forgotten `return`, before anything is charged."""

    def refresh(ids: list[int]) -> None:
        pass

    def forgetful(ids: list[int]) -> None:
        pass

    made = Task(TASK, refresh)
    made.needed(forgetful)

    with pytest.raises(TaskError, match=rf"^task '{TASK}': expected needed to return .* None$"):
        await made.read_needed(Context(database, TASK), [1])


@pytest.mark.parametrize(
    ("given", "returned", "kept"),
    [
        ([3, 5, 7], [7, 3, 7], [3, 7]),
        ([3, 5, 7], {5}, [5]),
        ([3, 5], [], []),
        ([[3, "a"], [5, "b"]], [(5, "b")], [[5, "b"]]),
        ([1], {99: "x", 1: "y"}, "got: 99"),
        ([1], [[1]], "got: [1]"),
        ([1], [{"id": 1}], "got: {'id': 1}"),
        ([[3, "a"]], [3], "got: 3"),
    ],
    ids=str,
)
async def test_needed_tells_a_part_of_its_chunk_or_is_refused(
    database: Database, given: list[Any], returned: Any, kept: list[Any] | str
) -> None:
    """An id that nobody published is not to be written, least of all with the wrong arguments."""
    made = Task(TASK, lambda ids: None)
    made.needed(lambda ids: returned)

    if isinstance(kept, list):
        assert await made.read_needed(Context(database, TASK), given) == kept
        return
    with pytest.raises(TaskError) as refusal:
        await made.read_needed(Context(database, TASK), given)
    assert str(refusal.value) == (f"task '{TASK}': needed: expected a part of the chunk, {kept}")


def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator as anybody writes one."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return call


async def test_a_coroutine_behind_a_wrapper_is_awaited_too(serve: Served) -> None:
    """What is not awaited would be acknowledged, and never run."""
    ran: list[str] = []

    @wrapped
    async def decorated() -> None:
        await asyncio.sleep(0)
        ran.append("wrapper")

    class Async:
        async def __call__(self) -> None:
            await asyncio.sleep(0)
            ran.append("object")

    async def answer() -> None:
        await asyncio.sleep(0)
        ran.append("returned")

    for function in (decorated, Async(), lambda: answer()):
        assert await serve(Task(TASK, function)) == {Kind.ACK: 1}

    assert ran == ["wrapper", "object", "returned"]


@pytest.mark.parametrize("plain", [True, False])
async def test_a_task_that_exits_does_not_end_its_worker(
    serve: Served, lanes: Lanes, plain: bool
) -> None:
    def exits() -> None:
        sys.exit(3)

    async def exits_too() -> None:
        sys.exit(3)

    settled = await serve(Task(TASK, exits if plain else exits_too))

    assert settled == {Kind.RETRY: 1}
    copy = await lanes.take(QUEUES.retry)
    assert copy.headers["x-aioworker-reason"] == "the task called sys.exit(3)"


@pytest.mark.parametrize(
    "error", [asyncio.CancelledError, GeneratorExit, KeyboardInterrupt, BaseException]
)
@pytest.mark.parametrize("coroutine", [False, True])
async def test_nothing_that_a_task_raises_ends_its_worker(
    serve: Served, lanes: Lanes, error: type[BaseException], coroutine: bool
) -> None:
    """Such as the cancellation of something of its own, which it forgot to catch."""

    def leak() -> None:
        raise error("its own")

    async def leak_too() -> None:
        raise error("its own")

    assert await serve(Task(TASK, leak_too if coroutine else leak)) == {Kind.RETRY: 1}

    copy = await lanes.take(QUEUES.retry)
    told = f"the task let out {error.__name__}: its own"
    assert copy.headers["x-aioworker-reason"] == told


async def test_a_function_that_stops_an_iteration_fails_as_any_other(serve: Served) -> None:
    def careless() -> None:
        next(iter(()))

    assert await serve(Task(TASK, careless)) == {Kind.RETRY: 1}


async def test_a_forgotten_async_is_said_and_holds_up_nobody(serve: Served, lanes: Lanes) -> None:
    async def forgot(ctx: Context) -> None:
        with ctx.transaction():
            pass

    assert await serve(Task(TASK, forgot)) == {Kind.RETRY: 1}
    reason = str((await lanes.take(QUEUES.retry)).headers["x-aioworker-reason"])
    assert reason.startswith("RuntimeError: expected `async with ctx.transaction()`")


async def test_a_transaction_inside_another_one_is_refused(
    serve: Served, ratings: Connection[Cursor]
) -> None:
    """Its end would commit the outer one."""

    def nested(ctx: Context) -> None:
        with ctx.transaction() as cursor:
            cursor.execute("INSERT INTO ratings VALUES (1, 1)")
            with ctx.transaction() as inner:
                inner.execute("INSERT INTO ratings VALUES (2, 2)")

    assert await serve(Task(TASK, nested)) == {Kind.RETRY: 1}
    assert written(ratings) == []


async def test_a_thread_that_is_late_cannot_open_another_transaction(
    serve: Served, ratings: Connection[Cursor]
) -> None:
    """Its message is put off: whatever it wrote now would come twice."""
    refused: list[str] = []

    def late(ctx: Context) -> None:
        time.sleep(2)
        try:
            with ctx.transaction() as cursor:
                cursor.execute("INSERT INTO ratings VALUES (1, 1)")
        except Exception as error:
            refused.append(str(error))
            raise

    assert await serve(Task(TASK, late), timeout=1) == {Kind.RETRY: 1}
    assert written(ratings) == []
    assert len(refused) == 1


async def test_a_cursor_ends_with_its_transaction(
    serve: Served, ratings: Connection[Cursor]
) -> None:
    said: list[str] = []

    def outlives(ctx: Context) -> None:
        with ctx.transaction() as cursor:
            cursor.execute("SELECT 1")
        for use in (cursor.fetchone, lambda: cursor.execute("SELECT 1")):
            with pytest.raises(RuntimeError) as refusal:
                use()
            said.append(str(refusal.value))

    assert await serve(Task(TASK, outlives)) == {Kind.ACK: 1}
    assert said == ["expected a transaction that is open, this one has ended"] * 2
