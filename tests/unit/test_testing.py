"""What users test their tasks with: no server is there, and none is missed."""

from __future__ import annotations

import asyncio
import inspect
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from datetime import date
from typing import Any

import pytest
from pydantic import SecretStr

from aioworker import (
    AioworkerError,
    Context,
    DeadLetter,
    Producer,
    Retry,
    publish_sync,
    sync,
    task,
)
from aioworker.addresses import DatabaseAddress
from aioworker.errors import (
    MessageRefusedError,
    TaskError,
    TaskExitError,
    UnknownTaskError,
    UsageError,
)
from aioworker.mysql.database import Database
from aioworker.producer import handing_to
from aioworker.rabbitmq.message import SWEEP
from aioworker.sweep import Sweep, publish_sweep, read_chunks
from aioworker.tasks import registry
from aioworker.testing import Message, Run, published, run
from tests.unit.test_api import TYPED, section

Publish = Callable[..., Coroutine[Any, Any, str]]
NOWHERE = "amqp://127.0.0.1:1/"
DAY = date(2026, 11, 29)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever connects fails; what is registered here is forgotten."""

    def refuse(*_arguments: object) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr(registry, "_registry", {})
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(asyncio.BaseEventLoop, "create_connection", refuse)
    yield
    assert sync._background is None  # no settings were read for it, and no thread was begun


async def by_producer(*args: Any, **kwargs: Any) -> str:
    async with Producer(NOWHERE) as producer:
        return await producer.publish(*args, **kwargs)


async def by_a_function(*args: Any, **kwargs: Any) -> str:
    return publish_sync(*args, **kwargs)


async def by_the_tasks_method(task: Any, *args: Any, **kwargs: Any) -> str:
    return str(task.publish_sync(*args, **kwargs))


async def by_the_task_with_a_producer(task: Any, *args: Any, **kwargs: Any) -> str:
    async with Producer(NOWHERE) as producer:
        return str(await task.publish(producer, *args, **kwargs))


async def in_a_thread(*args: Any, **kwargs: Any) -> str:
    """In one that knows nothing of the context that it is begun in."""
    ids: list[str] = []
    thread = threading.Thread(target=lambda: ids.append(publish_sync(*args, **kwargs)))
    thread.start()
    thread.join()
    return ids[0]


WAYS = [by_producer, by_a_function, by_the_tasks_method, by_the_task_with_a_producer, in_a_thread]


@pytest.mark.parametrize("publish", WAYS, ids=lambda one: one.__name__)
async def test_what_is_published_is_collected_whoever_publishes(publish: Publish) -> None:
    """As the worker gets it: tuples are lists by then."""

    @task
    def note(where: Any, text: str = "") -> None: ...

    with published() as messages:
        first = await publish(note, (3, 5))
        assert [one.task for one in messages] == ["note"]
        second = await publish(note, {1: None}, urgent=True, text="x")

    assert messages == [
        Message("note", ([3, 5],)),
        Message("note", ({"1": None},), {"text": "x"}, urgent=True),
    ]
    assert [one.message_id for one in messages] == [first, second]
    assert first != second


def test_a_chunk_arrives_as_the_function_gets_it() -> None:
    @task
    def rate(shops: list[int]) -> None: ...

    rate.needed(lambda shops: shops)

    with published() as messages:
        rate.publish_sync([[7], 7, 3])

    assert messages == [Message("rate", ([7, 3],))]


@pytest.mark.parametrize("publish", WAYS, ids=lambda one: one.__name__)
async def test_a_date_is_text_on_its_way_and_a_date_again(publish: Publish) -> None:
    got: list[Any] = []

    @task
    def note(day: date, *, until: date) -> None:
        got.extend((day, until))

    with published() as messages:
        await publish(note, DAY, until=DAY)
    [message] = messages
    await run(note, *message.args, **message.kwargs)

    assert message == Message("note", ("2026-11-29",), {"until": "2026-11-29"})
    assert got == [DAY, DAY]


def test_a_date_is_text_for_a_task_that_is_not_imported() -> None:
    with published() as messages:
        publish_sync("shop.note", DAY)

    assert messages == [Message("shop.note", ("2026-11-29",))]


async def test_a_date_is_text_in_a_sweep() -> None:
    @task(keys=lambda: iter([[(1, DAY)]]), constants=(DAY,))
    def move(rows: list[tuple[int, date]], until: date) -> None: ...

    with published() as messages:
        async with Producer(NOWHERE) as producer:
            await producer.publish_swept(move, [(1, DAY)], "sweep")

    assert messages == [Message("move", ([[1, "2026-11-29"]], "2026-11-29"))]


async def test_a_sweep_masks_nothing() -> None:
    """Neither what its keys yield nor a constant is published as `**********`."""
    secret = SecretStr("pass")

    @task(keys=lambda: iter([[(1, secret)]]), constants=(secret,))
    def move(rows: list[tuple[int, str]], word: object) -> None: ...

    words = "expected arguments that JSON can hold, got: SecretStr, of which JSON holds '[*]{10}'"
    nowhere = Database(
        DatabaseAddress.parse("mysql://127.0.0.1/none"), connect_timeout=1, timeout=1
    )
    with pytest.raises(TaskError, match=f"^task 'move': its keys: {words}"):
        [chunk async for chunk in read_chunks(nowhere, move, 1, after=0, only_needed=False)]
    with published() as messages, pytest.raises(UsageError, match=f"^{words}"):
        async with Producer(NOWHERE) as producer:
            await producer.publish_swept(move, [(1, "a")], "sweep")
    assert messages == []


def test_a_message_shows_what_matters_in_a_failed_test() -> None:
    with published() as messages:
        publish_sync("shop.note", 3, urgent=True, text="x")

    assert repr(messages) == (
        "[Message(task='shop.note', args=(3,), kwargs={'text': 'x'}, urgent=True)]"
    )


async def test_a_sweep_is_collected_in_its_order() -> None:
    """What `publish-all` does with chunks, several under way at once."""

    @task(keys=lambda: iter([[1]]), constants=("up",))
    def move(shops: list[int], way: str) -> None: ...

    async def chunks() -> Any:
        for shop in range(1, 101):
            yield [shop]

    sweep = Sweep()
    with published() as messages:
        async with Producer(NOWHERE) as producer:
            await publish_sweep(producer, move, chunks(), sweep, lambda _sweep: None)

    assert messages == [Message("move", ([shop], "up")) for shop in range(1, 101)]
    assert (sweep.chunks, sweep.last_id) == (100, 100)


async def test_all_messages_of_a_sweep_carry_its_id() -> None:
    @task(keys=lambda: iter([[1]]))
    def move(shops: list[int]) -> None: ...

    async def chunks() -> Any:
        for shop in range(1, 4):
            yield [shop]

    found: list[object] = []
    one, other = Sweep(), Sweep()
    with handing_to(lambda outgoing, _urgent: found.append(outgoing.headers[SWEEP])):
        async with Producer(NOWHERE) as producer:
            for sweep in (one, other):
                await publish_sweep(producer, move, chunks(), sweep, lambda _sweep: None)

    assert found == [one.id] * 3 + [other.id] * 3
    assert one.id != other.id


@pytest.mark.parametrize("publish", [by_producer, by_a_function], ids=lambda one: one.__name__)
@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((), {}),
        (([1],), {"txt": "x"}),
        (([0],), {}),
        (([],), {}),
        (([1], object()), {}),
        (([1], float("nan")), {}),
        (([1], "x" * 5_000_000), {}),
    ],
    ids=["nothing", "unknown name", "id 0", "no ids", "no JSON", "NaN", "too long"],
)
async def test_a_wrong_argument_raises_what_it_raises_elsewhere(
    publish: Publish, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    @task(keys=lambda: iter([[1]]))
    def note(shops: list[int], text: str = "") -> None: ...

    with pytest.raises(UsageError) as elsewhere:
        await Producer(NOWHERE).publish(note, *args, **kwargs)
    with published() as messages, pytest.raises(UsageError) as inside:
        await publish(note, *args, **kwargs)

    assert (str(inside.value), messages) == (str(elsewhere.value), [])


def test_a_producer_of_another_event_loop_is_refused_as_elsewhere() -> None:
    with published() as messages:
        producer = Producer(NOWHERE)
        asyncio.run(producer.publish("note"))
        with pytest.raises(UsageError, match="expected a Producer of this event loop"):
            asyncio.run(producer.publish("note"))

    assert len(messages) == 1


def test_of_two_the_inner_one_collects() -> None:
    """One for all tests, so that none of them reaches RabbitMQ, and one in a test."""
    with published() as outer:
        publish_sync("first")
        with published() as inner:
            publish_sync("second")
        publish_sync("third")

    assert [one.task for one in outer] == ["first", "third"]
    assert [one.task for one in inner] == ["second"]


def test_two_may_end_in_any_order() -> None:
    first, second = published(), published()
    with first as messages:
        others = second.__enter__()
        publish_sync("one")
    publish_sync("two")
    second.__exit__(None, None, None)

    assert (messages, [one.task for one in others]) == ([], ["one", "two"])


async def test_afterwards_it_is_rabbitmqs_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an error inside, too; by the same producer."""
    asked: list[str] = []

    async def publish(_self: object, queue: str, _outgoing: object) -> None:
        asked.append(queue)

    monkeypatch.setattr("aioworker.rabbitmq.publisher.Publisher.publish", publish)
    producer = Producer(NOWHERE, queue_prefix="site")

    await producer.publish("note")
    with pytest.raises(ZeroDivisionError), published():
        await producer.publish("note")
        raise ZeroDivisionError
    await producer.publish("note", urgent=True)

    assert asked == ["site.note", "site.note.urgent"]


# A run of what needs no database.


async def test_a_run_gets_its_arguments_as_a_worker_reads_them() -> None:
    got: list[Any] = []

    @task
    async def note(*args: Any, **kwargs: Any) -> None:
        got.append((args, kwargs))

    done = await run(note, (1, 2), {3: None}, text=("x",))

    assert got == [(([1, 2], {"3": None}), {"text": ["x"]})]
    assert (done.counts, done.needed) == ({}, None)


def test_a_def_runs_in_a_thread_and_needs_no_event_loop_of_the_test() -> None:
    threads: list[threading.Thread] = []

    @task
    def note() -> None:
        threads.append(threading.current_thread())

    asyncio.run(run("note"))

    assert threads != [threading.current_thread()]


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "text"),
    [
        ((1, 2), {}, UsageError, "task 'note': expected arguments (text): too many positional"),
        ((object(),), {}, UsageError, "expected arguments that JSON can hold, got: "),
        (
            ({"__type__": "uuid", "__value__": ""},),
            {},
            MessageRefusedError,
            "expected arguments of plain JSON, got kombu's 'uuid'",
        ),
    ],
    ids=["signature", "JSON", "refused"],
)
async def test_what_a_worker_would_not_run_is_not_run(
    args: tuple[Any, ...], kwargs: dict[str, Any], error: type[AioworkerError], text: str
) -> None:
    @task
    def note(text: Any) -> None:
        raise AssertionError

    with pytest.raises(error) as raised:
        await run(note, *args, **kwargs)

    assert str(raised.value).startswith(text)


@pytest.mark.parametrize("error", [Retry("later"), DeadLetter("never"), KeyError(3)], ids=repr)
@pytest.mark.parametrize("asynchronous", [True, False])
async def test_what_a_task_raises_is_raised_as_it_is(error: Exception, asynchronous: bool) -> None:
    @task(name="coroutine")
    async def coroutine() -> None:
        raise error

    @task(name="thread")
    def thread() -> None:
        raise error

    with pytest.raises(type(error)) as raised:
        await run(coroutine if asynchronous else thread)

    assert raised.value is error


async def test_an_exit_is_what_it_is_to_a_worker() -> None:
    """The tests go on."""

    @task
    def leave() -> None:
        sys.exit(3)

    with pytest.raises(TaskExitError, match=r"^the task called sys.exit\(3\)$"):
        await run(leave)


async def test_what_a_run_publishes_is_collected() -> None:
    @task
    def pass_on(shop: int) -> None:
        publish_sync("rate", [shop])

    with published() as messages:
        await run(pass_on, 3)

    assert messages == [Message("rate", ([3],))]


async def test_what_was_published_can_be_run() -> None:
    got: list[int] = []

    @task
    def note(number: int) -> None:
        got.append(number)

    with published() as messages:
        note.publish_sync(3)
    for one in messages:
        await run(one.task, *one.args, **one.kwargs)

    assert got == [3]


async def test_a_task_that_uses_the_database_gets_none_that_was_not_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The one in the settings may be the site's."""
    monkeypatch.setenv("AIOWORKER_MYSQL_URL", "mysql://root@127.0.0.1:3306/site")

    @task
    def note(ctx: Context) -> None: ...

    with pytest.raises(UsageError) as raised:
        await run(note)

    assert str(raised.value) == (
        "task 'note' uses the database: expected the address of one for tests, such as"
        " database='mysql://root@127.0.0.1:3306/test'"
    )


async def test_wrong_usage_is_said() -> None:
    @task
    def note(ctx: Context) -> None: ...

    with pytest.raises(UnknownTaskError, match=r"^unknown task 'nota'$"):
        await run("nota")
    with pytest.raises(UsageError, match=r"^expected "):
        await run(note, database="postgres://127.0.0.1/test")


# Whatever is public is told, typed, and costs who does not test nothing.


@pytest.mark.parametrize("one", [published, run, Message, Run], ids=lambda one: one.__name__)
def test_help_tells_every_argument(one: Callable[..., Any]) -> None:
    assert section(one, "Args") == list(inspect.signature(one).parameters)


def test_all_of_it_is_in_the_module_that_mypy_reads() -> None:
    import aioworker.testing

    names = ", ".join(aioworker.testing.__all__)
    assert f"from aioworker.testing import {names}\n" in TYPED.read_text()


def test_only_who_asks_for_it_imports_it() -> None:
    code = (
        "import sys, aioworker; aioworker.Producer; aioworker.publish_sync\n"
        "print('aioworker.testing' in sys.modules)\n"
        "from aioworker import testing; print(testing.__name__)"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
    )

    assert done.stdout == "False\naioworker.testing\n"
