"""A real Celery beside aioworker, both as a user that may configure nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from kombu import Queue, pools

from support.servers import Broker, Servers
from tests.conftest import QUEUES, TASK

USER = "plain"
# `aioworker.<task>` is declared by `aioworker init`; Celery is to publish to it as it is.
LANE = Queue(QUEUES.bulk, no_declare=True)
URGENT = Queue(QUEUES.urgent, no_declare=True)


@pytest.fixture(scope="session")
def plain(pair: Servers, broker: Broker) -> Servers:
    """The run's servers, RabbitMQ as a user with no permission to configure."""
    broker.control("add_user", USER, USER)
    broker.control("set_permissions", "-p", "/", USER, "", ".*", ".*")
    return replace(pair, amqp_url=broker.url(user=USER, password=USER))


@pytest.fixture(autouse=True)
def _no_setting_of_celerys(monkeypatch: pytest.MonkeyPatch) -> None:
    """It wins over the broker that an app is made with."""
    monkeypatch.delenv("CELERY_BROKER_URL", raising=False)


@pytest.fixture
def celery(plain: Servers) -> Iterator[Celery]:
    """A Celery that publishes to the main job's bulk lane."""
    app = Celery("shop", broker=plain.amqp_url, set_as_current=False)
    app.conf.update(
        task_routes={TASK: {"queue": LANE, "mandatory": True}},
        broker_transport_options={"confirm_publish": True},
        task_ignore_result=True,
    )
    yield app
    app.close()
    pools.reset()  # its connections outlive it


class CeleryWorker:
    """A running `celery worker`, and what its task was called with."""

    def __init__(self, pair: Servers, folder: Path, code: str, *options: str) -> None:
        self._calls = folder / "calls"
        self._log = folder / "celery.log"
        (folder / "celery_tasks.py").write_text(textwrap.dedent(code))
        self._file = self._log.open("a")
        command = [sys.executable, "-m", "celery", "-A", "celery_tasks", "worker", *options]
        self.process = subprocess.Popen(
            [*command, "--loglevel", "INFO"],
            env=pair.environment,
            cwd=folder,
            stdout=self._file,
            stderr=subprocess.STDOUT,
        )

    @property
    def log(self) -> str:
        """What it has printed so far."""
        return self._log.read_text()

    @property
    def calls(self) -> list[Any]:
        """What its task has written into the file `calls`, a JSON value a line."""
        text = self._calls.read_text() if self._calls.exists() else ""
        return [json.loads(line) for line in text.splitlines()]

    def stop(self) -> int:
        """Stop it as an operator does, and wait for its end; return its exit status."""
        self.process.terminate()
        return self.process.wait(30)

    def end(self) -> None:
        """End it, whatever state it is in."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._file.close()


@pytest.fixture
def celery_worker(plain: Servers, tmp_path: Path) -> Iterator[Callable[..., CeleryWorker]]:
    """Start Celery workers that are ended with the test."""
    workers: list[CeleryWorker] = []

    def start(code: str, *options: str, pair: Servers = plain) -> CeleryWorker:
        folder = tmp_path / f"celery{len(workers)}"
        folder.mkdir()
        workers.append(CeleryWorker(pair, folder, code, *options))
        return workers[-1]

    yield start
    for worker in workers:
        worker.end()
