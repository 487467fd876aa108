"""A user's module, read by mypy and never run: what the types of aioworker promise.

Each `type: ignore` stands on a mistake; mypy fails where one stops being noticed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Iterator
from logging import Logger
from typing import Any, assert_type

import aioworker
from aioworker import (
    AioworkerError,
    Budget,
    Context,
    DeadLetter,
    Producer,
    Retry,
    Task,
    publish_sync,
    task,
)
from aioworker.mysql.database import Database
from aioworker.testing import Message, Run, published, rolled_back, run

assert_type(aioworker.__version__, str)


# A bare decorator, and one with options: the function keeps its signature.


@task
async def greet(name: str, *, times: int = 1) -> str:
    return name * times


@task
def double(number: int) -> int:
    return 2 * number


@task(name="shop.note", max_retries=3, timeout=2.5)
def note(ctx: Context, text: str) -> None:
    ctx.log.info(text)


async def calls(ctx: Context) -> None:
    assert_type(await greet("x", times=2), str)
    assert_type(double(2), int)
    assert_type(double.name, str)
    note(ctx, text="x")

    await greet(1)  # type: ignore[arg-type]
    await greet("x", 2)  # type: ignore[call-arg]
    await greet("x", time=2)  # type: ignore[call-arg]
    double("2")  # type: ignore[arg-type]
    double(number=None)  # type: ignore[arg-type]
    note("x")  # type: ignore[arg-type, call-arg]
    note(ctx, 1)  # type: ignore[arg-type]


writes = Budget("writes", rate_limit="6/m")
Budget("writes")  # type: ignore[call-arg]
Budget("writes", rate_limit=6)  # type: ignore[arg-type]


@task(budget=writes, rate_limit="2/m")
def shared(ctx: Context) -> None: ...


@task(budget="writes")  # type: ignore[call-overload, untyped-decorator]
def budget_is_an_object() -> None: ...


@task(rate_limit=2)  # type: ignore[call-overload, untyped-decorator]
def rate_is_text() -> None: ...


@task(rate="2/m")  # type: ignore[call-overload, untyped-decorator]
def rate_is_misspelt() -> None: ...


# Keys may be written in any way that yields pages, of ids or of rows.


async def asked(ctx: Context, after: int) -> AsyncIterator[list[int]]:
    yield [after + 1]


def plain() -> Iterator[list[tuple[int, float]]]:
    yield [(1, 2.5)]


async def all_at_once() -> list[list[int]]:
    return [[1, 2], [3]]


def not_in_pages() -> Iterator[int]:
    yield 1


@task(rate_limit="2/m", keys=asked, constants=("up",))
async def move(ctx: Context, ids: list[int], direction: str) -> None:
    ctx.counts["moved"] += len(ids)


@task(rate_limit="20/h", keys=plain)
def average(rows: list[tuple[int, float]]) -> None: ...


@task(keys=all_at_once)
def remove(ids: list[int]) -> None: ...


@task(keys=not_in_pages)  # type: ignore[arg-type]
def no_pages(ids: list[int]) -> None: ...


# What `needed` registers keeps its type as well.


@move.needed
async def stale(ctx: Context, ids: list[int]) -> list[int]:
    return ids


@average.needed
def differing(rows: list[tuple[int, float]]) -> list[tuple[int, float]]:
    return rows


async def chunks(ctx: Context) -> None:
    assert_type(await move(ctx, [1], "up"), None)
    assert_type(await stale(ctx, [1]), list[int])
    assert_type(differing([(1, 2.5)]), list[tuple[int, float]])

    await move(ctx, 1, "up")  # type: ignore[arg-type]
    await move(ctx, ["1"], "up")  # type: ignore[list-item]
    await stale(ctx, 1)  # type: ignore[arg-type]
    differing([1])  # type: ignore[list-item]


# A context, in a coroutine and in a thread.


async def in_a_coroutine(ctx: Context) -> None:
    assert_type(ctx.task, str)
    assert_type(ctx.message_id, str)
    assert_type(ctx.attempt, int)
    assert_type(ctx.log, Logger)
    assert_type(ctx.counts, Counter[str])
    async with ctx.transaction() as cursor:
        assert_type(await cursor.execute("UPDATE shops SET rating = %s", (1,)), int)
    rows = await ctx.database.query("SELECT id FROM shops")
    assert_type(rows, list[tuple[Any, ...]])

    ctx.attempt = 2  # type: ignore[misc]


def in_a_thread(ctx: Context) -> None:
    with ctx.transaction() as cursor:
        assert_type(cursor.execute("UPDATE shops SET rating = %s", (1,)), int)
        assert_type(cursor.executemany("UPDATE shops SET rating = %s", [(1,)]), int)
        assert_type(cursor.fetchone(), tuple[Any, ...] | None)
        assert_type(cursor.fetchall(), list[tuple[Any, ...]])


# Publishing: by the task or by its name.


async def publish(by_name: str, any_task: Task[..., Any]) -> str:
    async with Producer("amqp://127.0.0.1/", timeout=5) as producer:
        assert_type(producer, Producer)
        assert_type(await producer.publish(greet, "x", times=2), str)
        assert_type(await producer.publish(by_name, [1], urgent=True), str)
        assert_type(await producer.publish(any_task), str)
        assert_type(await greet.publish(producer, "x"), str)
        await producer.publish(1)  # type: ignore[arg-type]
        await producer.publish(greet, "x", urgent="yes")  # type: ignore[arg-type]
        await greet.publish("x")  # type: ignore[arg-type]
    return await Producer().publish(move, [1], "up")


def publish_without_a_loop() -> None:
    assert_type(publish_sync(greet, "x", times=2), str)
    assert_type(publish_sync("shop.note", "x", urgent=True), str)
    assert_type(note.publish_sync("x", urgent=True), str)
    publish_sync(1)  # type: ignore[arg-type]
    note.publish_sync("x", urgent="yes")  # type: ignore[arg-type]


# Testing: what was published, and a run.


async def try_tasks() -> None:
    with published() as messages:
        note.publish_sync("x")
    assert_type(messages, list[Message])
    assert_type(messages[0].args, tuple[Any, ...])
    assert messages == [Message("shop.note", ("x",), urgent=True)]
    done = await run(move, [1], "up", database="mysql://127.0.0.1/test", rollback=True)
    assert_type(done, Run)
    assert_type(done.counts, Counter[str])
    assert_type(done.needed, list[Any] | None)
    async with rolled_back("mysql://127.0.0.1/test") as database:
        assert_type(database, Database)
        await run("shop.note", "x", database=database)
    Message(note)  # type: ignore[arg-type]
    messages[0].urgent = True  # type: ignore[misc]
    await run(1)  # type: ignore[arg-type]
    await run(note, "x", database=True)  # type: ignore[arg-type]


# What a task may raise, and what it all is.


@task
def fail(again: bool) -> None:
    raise Retry("later") if again else DeadLetter("never")


def catch() -> None:
    try:
        fail(again=True)
    except AioworkerError as error:
        assert_type(error, AioworkerError)
    fail("again")  # type: ignore[arg-type]
