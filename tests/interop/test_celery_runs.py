"""A real Celery worker runs what aioworker publishes, from aioworker's own queues."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from aioworker import Producer
from tests.conftest import QUEUES, TASK, Lanes, Run, eventually, summary
from tests.interop.conftest import CeleryWorker

if TYPE_CHECKING:
    from support.servers import Broker, Servers

Start = Callable[..., CeleryWorker]
OPTIONS = ("--pool", "solo", "--without-gossip", "--without-mingle")

# RabbitMQ has no QoS over a whole channel for quorum queues, which is what Celery asks for
# unless it knows the kind; what else it would declare for itself is switched off.
CELERY = f"""
    import json
    import os

    from celery import Celery
    from kombu import Queue

    quorum = {{"x-queue-type": "quorum"}}
    lanes = [
        Queue(name, no_declare=True, queue_arguments=quorum)
        for name in ("{QUEUES.bulk}", "{QUEUES.urgent}")
    ]
    app = Celery("shop", broker=os.environ["AIOWORKER_AMQP_URL"])
    app.conf.task_queues = lanes
    app.conf.worker_enable_remote_control = False


    @app.task(name="{TASK}", bind=True)
    def update(self, *args, **kwargs):
        request = self.request
        called = [request.id, request.root_id, request.retries, args, kwargs]
        with open("calls", "a") as calls:
            print(json.dumps(called), file=calls, flush=True)
        if args == ([404],) and not request.retries:
            raise self.retry(countdown=0)
"""


def publish_in_a_process_of_its_own(pair: Servers) -> str:
    """Publish as a web process does, and return the message's id."""
    code = (
        "from aioworker import publish_sync;"
        f"print(publish_sync({TASK!r}, [[3615, 'näïve']], urgent=True, up={{'to': None}}))"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        env=pair.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout.strip()


async def test_a_celery_worker_runs_what_aioworker_publishes(
    plain: Servers, lanes: Lanes, celery_worker: Start, run: Run
) -> None:
    """By every way that there is to publish; each message once, with its arguments and id."""
    worker = celery_worker(CELERY, *OPTIONS)
    async with Producer(plain.amqp_url, timeout=10) as producer:
        first = await producer.publish(TASK, [1, 2])
        second = await producer.publish(TASK, [3], urgent=True)
    third = publish_in_a_process_of_its_own(plain)
    assert run("publish", "4", "--bulk", AIOWORKER_AMQP_URL=plain.amqp_url).returncode == 0

    eventually(lambda: len(worker.calls) == 4, "all four are run")

    calls = {call[0]: call[1:] for call in worker.calls}
    assert calls.pop(first) == [first, 0, [[1, 2]], {}]
    assert calls.pop(second) == [second, 0, [[3]], {}]
    assert calls.pop(third) == [third, 0, [[[3615, "näïve"]]], {"up": {"to": None}}]
    [(fourth, call)] = calls.items()
    assert call == [fourth, 0, [[4]], {}]
    assert worker.stop() == 0
    assert [await lanes.count(name) for name in (QUEUES.bulk, QUEUES.urgent)] == [0, 0]
    assert "Native delayed delivery will not be available" in worker.log
    assert "Traceback" not in worker.log


async def test_what_was_set_aside_and_brought_back_is_still_celerys(
    plain: Servers, lanes: Lanes, celery_worker: Start, run: Run, shop: object
) -> None:
    """A copy that aioworker made, with headers of its own, is a message as before."""
    message = publish_in_a_process_of_its_own(plain)
    ours = {"AIOWORKER_AMQP_URL": plain.amqp_url, "AIOWORKER_RATE_LIMIT": "100/s"}
    refused = run("consume", "--burst", **ours)
    assert refused.stdout == summary(0, dead_letters=1), refused.stderr
    assert run("dead", "requeue", **ours).returncode == 0

    worker = celery_worker(CELERY, *OPTIONS)

    eventually(lambda: worker.calls, "it is run")
    [[found, _root, retries, args, kwargs]] = worker.calls
    assert (found, retries, args) == (message, 0, [[[3615, "näïve"]]])
    assert kwargs == {"up": {"to": None}}


async def test_a_retry_of_celerys_comes_back_to_the_lane(
    plain: Servers, lanes: Lanes, celery_worker: Start
) -> None:
    worker = celery_worker(CELERY, *OPTIONS)
    async with Producer(plain.amqp_url, timeout=10) as producer:
        message = await producer.publish(TASK, [404])

    eventually(lambda: len(worker.calls) == 2, "it is run twice")

    assert [[call[0], call[2], call[3]] for call in worker.calls] == [
        [message, 0, [[404]]],
        [message, 1, [[404]]],
    ]


async def test_a_worker_that_does_not_know_the_queues_kind_runs_nothing_on_rabbitmq_3(
    plain: Servers, lanes: Lanes, celery_worker: Start, broker: Broker
) -> None:
    """What the queue's arguments are for, although they are not declared.

    Of RabbitMQ 4 kombu does not ask what it refuses.
    """
    runs = int(broker.control("version").partition(".")[0]) >= 4
    code = CELERY.replace('{"x-queue-type": "quorum"}', "None")
    worker = celery_worker(code, *OPTIONS)
    async with Producer(plain.amqp_url, timeout=10) as producer:
        await producer.publish(TASK, [1])

    refused = "does not support global qos"
    eventually(lambda: worker.calls or refused in worker.log, "it runs it, or is refused")

    assert len(worker.calls) == runs
    if runs:
        assert worker.stop() == 0
    worker.end()
    assert await lanes.count(QUEUES.bulk) == (not runs)


@pytest.mark.parametrize(
    ("without", "options"),
    [
        ("no_declare=True, ", OPTIONS),
        ("app.conf.worker_enable_remote_control = False", OPTIONS),
        ("nothing", tuple(option for option in OPTIONS if option != "--without-gossip")),
        ("nothing", tuple(option for option in OPTIONS if option != "--without-mingle")),
    ],
    ids=["no_declare", "remote control", "gossip", "mingle"],
)
def test_a_worker_that_declares_what_it_may_not_ends(
    celery_worker: Start, without: str, options: tuple[str, ...]
) -> None:
    worker = celery_worker(CELERY.replace(without, ""), *options)

    assert worker.process.wait(30) != 0
    assert "Unrecoverable error: AccessRefused" in worker.log


def test_a_worker_that_may_declare_finds_another_queue(
    pair: Servers, lanes: Lanes, celery_worker: Start
) -> None:
    """It does not know of the dead letters: nothing is declared anew."""
    code = CELERY.replace("no_declare=True, ", "")

    worker = celery_worker(code, *OPTIONS, pair=pair)

    eventually(lambda: "PRECONDITION_FAILED - inequivalent arg" in worker.log, "it is refused")
