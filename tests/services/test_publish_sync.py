"""Publishing from code without an event loop: whoever calls, whatever became of RabbitMQ."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import aio_pika
import pytest

from aioworker import Producer, Task, publish_sync, sync
from aioworker.errors import BrokerError, ConnectionLostError, QueueMissingError, UsageError
from aioworker.rabbitmq.publisher import Publisher
from support import servers
from tests.conftest import QUEUES, TASK, Lanes, eventually
from tests.faults.proxy import Proxy

REQUESTS = 40
PROMPTLY_SECONDS = 5  # of a busy machine; less than the timeout that it does not wait for
Program = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(autouse=True)
def settings(
    pair: servers.Servers, lanes: Lanes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """This process's settings lead to the servers; its connection ends with the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AIOWORKER_AMQP_URL", pair.amqp_url)
    yield
    sync._close()


@pytest.fixture
def program(pair: servers.Servers, tmp_path: Path) -> Program:
    """Run a program of its own, in which a warning is an error and nothing may be left open."""
    # Python 3.12 warns of each fork of a process with threads, and an event loop is one.
    options = ["-W", "error", "-W", "ignore:This process:DeprecationWarning"]

    def run(code: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *options, "-c", textwrap.dedent(code)],
            env=pair.environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


def connections(broker: servers.Broker) -> int:
    """Return how many connections RabbitMQ counts that publish."""
    listed = broker.control("list_connections", "client_properties")
    return listed.count('"aioworker publish"')


async def test_a_thread_publishes_to_the_lane_it_means(lanes: Lanes) -> None:
    with ThreadPoolExecutor() as pool:
        bulk = pool.submit(publish_sync, TASK, [7]).result()
        urgent = pool.submit(publish_sync, TASK, [8], urgent=True).result()

    taken = [await lanes.take(name) for name in (QUEUES.bulk, QUEUES.urgent)]
    assert [one.message_id for one in taken] == [bulk, urgent]
    assert [json.loads(one.body)[0] for one in taken] == [[[7]], [[8]]]


async def test_a_task_publishes_itself(lanes: Lanes) -> None:
    """Checked against its function first."""
    refresh = Task(TASK, lambda shop, up=False: None)

    message_id = refresh.publish_sync(7, urgent=True, up=True)

    taken = await lanes.take(QUEUES.urgent)
    assert (taken.message_id, json.loads(taken.body)[:2]) == (message_id, [[7], {"up": True}])
    with pytest.raises(UsageError, match=rf"^task '{TASK}': expected arguments \(shop, up=False\)"):
        refresh.publish_sync()


async def test_a_thread_whose_event_loop_runs_publishes_too(lanes: Lanes) -> None:
    """It blocks that loop for its time, and nothing else comes of it."""
    message_id = publish_sync(TASK, [7])

    assert (await lanes.take(QUEUES.bulk)).message_id == message_id


class Page(BaseHTTPRequestHandler):
    """A view that publishes."""

    def do_POST(self) -> None:
        """Publish the id in the path; answer with the message's."""
        body = publish_sync(TASK, [int(self.path[1:])], urgent=True).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def web() -> Iterator[str]:
    """A web server's address; it answers each request in a thread of its own."""
    with ThreadingHTTPServer((servers.HOST, 0), Page) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        yield f"http://{servers.HOST}:{server.server_port}"
        server.shutdown()
        serving.join()


async def test_all_requests_of_a_web_server_share_one_connection(
    broker: servers.Broker, lanes: Lanes, web: str
) -> None:
    """Several at once, the first ones too, which find no connection."""

    def post(addon: int) -> str:
        with urllib.request.urlopen(f"{web}/{addon}", b"", timeout=30) as answer:
            text: str = answer.read().decode()
        return text

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(post, range(1, REQUESTS + 1)))

    assert connections(broker) == 1
    taken = [await lanes.take(QUEUES.urgent) for _ in range(REQUESTS)]
    assert sorted(str(one.message_id) for one in taken) == sorted(answers)


async def test_a_forked_process_publishes_and_its_parent_goes_on(
    program: Program, lanes: Lanes
) -> None:
    """As a web server's master and its workers: nothing of a connection is shared."""
    done = program(
        f"""
        import gc, os, sys
        from aioworker import publish_sync

        publish_sync({TASK!r}, [1])
        for addon in (2, 3):
            child = os.fork()
            if child == 0:
                gc.collect()
                publish_sync({TASK!r}, [addon])
                sys.exit(0)
            print(os.waitpid(child, 0)[1], flush=True)
            publish_sync({TASK!r}, [addon + 10])
        """
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n0\n", "")
    bodies = [json.loads((await lanes.take(QUEUES.bulk)).body) for _ in range(5)]
    assert [args for args, _kwargs, _embed in bodies] == [[[n]] for n in (1, 2, 12, 3, 13)]


async def test_a_fork_in_the_middle_of_a_publish_leaves_no_lock_behind(
    program: Program, lanes: Lanes
) -> None:
    done = program(
        f"""
        import os, sys, threading
        from aioworker import publish_sync

        ended = threading.Event()

        def publish():
            while not ended.is_set():
                publish_sync({TASK!r}, [1], urgent=True)

        publish_sync({TASK!r}, [1], urgent=True)
        threads = [threading.Thread(target=publish) for _ in range(4)]
        for thread in threads:
            thread.start()
        children = []
        for _ in range(10):
            child = os.fork()
            if child == 0:
                publish_sync({TASK!r}, [2])
                os._exit(0)
            children.append(child)
        print([os.waitpid(child, 0)[1] for child in children])
        ended.set()
        for thread in threads:
            thread.join()
        """
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, f"{[0] * 10}\n", "")
    assert await lanes.holds(QUEUES.bulk, 10)


@pytest.mark.parametrize(("end", "status"), [("pass", 0), ("sys.exit(3)", 3), ("os._exit(4)", 4)])
async def test_a_process_that_has_published_ends_at_once_and_says_nothing(
    program: Program, lanes: Lanes, end: str, status: int
) -> None:
    began = time.monotonic()

    done = program(f"import os, sys, aioworker\naioworker.publish_sync({TASK!r}, [1])\n{end}")

    assert time.monotonic() - began < PROMPTLY_SECONDS
    assert (done.returncode, done.stdout, done.stderr) == (status, "", "")
    assert await lanes.holds(QUEUES.bulk, 1)


def test_a_process_that_never_published_opens_nothing(program: Program) -> None:
    done = program(
        """
        import threading, aioworker
        aioworker.publish_sync
        print(threading.active_count())
        """
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


async def test_a_connection_that_an_operator_closed_is_opened_anew(
    broker: servers.Broker, pair: servers.Servers
) -> None:
    publish_sync(TASK, [1])

    broker.control("close_all_connections", "maintenance")

    publish_sync(TASK, [2])
    publish_sync(TASK, [3])
    assert connections(broker) == 1


async def test_a_broker_that_went_away_is_told_at_once_and_found_again(
    broker: servers.Broker,
) -> None:
    publish_sync(TASK, [1])

    broker.control("stop_app")
    began = time.monotonic()
    with pytest.raises(BrokerError, match="RabbitMQ"):
        publish_sync(TASK, [2])
    told = time.monotonic() - began
    broker.control("start_app")

    assert told < PROMPTLY_SECONDS
    assert publish_sync(TASK, [3])


SYNC = """
    import sys
    from aioworker import publish_sync

    for line in sys.stdin:
        print(publish_sync({task!r}, [int(line)]), flush=True)
"""
ASYNC = """
    import asyncio, sys
    from aioworker import Producer

    async def main():
        async with Producer() as producer:
            for line in sys.stdin:
                print(await producer.publish({task!r}, [int(line)]), flush=True)

    asyncio.run(main())
"""


def begin(code: str, pair: servers.Servers, **variables: str) -> subprocess.Popen[str]:
    """Start a program that a test talks to."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        env=pair.environment | variables,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("code", [SYNC, ASYNC], ids=["sync", "async"])
async def test_the_first_publish_after_a_freeze_goes_out_and_nothing_is_printed(
    broker: servers.Broker, pair: servers.Servers, lanes: Lanes, code: str
) -> None:
    """A suspend, a debugger, a Lambda between two calls: RabbitMQ has closed the connection."""
    process = begin(code.format(task=TASK), pair, AIOWORKER_AMQP_URL=f"{pair.amqp_url}?heartbeat=1")
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        process.stdin.write("1\n")
        process.stdin.flush()
        first = process.stdout.readline().strip()

        process.send_signal(signal.SIGSTOP)
        eventually(lambda: connections(broker) == 0, "RabbitMQ has closed the connection")
        process.stdin.write("2\n")
        process.stdin.flush()
        process.send_signal(signal.SIGCONT)
        printed, errors = process.communicate(timeout=60)

    assert (process.returncode, errors) == (0, "")
    taken = [await lanes.take(QUEUES.bulk) for _ in range(2)]
    assert [one.message_id for one in taken] == [first, printed.strip()]
    assert [json.loads(one.body)[0] for one in taken] == [[[1]], [[2]]]
    assert await lanes.count(QUEUES.bulk) == 0


async def test_a_confirm_that_was_lost_doubles_a_message_under_the_same_id(
    monkeypatch: pytest.MonkeyPatch, lanes: Lanes
) -> None:
    """Tasks can be repeated; whoever counts has the id."""
    publish, losses = Publisher.publish, ["connection to RabbitMQ lost"]

    async def lose_confirm(self: Publisher, queue: str, outgoing: aio_pika.Message) -> None:
        await publish(self, queue, outgoing)
        if losses:
            raise ConnectionLostError(losses.pop())

    monkeypatch.setattr(Publisher, "publish", lose_confirm)

    message_id = publish_sync(TASK, [1])

    taken = [await lanes.take(QUEUES.bulk) for _ in range(2)]
    assert [one.message_id for one in taken] == [message_id, message_id]


async def test_a_peer_that_falls_silent_cancels_nobody(pair: servers.Servers, lanes: Lanes) -> None:
    """As a network that drops what has been idle: no answer, and no end of the connection."""
    with Proxy(urlsplit(pair.amqp_url).port or 5672) as proxy:
        through = f"amqp://guest:guest@{servers.HOST}:{proxy.port}/?heartbeat=1"
        async with Producer(through, timeout=30) as producer:
            await producer.publish(TASK, [1])
            proxy.black_hole()

            publishing = asyncio.create_task(producer.publish(TASK, [2]))
            again = partial(eventually, lambda: proxy.accepted > 1, "it connects anew")
            await asyncio.to_thread(again)
            proxy.forward()

            assert await publishing


def test_a_program_that_sets_up_no_logging_gets_an_error_and_prints_nothing(
    program: Program,
) -> None:
    done = program(
        f"""
        import os
        from aioworker import publish_sync
        from aioworker.errors import BrokerError

        os.environ["AIOWORKER_AMQP_URL"] = "amqp://{servers.HOST}:{servers.free_port()}/"
        try:
            publish_sync({TASK!r}, [1])
        except BrokerError as error:
            print(str(error)[:14])
        """
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, "cannot connect\n", "")


def test_nobody_who_listens_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    port = servers.free_port()
    monkeypatch.setenv("AIOWORKER_AMQP_URL", f"amqp://guest:secret@{servers.HOST}:{port}/")
    began = time.monotonic()

    with pytest.raises(BrokerError) as failure:
        publish_sync(TASK, [1])

    assert time.monotonic() - began < PROMPTLY_SECONDS
    assert str(failure.value).startswith(
        f"cannot connect to RabbitMQ at amqp://guest@{servers.HOST}:{port}/: "
    )
    assert str(failure.value).endswith("; is it running? check AIOWORKER_AMQP_URL")


def test_somebody_who_says_nothing_is_waited_for_no_longer_than_the_connect_timeout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server((servers.HOST, 0)) as silent:
        address = f"amqp://{servers.HOST}:{silent.getsockname()[1]}/"
        monkeypatch.setenv("AIOWORKER_AMQP_URL", address)
        monkeypatch.setenv("AIOWORKER_CONNECT_TIMEOUT", "0.5")
        began = time.monotonic()

        with pytest.raises(BrokerError, match=r"no answer in time, check AIOWORKER_AMQP_URL$"):
            publish_sync(TASK, [1])

        assert 0.4 < time.monotonic() - began < PROMPTLY_SECONDS


async def test_what_cannot_be_published_is_refused_and_changes_nothing(lanes: Lanes) -> None:
    with pytest.raises(UsageError, match=r"^expected arguments that JSON can hold, got: "):
        publish_sync("nobodys", object())
    with pytest.raises(QueueMissingError, match=r"^queue aioworker.nobodys does not exist: run"):
        publish_sync("nobodys", [1])

    assert publish_sync(TASK, [1])
    assert await lanes.holds(QUEUES.bulk, 1)
