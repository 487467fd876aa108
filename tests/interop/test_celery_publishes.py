"""A real Celery publishes to aioworker: what is run, what is refused, what is lost."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from amqp.exceptions import AccessRefused, ChannelError
from celery import Celery, chain, chord, group
from kombu import Queue

from aioworker.settling.outcome import Kind
from aioworker.tasks.task import Task
from tests.conftest import (
    ONE_A_START,
    QUEUES,
    TASK,
    Lanes,
    Run,
    current_versions,
    make_database,
    make_worker,
    simple_addons,
    summary,
)
from tests.interop.conftest import LANE, URGENT

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

    from support.servers import Servers

HOUR = 3600
Served = Callable[..., Any]
Send = Callable[[Any], object]


@pytest.fixture
def note(celery: Celery) -> Any:
    """The task as the Celery side has it: its name and how it is called."""

    def note(self: object, *args: object, **kwargs: object) -> None:
        raise AssertionError("run by Celery")

    return celery.task(note, name=TASK, bind=True, shared=False)


@pytest.fixture
def serve(plain: Servers, lanes: Lanes, stop: asyncio.Event, shop: object) -> Served:
    """Serve what waits by a function, until the lanes are empty."""

    async def run(
        function: Callable[..., Any], rate_limit: str | None = "100/s"
    ) -> dict[Kind, int]:
        database = make_database(plain)
        worker = make_worker(plain, database, task=Task(TASK, function), rate_limit=rate_limit)
        await worker.run(stop)
        database.close()
        return dict(worker.consumer.settled)

    return run


async def test_the_old_producer_goes_on(
    plain: Servers,
    celery: Celery,
    note: Any,
    lanes: Lanes,
    shop: Connection[Cursor],
    run: Run,
) -> None:
    """By `apply_async` with rows of one id, as it always did, and by the name alone."""
    simple_addons(shop, 4)

    note.apply_async(args=[[[1], [2]]])
    celery.send_task(TASK, [[3]])
    note.apply_async(args=[[[4]]], queue=URGENT)
    variables = {"AIOWORKER_AMQP_URL": plain.amqp_url} | ONE_A_START
    done = run("consume", "--burst", "--rate-limit", "100/s", **variables)

    assert (done.returncode, done.stderr.count("lane=urgent")) == (0, 1), done.stderr
    assert done.stdout == summary(3)
    assert current_versions(shop) == {n: n + 10_000 for n in range(1, 5)}


RUN: dict[str, Send] = {
    "apply_async": lambda note: note.apply_async(([1],), {"up": None}),
    "delay": lambda note: note.delay([1], up=None),
    "send_task": lambda note: note.app.send_task(TASK, [[1]], {"up": None}),
    "gzip": lambda note: note.apply_async(([1],), {"up": None}, compression="gzip"),
    "zlib": lambda note: note.apply_async(([1],), {"up": None}, compression="zlib"),
    "group": lambda note: group(note.s([1], up=None)).apply_async(),
    "expires later": lambda note: note.apply_async(([1],), {"up": None}, expires=HOUR),
    "priority": lambda note: note.apply_async(([1],), {"up": None}, priority=9),
    "reply_to": lambda note: note.apply_async(([1],), {"up": None}, reply_to="nobody"),
    "stamped": lambda note: note.apply_async(([1],), {"up": None}, stamped_headers=["a"], a="b"),
}


@pytest.mark.parametrize("send", RUN.values(), ids=RUN)
async def test_what_needs_nothing_of_celery_is_run(serve: Served, note: Any, send: Send) -> None:
    got: list[Any] = []

    async def record(*args: Any, **kwargs: Any) -> None:
        got.append((args, kwargs))

    send(note)

    assert await serve(record) == {Kind.ACK: 1}
    assert got == [(([1],), {"up": None})]


def _protocol_1(note: Any) -> None:
    note.app.conf.task_protocol = 1
    note.apply_async(([1],))


def _retry(note: Any, retries: int, **options: Any) -> None:
    """Retry a message as a Celery worker does in the middle of its run."""
    note.push_request(
        called_directly=False, id="tried", args=[], kwargs={}, retries=retries, delivery_info={}
    )
    note.retry(throw=False, queue=LANE, max_retries=9, **options)
    note.pop_request()


def _chord(note: Any) -> None:
    note.app.conf.result_backend = "cache+memory://"
    chord([note.s([1])])(note.s())


REFUSED: dict[str, tuple[str, Send]] = {
    "pickle": (
        "expected content type application/json, got: 'application/x-python-serialize'",
        lambda note: note.apply_async(([1],), serializer="pickle"),
    ),
    "msgpack": (
        "expected content type application/json, got: 'application/x-msgpack'",
        lambda note: note.apply_async(([1],), serializer="msgpack"),
    ),
    "bzip2": (
        "expected compression application/x-gzip, got: 'application/x-bz2'",
        lambda note: note.apply_async(([1],), compression="bzip2"),
    ),
    "lzma": (
        "expected compression application/x-gzip, got: 'application/x-lzma'",
        lambda note: note.apply_async(([1],), compression="lzma"),
    ),
    "countdown": (
        "expected no eta or countdown: aioworker keeps no message for later",
        lambda note: note.apply_async(([1],), countdown=1),
    ),
    "eta": (
        "expected no eta or countdown: aioworker keeps no message for later",
        lambda note: note.apply_async(([1],), eta=datetime.now(UTC) - timedelta(hours=1)),
    ),
    "retry": (
        "expected no eta or countdown: aioworker keeps no message for later",
        lambda note: _retry(note, 0),
    ),
    "link": (
        "expected no 'callbacks': aioworker keeps no results to pass on",
        lambda note: note.apply_async(([1],), link=note.si([2])),
    ),
    "link_error": (
        "expected no 'errbacks': aioworker keeps no results to pass on",
        lambda note: note.apply_async(([1],), link_error=note.si([2])),
    ),
    "chain": (
        "expected no 'chain': aioworker keeps no results to pass on",
        lambda note: chain(note.si([1]), note.si([2])).apply_async(),
    ),
    "chord": ("expected no 'chord': aioworker keeps no results to pass on", _chord),
    "protocol 1": (f"expected header task '{TASK}', got: None", _protocol_1),
    "another task": (
        f"expected header task '{TASK}', got: 'other'",
        lambda note: note.app.send_task("other", [[1]], queue=LANE),
    ),
}


@pytest.mark.parametrize(("reason", "send"), REFUSED.values(), ids=REFUSED)
async def test_what_needs_celery_is_a_dead_letter_unrun(
    serve: Served, lanes: Lanes, note: Any, reason: str, send: Send
) -> None:
    """Whole: nothing of it is left out in silence. The reason is one line."""
    ran: list[Any] = []

    send(note)

    assert await serve(ran.append) == {Kind.DEAD_LETTER: 1}
    letter = await lanes.take(QUEUES.dead)
    assert (letter.headers["x-aioworker-reason"], ran) == (reason, [])


async def test_a_task_without_a_rate_limit_takes_them_as_well(serve: Served, note: Any) -> None:
    """Its messages are pushed by RabbitMQ, several at once."""
    got: list[Any] = []

    async def record(*args: Any, **_kwargs: Any) -> None:
        got.append(args)

    for n in range(20):
        note.apply_async(([n],), compression="gzip" if n % 2 else None)
        note.apply_async(([n],), countdown=1)

    assert await serve(record, None) == {Kind.ACK: 20, Kind.DEAD_LETTER: 20}
    assert sorted(got) == [([n],) for n in range(20)]


async def test_a_message_past_its_time_is_counted_not_run(
    serve: Served, lanes: Lanes, note: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """By the header alone, as it is after a retry."""
    ran: list[Any] = []
    caplog.set_level(logging.INFO, "aioworker")

    note.apply_async(([1],), headers={"expires": "2020-01-01T00:00:00+00:00"})

    assert await serve(ran.append) == {Kind.ACK: 1}
    assert (ran, await lanes.count(QUEUES.dead)) == ([], 0)
    [line] = [one for one in caplog.records if one.getMessage() == "chunk expired"]
    assert line.fields["expired"] == 1  # type: ignore[attr-defined]


async def test_what_expires_while_it_waits_is_set_aside_by_rabbitmq(
    serve: Served, lanes: Lanes, note: Any, run: Run, plain: Servers, shop: object
) -> None:
    """Celery's `expires` is also the message's time to live in the queue."""
    ran: list[Any] = []

    note.apply_async(([1],), expires=0.2)
    while not await lanes.count(QUEUES.dead):  # noqa: ASYNC110 - RabbitMQ's clock is waited for
        await asyncio.sleep(0.05)

    assert await serve(ran.append) == {}
    assert ran == []
    listed = run("dead", "list", AIOWORKER_AMQP_URL=plain.amqp_url)
    assert "set aside by RabbitMQ: expired" in listed.stdout, listed
    dropped = run("dead", "drop", "--reason", "expired", "--yes", AIOWORKER_AMQP_URL=plain.amqp_url)
    assert dropped.returncode == 0, dropped.stderr
    assert await lanes.count(QUEUES.dead) == 0


async def test_celerys_retries_count_as_attempts(serve: Served, lanes: Lanes, note: Any) -> None:
    """A message that Celery tried once is tried four times more at most, not five."""

    async def fail() -> None:
        raise ValueError("no")

    _retry(note, 4, countdown=0)

    assert await serve(fail) == {Kind.DEAD_LETTER: 1}
    letter = await lanes.take(QUEUES.dead)
    assert (letter.headers["id"], letter.headers["x-aioworker-reason"]) == (
        "tried",
        "ValueError: no; attempt 6 of 6",
    )


async def test_celerys_time_limit_cuts_a_coroutine_off(
    serve: Served, lanes: Lanes, note: Any
) -> None:
    async def hang() -> None:
        await asyncio.Event().wait()

    note.apply_async(time_limit=60, soft_time_limit=1)

    assert await serve(hang) == {Kind.RETRY: 1}
    copy = await lanes.take(QUEUES.retry)
    assert "cut off" in str(copy.headers["x-aioworker-reason"])


async def test_celerys_time_limit_does_not_cut_a_thread_off(serve: Served, note: Any) -> None:
    """A thread cannot be cut off: the worker's own limit alone, longer, ends its wait."""
    ended: list[float] = []

    def block() -> None:
        time.sleep(1.5)
        ended.append(time.monotonic())

    note.apply_async(time_limit=1)

    assert await serve(block) == {Kind.ACK: 1}
    assert len(ended) == 1


@pytest.mark.parametrize("mandatory", [True, False])
def test_a_publish_to_a_missing_queue_is_an_error_if_mandatory(
    celery: Celery, mandatory: bool
) -> None:
    """Without it the message is lost, although RabbitMQ confirms it."""
    missing = Queue("aioworker.missing", no_declare=True)

    if not mandatory:
        assert celery.send_task("missing", queue=missing).id
        return
    with pytest.raises(ChannelError, match="NO_ROUTE"):
        celery.send_task("missing", queue=missing, mandatory=True)


async def test_a_route_by_the_queues_name_alone_is_refused(celery: Celery, lanes: Lanes) -> None:
    """Celery would declare a queue of its own kind, which the user may not."""
    with pytest.raises(AccessRefused):
        celery.send_task(TASK, [[1]], queue=QUEUES.bulk)


async def test_a_route_by_exchange_and_routing_key_loses_the_message(
    celery: Celery, lanes: Lanes
) -> None:
    """With the default exchange Celery takes the queue for the key, and there is none."""
    celery.conf.task_routes = {TASK: {"exchange": "", "routing_key": QUEUES.bulk}}

    assert celery.send_task(TASK, [[1]]).id  # confirmed

    assert await lanes.count(QUEUES.bulk) == 0


async def test_what_kombu_adds_to_json_is_refused(serve: Served, lanes: Lanes, note: Any) -> None:
    """A function that expects a date would get a dict: send text or numbers instead."""
    ran: list[Any] = []

    note.apply_async((datetime(2026, 1, 2, tzinfo=UTC),))

    assert await serve(ran.append) == {Kind.DEAD_LETTER: 1}
    assert ran == []
    assert (await lanes.take(QUEUES.dead)).headers["x-aioworker-reason"] == (
        "expected arguments of plain JSON, got kombu's 'datetime'"
    )
