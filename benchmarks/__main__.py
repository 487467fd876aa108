"""`script/bench`: runs all of it on private servers, prints a table, writes results.md."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import aio_pika
import psutil

from aioworker import repo
from aioworker.addresses import DatabaseAddress
from aioworker.budget.shared import SharedBudget
from aioworker.limits import End, RateLimit
from aioworker.mysql.database import Database
from aioworker.rabbitmq.queues import Queues
from benchmarks import backlog, noop, peers, rate, sweeps, wake
from benchmarks.great_sweep import read_ends
from benchmarks.other_writer import felt_beside
from support import servers, site

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

ROUNDS = 5  # unless --rounds says otherwise
TIMED = ("s", "min to max", "ratio, in each round", "CPU s", "peak MiB")
TASK = "update_current_version"
GATHERING = "20"  # seconds: without a rate limit nothing is waited for, however long
ONE_BY_ONE = "aioworker, one message a start"
AIOWORKER = str(Path(sys.executable).parent / "aioworker")
RESULTS = Path(__file__).parent / "results.md"
IDLE_SECONDS = 60
STARTS = 300
# The tables in memory, so that the job is measured and not the disk.
MARIADB = ("--innodb-buffer-pool-size=2G", "--innodb-log-file-size=1G")
SIZES = (20_000, 200_000)
SINGLES = 10_000
PEER_ROWS = 200_000
BY_NAME = ("peers",)  # takes an hour
GREAT = 5_000_000
END = 100_000  # ids at either end of a great sweep
# A worker runs on another machine than the database: where one machine has both, it takes
# no CPU that the server or the other writer wants.
ASIDE = ("chrt", "--idle", "0") if shutil.which("chrt") else ()
# What many would write: one statement a chunk, everything locked at once.
UPDATE_JOIN = f"""UPDATE addons a JOIN (SELECT a.id, {site.ANSWER} AS answer FROM addons a
WHERE a.id IN (%s)) AS answers ON answers.id = a.id
SET a.current_version = answers.answer WHERE NOT (a.current_version <=> answers.answer)"""


def reckon(connection: Connection[Cursor]) -> str:
    """Return a statement that keeps the server's CPU busy for some 25 ms, as the job's reads do."""
    trial = 10_000
    with connection.cursor() as cursor:
        began = time.perf_counter()
        cursor.execute(f"SELECT BENCHMARK({trial}, SHA1('aioworker'))")
        seconds = time.perf_counter() - began
    return f"SELECT BENCHMARK({round(trial * 0.025 / seconds)}, SHA1('aioworker'));\n"


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a program: seconds as it counts them, CPU seconds, peak memory in MiB."""

    wall: float
    cpu: float
    memory: float


def run(command: list[str], environment: dict[str, str], stdin: Path | None = None) -> Run:
    """Run a program; its own count of seconds, where it prints one, wins over the clock's."""
    with open(stdin or os.devnull, "rb") as source, tempfile.TemporaryFile() as out:
        began = time.perf_counter()
        process = subprocess.Popen(
            command, env=environment, stdin=source, stdout=out, stderr=subprocess.DEVNULL
        )
        _pid, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{command} ended with status {process.returncode}")
        out.seek(0)
        printed = out.read(100).decode().strip()
    if "benchmarks.runners" in command:
        started, ended = map(float, printed.split())
        wall = ended - started
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def runner(name: str) -> list[str]:
    """Return the command of one of `benchmarks.runners`."""
    return [sys.executable, "-m", "benchmarks.runners", name]


class Report:
    """The table: printed line by line, written at the end."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, line: str = "") -> None:
        """Add a line."""
        self.lines.append(line)
        print(line, flush=True)

    def section(self, title: str, *columns: str) -> None:
        """Begin a table."""
        self.add()
        self.add(f"## {title}")
        self.add()
        self.add(f"| {' | '.join(columns)} |")
        self.add(f"|{'---|' * len(columns)}")

    def row(self, *values: object) -> None:
        """Add a row."""
        self.add(f"| {' | '.join(map(str, values))} |")


def compare(report: Report, what: str, runs: dict[str, list[Run]], limit: str) -> None:
    """Add a row for each program: medians, and the ratio to the one named *limit*."""
    bounds = [one.wall for one in runs[limit]]
    for name, several in runs.items():
        walls = [one.wall for one in several]
        report.row(
            what,
            name,
            f"{statistics.median(walls):.3f}",
            f"{min(walls):.3f} to {max(walls):.3f}",
            in_each_round(walls, bounds),
            f"{statistics.median(one.cpu for one in several):.2f}",
            f"{statistics.median(one.memory for one in several):.1f}",
        )


class Bench:
    """The servers, a site and what is measured on them.

    Args:
        pair: The servers.
        report: Gets the figures.
        folder: For files of its own.
        rounds: How often each of several programs runs that are compared.
    """

    def __init__(
        self, pair: servers.Servers, report: Report, folder: Path, rounds: int = ROUNDS
    ) -> None:
        self.rounds = rounds
        self.pair = pair
        self.report = report
        self.environment = pair.environment
        self.folder = folder

    def alternately(self, programs: dict[str, Callable[[], Run]]) -> dict[str, list[Run]]:
        """Run each program in turn, in each round."""
        runs: dict[str, list[Run]] = {name: [] for name in programs}
        for _ in range(self.rounds):
            for name, program in programs.items():
                runs[name].append(program())
        return runs

    def fill(self, addons: int) -> Connection[Cursor]:
        """Make a site whose every add-on is stale, and remember it so."""
        connection = servers.connect(self.pair.mysql_url, create=True)
        site.create(connection)
        site.fill(connection, addons, personas=False)
        site.spoil_all(connection)
        with connection.cursor() as cursor:
            cursor.execute("CREATE TABLE spoiled AS SELECT id, current_version FROM addons")
            cursor.execute("ALTER TABLE spoiled ADD PRIMARY KEY (id)")
        connection.commit()
        run([AIOWORKER, "init"], self.environment)
        return connection

    def spoil(self, connection: Connection[Cursor]) -> None:
        """Make every add-on stale again."""
        with connection.cursor() as cursor:
            cursor.execute(
                "UPDATE addons JOIN spoiled USING (id)"
                " SET addons.current_version = spoiled.current_version"
            )
        connection.commit()

    def consume(self, gather_seconds: str) -> Run:
        """Do the main job, its rate limit off, until the lanes are empty."""
        variables = {"AIOWORKER_GATHER_SECONDS": gather_seconds}
        return run(runner("consume"), self.environment | variables)

    def consume_together(self, count: int) -> float:
        """Do the main job by several processes at once; return the seconds it took them."""
        waiting = [self.folder / f"ready-{number}" for number in range(count)]
        workers = [
            subprocess.Popen(
                runner("consume"),
                env=self.environment
                | {"AIOWORKER_GATHER_SECONDS": GATHERING, "READY_FILE": str(ready)},
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            for ready in waiting
        ]
        while not all(ready.exists() for ready in waiting):
            time.sleep(0.01)
        for ready in waiting:
            ready.unlink()
        printed = [worker.communicate()[0].split() for worker in workers]
        if any(worker.returncode for worker in workers):
            raise SystemExit("a worker failed: these figures are of a broken job")
        return max(float(end) for _, end in printed) - min(float(began) for began, _ in printed)

    def sweep(self) -> None:
        """Publish all chunks."""
        run([AIOWORKER, "publish-all", "--append"], self.environment)

    def statements(self, connection: Connection[Cursor], *, changes: bool) -> Path:
        """Write what a job sends to the server for the site as it is now into a file."""
        path = self.folder / "statements.sql"
        asyncio.run(self._write_statements(connection, path, changes))
        return path

    async def _write_statements(
        self, connection: Connection[Cursor], path: Path, changes: bool
    ) -> None:
        address = DatabaseAddress.parse(self.pair.mysql_url)
        database = Database(address, connect_timeout=10, timeout=60)
        with path.open("w") as file, connection.cursor() as cursor:
            file.write("SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED;\n")
            ids = [i async for page in repo.swept_ids(database, 0) for i in page]
            for start in range(0, len(ids), 1000):
                chunk = ids[start : start + 1000]
                file.write(cursor.mogrify(repo.STALE, (json.dumps(chunk),)) + ";\n")
                if not changes:
                    continue
                stale, _missing = await repo.read_stale(database, chunk)
                for first in range(0, len(stale), repo.TRANSACTION_SIZE):
                    rows = stale[first : first + repo.TRANSACTION_SIZE]
                    write = cursor.mogrify(repo.WRITE, (json.dumps(rows),))
                    file.write(f"{write};\n")
        database.close()

    def client(self, statements: Path, prefix: Sequence[str] = ()) -> Run:
        """Send the statements by the mariadb client."""
        address = DatabaseAddress.parse(self.pair.mysql_url)
        command = [
            *prefix,
            "mariadb",
            "--no-defaults",
            f"--host={address.host}",
            f"--port={address.port}",
            f"--user={address.user}",
            "--batch",
            address.database,
        ]
        password = address.password.get_secret_value()
        secret = {"MYSQL_PWD": password} if password else {}
        return run(command, self.environment | secret, statements)

    def jobs(self) -> None:
        """Measure the whole job on a smaller site and a larger one."""
        self.report.section("The job, rate limit off, add-ons", "what", "by", *TIMED)
        for addons in SIZES:
            self.job(addons)

    def job(self, addons: int) -> None:
        """Measure the whole job beside the same statements from a file."""
        connection = self.fill(addons)
        for what, changes in ((f"{addons:,}, all change", True), (f"{addons:,}, none", False)):
            if changes:
                self.spoil(connection)
            statements = self.statements(connection, changes=changes)

            def ours(gather_seconds: str, changes: bool = changes) -> Run:
                if changes:
                    self.spoil(connection)
                self.sweep()
                return self.consume(gather_seconds)

            def limit(statements: Path = statements, changes: bool = changes) -> Run:
                if changes:
                    self.spoil(connection)
                return self.client(statements)

            runs = self.alternately(
                {
                    "aioworker": partial(ours, GATHERING),
                    ONE_BY_ONE: partial(ours, "0"),
                    "mariadb client": limit,
                }
            )
            if site.count_stale(connection):
                raise SystemExit("stale rows are left: these figures are of a broken job")
            compare(self.report, what, runs, "mariadb client")
        connection.close()

    def singles(self) -> None:
        """Measure messages of one id each, several a start beside one a start.

        A burst of nothing takes as long as the worker needs to begin and to end: that is no part
        of what a message takes.
        """
        self.report.section(
            f"{SINGLES:,} messages of one id each, rate limit off, all change; without the"
            " seconds of a burst that finds nothing",
            "by",
            "messages a second",
            "min to max",
            "ratio",
            "CPU ms a message",
        )
        connection = self.fill(SINGLES)
        ids = site_ids(connection)

        def work(gather_seconds: str) -> Run:
            self.spoil(connection)
            messages = (backlog.message([addon]) for addon in ids)
            asyncio.run(backlog.publish(self.pair.amqp_url, messages))
            done = self.consume(gather_seconds)
            if site.count_stale(connection):
                raise SystemExit("stale rows are left: these figures are of a broken job")
            return done

        runs = self.alternately(
            {
                "nothing": partial(self.consume, GATHERING),
                ONE_BY_ONE: partial(work, "0"),
                "aioworker": partial(work, GATHERING),
            }
        )
        nothing = runs.pop("nothing")
        began = statistics.median(one.wall for one in nothing)
        began_cpu = statistics.median(one.cpu for one in nothing)
        bound = statistics.median(one.wall for one in runs[ONE_BY_ONE]) - began
        for name, several in runs.items():
            walls = sorted(one.wall - began for one in several)
            wall = statistics.median(walls)
            cpu = statistics.median(one.cpu for one in several) - began_cpu
            self.report.row(
                name,
                f"{len(ids) / wall:,.0f}",
                f"{len(ids) / walls[-1]:,.0f} to {len(ids) / walls[0]:,.0f}",
                f"{bound / wall:.2f}",
                f"{cpu / len(ids) * 1000:.2f}",
            )
        connection.close()

    def wake(self) -> None:
        """Measure how soon an idle worker does what is published, and what its looking costs."""
        self.report.section(
            "Published to an idle worker, a start due", "what", "median ms", "p99 ms", "most ms"
        )
        connection = self.fill(2 * wake.TRIES)
        ids = site_ids(connection)[: wake.TRIES]
        with wake.worker(self.pair) as worker:
            found = asyncio.run(
                wake.seconds_to_rows(self.pair, connection, ids, wake.PAUSE_SECONDS)
            )
            self.wakes("the main job's row is right", found)
            self.spoil(connection)
            silence = 2 * (wake.SILENCE_SECONDS,)
            found = asyncio.run(wake.seconds_to_rows(self.pair, connection, ids[:3], silence))
            self.wakes("after a minute of silence, 3 tries", found)
            time.sleep(wake.SILENCE_SECONDS)
            before = sum(worker.cpu_times()[:2])
            time.sleep(IDLE_SECONDS)
            used = sum(worker.cpu_times()[:2]) - before
        app = ("--app", "benchmarks.wake")
        run([AIOWORKER, "init", *app], self.environment)
        with wake.worker(self.pair, *app):
            path = self.folder / "runs"
            found = wake.seconds_to_runs(self.pair, path, wake.TRIES)
            self.wakes("a task that does nothing runs", found)
        self.report.add()
        self.report.add(f"CPU in {IDLE_SECONDS} s after a minute of silence: {used:.2f} s.")
        connection.close()

    def wakes(self, what: str, seconds: Sequence[float]) -> None:
        """Add how long something took, over several tries."""
        each = sorted(1000 * one for one in seconds)
        p99 = each[math.ceil(0.99 * len(each)) - 1]
        self.report.row(what, f"{statistics.median(each):.1f}", f"{p99:.1f}", f"{each[-1]:.1f}")

    def memory(self) -> None:
        """Measure a worker's peak memory with a backlog, beside that of an idle one."""
        self.report.section(
            f"Memory: {backlog.MESSAGES:,} messages of one id, {backlog.SAME:,} of them of the"
            f" same, {backlog.LARGE} of 4 MiB in a row, {backlog.LARGE} among small ones",
            "what",
            "peak MiB",
            "above idle",
        )
        connection = self.fill(backlog.MESSAGES // 5)
        idle = backlog.peak(self.pair, connection, GATHERING)
        self.report.row("idle", f"{idle:.1f}", "")
        asyncio.run(backlog.publish(self.pair.amqp_url, backlog.mixed(site_ids(connection))))
        busy = backlog.peak(self.pair, connection, GATHERING)
        if site.count_stale(connection):
            raise SystemExit("stale rows are left: these figures are of a broken job")
        self.report.row("the backlog, rate limit off", f"{busy:.1f}", f"{busy - idle:.1f}")
        connection.close()

    def publishing(self) -> None:
        """Measure publishing beside a bare loop."""
        self.report.section("Publishing, every message confirmed", "what", "by", *TIMED)
        servers.connect(self.pair.mysql_url, create=True).close()
        run([AIOWORKER, "init"], self.environment)
        programs: dict[str, Callable[[], Run]] = {
            name: partial(run, runner(name), self.environment)
            for name in ("publish", "publish-bare")
        }
        compare(self.report, "200,000 ids", self.alternately(programs), "publish-bare")
        asyncio.run(self.purge())
        self.great_sweep()

    def great_sweep(self) -> None:
        """Measure reading the ids of a large table, and the whole sweep beside aio-pika alone."""
        self.report.section(f"A sweep of {GREAT:,} ids", "what", "figure", "ratio")
        connection = servers.connect(self.pair.mysql_url, create=True)
        site.create(connection)
        site.fill_plainly(connection, GREAT)
        connection.close()
        run([AIOWORKER, "init"], self.environment)
        first, last = asyncio.run(read_ends(self.pair.mysql_url, GREAT, END, self.rounds))
        self.report.row(f"reading the first {END:,} ids", f"{first:.2f} s", "1.00")
        self.report.row(f"reading the last {END:,} ids", f"{last:.2f} s", f"{last / first:.2f}")
        bare = run([*runner("publish-bare"), str(GREAT)], self.environment)
        asyncio.run(self.purge())
        ours = run([AIOWORKER, "publish-all"], self.environment)
        asyncio.run(self.purge())
        for name, one in (
            ("the same bodies by aio-pika, no table read", bare),
            ("aioworker publish-all", ours),
        ):
            figure = f"{one.wall:.1f} s, CPU {one.cpu:.1f} s"
            self.report.row(name, figure, f"{one.wall / bare.wall:.2f}")

    async def purge(self) -> None:
        """Empty the lanes."""
        connection = await aio_pika.connect(self.pair.amqp_url)
        channel = await connection.channel()
        queues = Queues.of(TASK, "aioworker")
        for name in (queues.bulk, queues.urgent):
            await (await channel.get_queue(name, ensure=False)).purge()
        await connection.close()

    def beside_another_writer(self, addons: int) -> None:
        """Measure what another writer feels of the job, and of one statement a chunk."""
        self.report.section(
            "Another writer, 200 statements a second beside the job",
            "job",
            "p50 ms",
            "p99 ms",
            "p99 ratio",
            "deadlocks",
        )
        connection = self.fill(addons)
        chunks = [
            UPDATE_JOIN % ", ".join(map(str, range(first, first + 1000))) + ";\n"
            for first in range(1, addons * 4 // 3, 1000)
        ]
        joins = self.folder / "joins.sql"
        joins.write_text("".join(chunks))
        statements = self.statements(connection, changes=True)
        reckoning = self.folder / "reckoning.sql"
        reckoning.write_text(reckon(connection) * len(chunks))
        jobs: dict[str, Callable[[], object]] = {
            "no job": lambda: time.sleep(8),
            "aioworker": lambda: run([*ASIDE, *runner("consume")], self.environment),
            "the same statements, mariadb client": lambda: self.client(statements, ASIDE),
            "reckoning that reads no table, mariadb client": lambda: self.client(reckoning, ASIDE),
            "UPDATE … JOIN": lambda: self.client(joins, ASIDE),
        }
        felt: dict[str, list[dict[str, float]]] = {name: [] for name in jobs}
        for _ in range(self.rounds):
            for name, job in jobs.items():
                self.spoil(connection)
                if name == "aioworker":
                    self.sweep()
                felt[name].append(felt_beside(self.pair.mysql_url, addons, job))
        calm = statistics.median(one["p99"] for one in felt["no job"])
        for name, several in felt.items():
            p99 = statistics.median(one["p99"] for one in several)
            self.report.row(
                name,
                f"{statistics.median(one['p50'] for one in several):.2f}",
                f"{p99:.2f}",
                f"{p99 / calm:.2f}",
                f"{sum(one['deadlocks'] for one in several):.0f}",
            )
        connection.close()

    def small_messages(self) -> None:
        """Measure what a message costs that asks for nothing, beside other task queues."""
        self.report.section(
            f"{noop.MESSAGES:,} small messages, tasks without a rate limit, one process each",
            "by",
            "messages a second",
            "min to max",
            "aioworker to it, in each round",
            "peak MiB",
        )
        servers.connect(self.pair.mysql_url, create=True).close()
        run(
            [AIOWORKER, "init", "--app", "benchmarks.contenders.beside"],
            noop.environment(self.pair, self.folder / "seconds"),
        )
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in noop.CONTENDERS}
        for _ in range(self.rounds):
            for name, several in found.items():
                several.append(noop.messages_a_second(self.pair, name, self.folder))
        rates = {name: [one for one, _peak in several] for name, several in found.items()}
        for name, several in found.items():
            self.report.row(
                name,
                f"{statistics.median(rates[name]):,.0f}",
                f"{min(rates[name]):,.0f} to {max(rates[name]):,.0f}",
                in_each_round(rates["aioworker"], rates[name]),
                f"{statistics.median(peak for _rate, peak in several):.0f}",
            )

    def beside_peers(self) -> None:
        """Measure the whole job beside other task queues, round by round."""
        self.report.section(
            f"{PEER_ROWS:,} add-ons, rate limit off, one process each, {self.rounds} rounds",
            "what",
            "by",
            "rows a second",
            "min to max",
            "aioworker to it, in each round",
            "four processes to it",
        )
        connection = self.fill(PEER_ROWS)
        ids = site_ids(connection)
        joins = self.folder / "joins.sql"
        joins.write_text(
            "".join(
                UPDATE_JOIN % ", ".join(map(str, ids[first : first + peers.CHUNK])) + ";\n"
                for first in range(0, len(ids), peers.CHUNK)
            )
        )

        def ours(processes: int) -> float:
            self.sweep()
            return self.consume_together(processes)

        jobs: dict[str, Callable[[], float]] = {
            "aioworker": lambda: ours(1),
            "aioworker, four processes": lambda: ours(4),
            "mariadb client": lambda: self.client(joins).wall,
        } | {
            name: partial(peers.seconds, self.pair, name, self.folder, ids, UPDATE_JOIN)
            for name in peers.CONTENDERS
        }
        for what, changes in (("all change", True), ("none", False)):
            found: dict[str, list[float]] = {name: [] for name in jobs}
            for _ in range(self.rounds):
                for name, job in jobs.items():
                    if changes:
                        self.spoil(connection)
                    found[name].append(len(ids) / job())
                    if site.count_stale(connection):
                        raise SystemExit(f"{name} left stale rows")
            for name, rates in found.items():
                self.report.row(
                    what,
                    name,
                    f"{statistics.median(rates):,.0f}",
                    f"{min(rates):,.0f} to {max(rates):,.0f}",
                    in_each_round(found["aioworker"], rates),
                    in_each_round(found["aioworker, four processes"], rates),
                )
        connection.close()

    def budget(self) -> None:
        """Measure what the shared budget costs a start: time, statements, flushes, connections."""
        self.report.section("The shared budget, a start", "what", "median", "p99")
        connection = self.fill(20_000)
        spent, counted = asyncio.run(self._start_often())
        for name, several in spent.items():
            cuts = statistics.quantiles(several, n=100)
            self.report.row(name, f"{cuts[49]:.2f} ms", f"{cuts[98]:.2f} ms")
        for name, number in counted.items():
            self.report.row(f"{name} a start", f"{number / STARTS:.1f}", "")
        self.sweep()
        before = connections_made(connection)
        run([AIOWORKER, "consume", "--burst", "--rate-limit", "1000000/s"], self.environment)
        # One is the worker's own, whatever the number of chunks.
        made = connections_made(connection) - before
        self.report.row("connections of a burst of 20 chunks", made, "")
        connection.close()

    async def _start_often(self) -> tuple[dict[str, list[float]], dict[str, int]]:
        """Return the milliseconds of each start's parts, and what the server counted in all."""
        address = DatabaseAddress.parse(self.pair.mysql_url)
        database = Database(address, connect_timeout=10, timeout=60)
        budget = SharedBudget(database, TASK, RateLimit.parse("1000000/s"), "bench")
        spent: dict[str, list[float]] = {"the charge alone": [], "the whole start, one write": []}
        await budget.check()  # which sees, on a new connection, that the server will do
        before = await _counted(database)
        for _ in range(STARTS):
            began = time.perf_counter()
            await budget.check()
            async with budget.turn():
                charging = time.perf_counter()
                await budget.charge(["bench"])
                charged = time.perf_counter()
                await database.execute("UPDATE addons SET status = status WHERE id = 1")
                await budget.ended(["bench"], End("ack"))
            ended = time.perf_counter()
            for name, seconds in zip(spent, (charged - charging, ended - began), strict=True):
                spent[name].append(seconds * 1000)
        after = await _counted(database)
        database.close()
        return spent, {name: after[name] - before[name] for name in before}

    def rate(self) -> None:
        """Measure how much of a rate is used, and how near first writes come to each other."""
        self.report.section(
            "The rate kept, one worker with a backlog",
            "rate",
            "of the interval a run spends",
            "starts, of those allowed",
            "least distance of first writes, in intervals",
            "the median one",
        )
        connection = servers.connect(self.pair.mysql_url, create=True)
        for case, seconds in rate.measure(self.pair, connection):
            found = rate.distances(case, seconds)
            figures = (rate.used(case, seconds), found[0], statistics.median(found))
            self.report.row(case.rate, case.spent, *(f"{figure:.3f}" for figure in figures))
        connection.close()

    def little_stale(self, size: sweeps.Size) -> None:
        """Measure how many starts a sweep takes of which little is stale."""
        self.report.section(
            f"A sweep of {sweeps.CHUNKS} chunks of {size.ids:,} ids, 1 % of the rows stale,"
            f" at {size.rate}",
            "by",
            "chunks",
            "starts",
            "s",
            "in intervals",
            f"{sweeps.CHUNKS} chunks, in intervals",
        )
        connection = self.fill(sweeps.CHUNKS * size.ids)
        again = sweeps.Sweeps(self.pair, connection, size)
        for case in sweeps.CASES:
            found = again.measure(case)
            asyncio.run(self.purge())
            intervals = found.seconds / size.interval
            # A start each: between the first and the last of so many.
            all_of_it = f"{sweeps.CHUNKS - 1}, reckoned" if case.few else f"{intervals:.2f}"
            self.report.row(
                case.by,
                found.chunks,
                found.starts,
                f"{found.seconds:.1f}",
                f"{intervals:.2f}",
                all_of_it,
            )
        connection.close()

    def process(self) -> None:
        """Measure the worker as a process: memory, idle CPU, and the help's CPU."""
        self.report.section("The process", "what", "figure")
        connection = self.fill(20_000)
        self.sweep()
        done = run([AIOWORKER, "consume", "--burst", "--rate-limit", "1000000/s"], self.environment)
        self.report.row("peak memory of consume, 20 chunks, all change", f"{done.memory:.1f} MiB")
        self.spoil(connection)
        self.sweep()
        with connection.cursor() as cursor:  # the burst's last start was just now
            cursor.execute("UPDATE aioworker_budget SET last_start = '2000-01-01'")
        connection.commit()
        worker = psutil.Popen(
            [AIOWORKER, "consume", "--rate-limit", "1/h"],
            env=self.environment,
            stderr=subprocess.DEVNULL,
        )
        try:
            while not site_changed(connection):
                time.sleep(0.1)
            time.sleep(1)
            before = sum(worker.cpu_times()[:2])
            time.sleep(IDLE_SECONDS)
            used = sum(worker.cpu_times()[:2]) - before
        finally:
            worker.terminate()
            worker.wait()
        self.report.row(f"CPU in {IDLE_SECONDS} s of waiting for the budget", f"{used:.2f} s")
        helps = [run([AIOWORKER, "--help"], self.environment).cpu for _ in range(self.rounds)]
        self.report.row("CPU of aioworker --help", f"{statistics.median(helps):.2f} s")
        asyncio.run(self.purge())
        connection.close()


def in_each_round(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Return the ratios of rates, round by round: the median, the least and the most."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def connections_made(connection: Connection[Cursor]) -> int:
    """Return how many connections the server has accepted so far."""
    with connection.cursor() as cursor:
        cursor.execute("SHOW GLOBAL STATUS LIKE 'Connections'")
        [[_name, number]] = cursor.fetchall()
    return int(number)


async def _counted(database: Database) -> dict[str, int]:
    """Return what the server has counted: of this session, and of all."""
    [[_, statements]] = await database.query("SHOW SESSION STATUS LIKE 'Questions'")
    [[_, flushes]] = await database.query("SHOW GLOBAL STATUS LIKE 'Innodb_data_fsyncs'")
    return {"statements": int(statements), "flushes to disk": int(flushes)}


def site_ids(connection: Connection[Cursor]) -> list[int]:
    """Return the ids that a sweep publishes."""
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT id FROM addons a WHERE {site.SWEPT} ORDER BY id")
        return [addon for [addon] in cursor.fetchall()]


def site_changed(connection: Connection[Cursor]) -> bool:
    """Return whether a row differs from how the site was spoiled."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT EXISTS (SELECT 1 FROM addons JOIN spoiled USING (id)"
            " WHERE NOT (addons.current_version <=> spoiled.current_version))"
        )
        [[changed]] = cursor.fetchall()
    connection.commit()
    return bool(changed)


def main() -> None:
    """Run the benchmarks named on the command line, or all."""
    parser = argparse.ArgumentParser(prog="script/bench", description=__doc__)
    parser.add_argument("part", nargs="*", help="what to measure, as README.md names it")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of what is compared")
    parser.add_argument("--real", action="store_true", help="the sweep at 2/m, for minutes")
    asked = parser.parse_args()
    report = Report()
    report.add("# Figures")
    report.add()
    report.add(
        f"{platform.python_implementation()} {platform.python_version()}, {os.cpu_count()} cores,"
        f" medians of {asked.rounds} alternating runs, by `script/bench`. Compare the ratios;"
        " seconds differ from machine to machine."
    )
    with servers.servers(*MARIADB) as pair, tempfile.TemporaryDirectory() as folder:
        bench = Bench(pair, report, Path(folder), asked.rounds)
        parts: dict[str, Callable[[], None]] = {
            "process": bench.process,
            "budget": bench.budget,
            "rate": bench.rate,
            "sweep": partial(bench.little_stale, sweeps.REAL if asked.real else sweeps.SCALED),
            "publish": bench.publishing,
            "job": bench.jobs,
            "singles": bench.singles,
            "memory": bench.memory,
            "wake": bench.wake,
            "writer": partial(bench.beside_another_writer, 120_000),
            "noop": bench.small_messages,
            "peers": bench.beside_peers,
        }
        for name, part in parts.items():
            if name in asked.part or (not asked.part and name not in BY_NAME):
                part()
    if not asked.part:
        RESULTS.write_text("\n".join(report.lines) + "\n")


if __name__ == "__main__":
    servers.quietly(main)
