"""A pause in the middle of a run: it ends between two of its transactions."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from aioworker import Producer
from support import servers
from tests.conftest import Worker, eventually, execute, importable, rows
from tests.place import Place

APP = """
import asyncio
import time

from aioworker import Budget, Context, task

writes = Budget("writes", rate_limit="100/s")
STEP = "INSERT INTO step (task) VALUES (%s)"
READ = "SELECT steps FROM wanted"

@task(name="run.coroutine", rate_limit="100/s")
async def coroutine(ctx: Context) -> None:
    [[steps]] = await ctx.database.query(READ)
    for _ in range(steps):
        async with ctx.transaction() as cursor:
            await cursor.execute(STEP, ("coroutine",))
        await asyncio.sleep(0.05)

@task(name="run.unlimited")
async def unlimited(ctx: Context) -> None:
    [[steps]] = await ctx.database.query(READ)
    for _ in range(steps):
        async with ctx.transaction() as cursor:
            await cursor.execute(STEP, ("unlimited",))
        await asyncio.sleep(0.05)

@task(name="run.statements", rate_limit="100/s")
async def statements(ctx: Context) -> None:
    [[steps]] = await ctx.database.query(READ)
    for _ in range(steps):
        await ctx.database.execute(STEP, ("statements",))
        await asyncio.sleep(0.05)

@task(name="run.thread", rate_limit="100/s")
def thread(ctx: Context) -> None:
    with ctx.transaction() as cursor:
        cursor.execute(READ)
        [[steps]] = cursor.fetchall()
    for _ in range(steps):
        with ctx.transaction() as cursor:
            cursor.execute(STEP, ("thread",))
        time.sleep(0.05)

@task(name="run.stubborn", rate_limit="100/s")
async def stubborn(ctx: Context) -> None:
    [[steps]] = await ctx.database.query(READ)
    for _ in range(steps):
        try:
            async with ctx.transaction() as cursor:
                await cursor.execute(STEP, ("stubborn",))
        except Exception:
            ctx.counts["caught"] += 1
            if ctx.counts["caught"] == 3:
                return
        await asyncio.sleep(0.05)

@task(name="run.shared", budget=writes)
async def shared(ctx: Context) -> None:
    [[steps]] = await ctx.database.query(READ)
    for _ in range(steps):
        async with ctx.transaction() as cursor:
            await cursor.execute(STEP, ("shared",))
        await asyncio.sleep(0.05)
"""
TASKS = ("coroutine", "unlimited", "statements", "thread", "stubborn", "shared")
LIMITED = [task for task in TASKS if task != "unlimited"]
STEPS = 2000  # more than anybody waits for
CHUNK, PORTION = 1000, 100  # add-ons of a chunk, and of one transaction


class Runs:
    """A place with one long run of each task, in one worker."""

    def __init__(self, private: servers.Servers, folder: Path) -> None:
        (folder / "runs.py").write_text(APP)
        self.app = {"AIOWORKER_APP": "runs", "PYTHONPATH": importable(folder)}
        self.place = Place(private, folder)
        execute(
            self.place.shop,
            "CREATE TABLE step (task VARCHAR(20) NOT NULL)",
            "CREATE TABLE wanted (steps INT NOT NULL)",
            f"INSERT INTO wanted VALUES ({STEPS})",
        )
        self.run("init")

    def run(self, *arguments: str) -> None:
        """Run a command."""
        done = self.place.run(*arguments, **self.app)
        assert done.returncode == 0, done.stderr

    def begin(self) -> Worker:
        """Publish a message of each task, and start a worker of all; it is in their middle."""

        async def publish() -> None:
            async with Producer(self.place.servers.amqp_url) as producer:
                for task in TASKS:
                    await producer.publish(f"run.{task}")

        asyncio.run(publish())
        worker = self.place.worker(*(f"run.{task}" for task in TASKS), **self.app)
        eventually(lambda: all(self.steps(task) >= 2 for task in TASKS), "all run")
        return worker

    def steps(self, task: str) -> int:
        """Return how many transactions of a task are committed."""
        return len(rows(self.place.shop, "SELECT 1 FROM step WHERE task = %s", task))

    def queued(self, task: str) -> tuple[int, int]:
        """Return how many of a task's messages are ready and unacknowledged, in all its queues."""
        found = [
            counts
            for name, counts in self.place.queued().items()
            if name.startswith(f"aioworker.run.{task}")
        ]
        return sum(ready for ready, _ in found), sum(held for _, held in found)

    def outcomes(self, task: str) -> list[str]:
        """Return what the task's starts came to."""
        found = "SELECT outcome FROM aioworker_start WHERE task = %s ORDER BY number"
        return [outcome for [outcome] in rows(self.place.shop, found, f"run.{task}")]


@pytest.fixture
def runs(private: servers.Servers, tmp_path: Path) -> Iterator[Runs]:
    made = Runs(private, tmp_path)
    yield made
    made.place.end()


def test_a_pause_ends_every_run_and_counts_no_attempt(runs: Runs) -> None:
    """Whatever the task catches, and whether it has a rate or not."""
    worker = runs.begin()

    runs.run("pause", "--all", "--reason", "lag")
    eventually(lambda: all(runs.queued(task) == (1, 0) for task in TASKS), "all are given back")
    committed = {task: runs.steps(task) for task in TASKS}

    assert all(2 <= steps < STEPS for steps in committed.values()), committed
    assert worker.log.count("chunk given back") == len(TASKS), worker.log
    assert worker.log.count(': lag"') >= len(TASKS)
    assert "failed" not in worker.log
    assert all(runs.outcomes(task) == ["released"] for task in LIMITED)

    execute(runs.place.shop, "UPDATE wanted SET steps = 1")
    runs.run("resume", "--all")
    eventually(lambda: all(runs.queued(task) == (0, 0) for task in TASKS), "all are done")

    assert {task: runs.steps(task) for task in TASKS} == {t: n + 1 for t, n in committed.items()}
    done = [line for line in worker.log.splitlines() if "chunk done" in line]
    assert len(done) == len(TASKS)
    assert all("attempt=1" in line for line in done)
    assert all(runs.outcomes(task) == ["released", "ack"] for task in LIMITED)


def test_a_pause_of_a_budget_ends_the_runs_of_its_tasks_alone(runs: Runs) -> None:
    worker = runs.begin()

    runs.run("pause", "--budget", "writes", "--reason", "lag")
    eventually(lambda: runs.queued("shared") == (1, 0), "it is given back")
    at_the_end = {task: runs.steps(task) for task in TASKS}

    assert "budget writes: paused by" in worker.log
    others = [task for task in TASKS if task != "shared"]
    eventually(lambda: all(runs.steps(task) > at_the_end[task] for task in others), "they go on")
    assert runs.steps("shared") == at_the_end["shared"] < STEPS


def test_what_the_main_job_has_written_stays_and_is_written_once(
    private: servers.Servers, tmp_path: Path
) -> None:
    place = Place(private, tmp_path)
    try:
        place.slow(0.01)
        place.backlog(1, CHUNK)
        place.worker("--rate-limit", "100/s")
        eventually(lambda: place.done() >= PORTION, "it is in the middle")

        assert place.run("pause").returncode == 0
        eventually(lambda: [held for _, held in place.queued().values()] == [0] * 4, "it ends")
        written = place.done()
        place.slow(0)
        assert place.run("resume").returncode == 0
        eventually(place.all_done, "it goes on")

        assert 0 < written < CHUNK
        assert written % PORTION == 0
        assert sorted(place.written()) == list(range(1, CHUNK + 1))
    finally:
        place.end()
