"""Small messages that ask for nothing: how many a second, beside other task queues.

Each publishes its own messages to a durable queue, persistent, and runs them by one process
of its own, each acknowledged after its run. What is timed is what the function itself sees:
from its first run to its last. They stand in an environment of their own, `.venv-bench`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.servers import Servers

MESSAGES = 20_000
LONGEST_SECONDS = 300.0
PYTHON = ".venv-bench/bin/python"
_CONTENDER = "benchmarks.contenders."

# What publishes, and what runs: arguments of `python -m`.
CONTENDERS = {
    "aio-pika, bare": (f"{_CONTENDER}bare publish", f"{_CONTENDER}bare"),
    "aioworker": (f"{_CONTENDER}ours", f"aioworker consume --app {_CONTENDER}ours"),
    "aioworker, beside a task at 1/h": (
        f"{_CONTENDER}beside",
        f"aioworker consume --app {_CONTENDER}beside",
    ),
    "Celery": (
        f"{_CONTENDER}with_celery",
        f"celery -A {_CONTENDER}with_celery worker -c 1 -l error"
        " --without-gossip --without-mingle --without-heartbeat",
    ),
    "Dramatiq": (f"{_CONTENDER}with_dramatiq", f"dramatiq {_CONTENDER}with_dramatiq -p 1"),
    "taskiq": (
        f"{_CONTENDER}with_taskiq",
        f"taskiq worker {_CONTENDER}with_taskiq:broker --workers 1",
    ),
    "FastStream": (
        f"{_CONTENDER}with_faststream",
        f"faststream run {_CONTENDER}with_faststream:app",
    ),
}


def python(name: str) -> str:
    """Return the interpreter for a contender: ours is the one that runs this."""
    return sys.executable if name.startswith("aioworker") else PYTHON


def environment(pair: Servers, result: Path) -> dict[str, str]:
    """Return the variables of all that runs here."""
    return pair.environment | {
        "NOOP_AMQP_URL": pair.amqp_url,
        "NOOP_MESSAGES": str(MESSAGES),
        "NOOP_RESULT": str(result),
        "AIOWORKER_LOG_LEVEL": "warning",
    }


def messages_a_second(pair: Servers, name: str, folder: Path) -> tuple[float, float]:
    """Publish and run all messages by a contender.

    Returns:
        Messages a second, and the peak memory of all its processes in MiB.
    """
    result = folder / "seconds"
    seconds, peak = timed(name, CONTENDERS[name], environment(pair, result), result)
    return MESSAGES / seconds, peak


def timed(
    name: str, commands: tuple[str, str], variables: dict[str, str], result: Path
) -> tuple[float, float]:
    """Publish by a command, and run what was published by another one.

    Args:
        name: Whose they are.
        commands: Both, as arguments of `python -m`.
        variables: The environment of both.
        result: Where the seconds from the first run to the last are written.

    Returns:
        These seconds, and the peak memory of all processes of the second command in MiB.
    """
    publisher, worker = commands
    result.unlink(missing_ok=True)
    subprocess.run(
        [python(name), "-m", *publisher.split()],
        env=variables,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    with subprocess.Popen(
        [python(name), "-m", *worker.split()],
        env=variables,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            peak = max(_memory(name, process, result))
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
    return float(result.read_text()), peak


def _memory(name: str, process: subprocess.Popen[bytes], result: Path) -> Iterator[float]:
    """Yield what the processes hold until the last message has run."""
    deadline = time.monotonic() + LONGEST_SECONDS
    while not result.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"{name} did not run all its messages")
        held = 0
        parent = psutil.Process(process.pid)
        for one in (parent, *parent.children(recursive=True)):
            try:
                held += one.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        yield held / 2**20
        time.sleep(0.05)
