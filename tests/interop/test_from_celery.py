"""docs/from-celery.md, followed from its first block to its last."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from celery import Celery
from celery.utils.time import rate
from kombu import pools

from tests.conftest import (
    AIOWORKER,
    COMMAND_SECONDS,
    ONE_A_START,
    eventually,
    execute,
    rows,
    summary,
)
from tests.interop.test_celery_publishes import REFUSED

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

    from support.servers import Servers

PAGE = (Path(__file__).parent.parent.parent / "docs/from-celery.md").read_text()
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
BIN = AIOWORKER.parent


class Reader:
    """Does what the page says, block by block.

    Args:
        pair: The servers; their addresses stand in for those of the page.
        folder: Where the reader works.
    """

    def __init__(self, pair: Servers, folder: Path) -> None:
        assert pair.broker is not None
        assert pair.maria is not None
        self.folder = folder
        self.blocks = deque(
            (kind, textwrap.dedent(text)) for _indent, kind, text in BLOCK.findall(PAGE)
        )
        self.old_broker = pair.broker.url()
        self._broker = pair.broker
        self._here = {
            "127.0.0.1:5672": f"127.0.0.1:{pair.broker.port}",
            "127.0.0.1:3306": f"127.0.0.1:{pair.maria.port}",
            "/opt/aioworker/bin": str(BIN),
            "/srv/shop": str(folder),
        }
        self.variables = {
            **{k: v for k, v in pair.environment.items() if not k.startswith("AIOWORKER_")},
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        }

    def take(self, kind: str, holds: str) -> str:
        """Return the next block; it is of this kind and has this in it."""
        found, text = self.blocks.popleft()
        assert (found, holds in text) == (kind, True), text
        for theirs, ours in self._here.items():
            text = text.replace(theirs, ours)
        return text

    def save(self, name: str) -> None:
        """Put the next block where its first line says."""
        (self.folder / name).write_text(self.take("python", f"# {name}\n"))

    def root(self, holds: str) -> str:
        """Run the next block, of rabbitmqctl's commands, on the node; return what it prints."""
        lines = self.take("sh", holds).splitlines()
        commands = [shlex.split(line) for line in lines]
        assert {words[0] for words in commands} == {"rabbitmqctl"}
        return "".join(self._broker.control(*words[1:]) for words in commands)

    def shell(self, holds: str) -> str:
        """Run the next block in a shell that ends at the first failure; return what it prints.

        What it exports, later blocks find.
        """
        exported = self.folder / "exported"
        done = self.run("bash", "-ec", f"{self.take('sh', holds)}\nenv -0 >{exported}\n")
        found = exported.read_text().split("\0")
        self.variables |= dict(one.split("=", 1) for one in found if one.startswith("AIOWORKER_"))
        return done

    def run(self, *command: str | Path, **variables: str) -> str:
        """Run a command to its end, which has to be a good one; return all that it prints."""
        done = subprocess.run(
            command,
            env=self.variables | variables,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def python(self, code: str) -> str:
        """Run some lines where the modules of the page can be imported."""
        return self.run(sys.executable, "-c", code, PYTHONDONTWRITEBYTECODE="1")

    def serve(self) -> str:
        """Run what waits, a start for each message; return what the worker prints."""
        return self.run("aioworker", "consume", "--burst", **ONE_A_START)


@pytest.fixture
def reader(private: Servers, tmp_path: Path, shop: Connection[Cursor]) -> Iterator[Reader]:
    """A reader, with a folder and tables for the page's example."""
    execute(
        shop,
        "CREATE TABLE shops (id INT PRIMARY KEY, rating DOUBLE, closed BOOL NOT NULL DEFAULT 0)",
        "CREATE TABLE reviews (shop_id INT NOT NULL, stars INT NOT NULL)",
        "INSERT INTO shops (id) VALUES (1), (2), (3), (4), (5)",
        "INSERT INTO shops (id, closed) VALUES (6, 1)",
        "INSERT INTO reviews SELECT id, 4 FROM shops",
    )
    yield Reader(private, tmp_path)
    assert private.broker is not None
    for what, name in (("vhost", "shop"), ("user", "shop")):
        if name in private.broker.control(f"list_{what}s").split():
            private.broker.control(f"delete_{what}", name)


class Background:
    """A command that goes on, its output in a file."""

    def __init__(self, reader: Reader, *command: str) -> None:
        self._log = reader.folder / "background.log"
        self._file = self._log.open("w")
        self.process = subprocess.Popen(
            command,
            env=reader.variables | {"PYTHONUNBUFFERED": "1"},
            cwd=reader.folder,
            stdin=subprocess.PIPE,
            stdout=self._file,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # what it has started ends with it
        )

    @property
    def log(self) -> str:
        """What it has printed so far."""
        return self._log.read_text()

    def type(self, line: str) -> None:
        """Give it a line, as a person at a terminal does."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def until(self, text: str, times: int = 1) -> None:
        """Wait until it has printed something."""
        try:
            eventually(lambda: self.log.count(text) >= times, f"{text!r}, {times} times")
        except AssertionError as error:
            error.add_note(self.log)
            raise

    def __enter__(self) -> Background:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()
        self._file.close()


def rated(shop: Connection[Cursor]) -> list[int]:
    """Return the shops that have a rating, and take it away again."""
    found = [row[0] for row in rows(shop, "SELECT id FROM shops WHERE rating = 4 ORDER BY id")]
    execute(shop, "UPDATE shops SET rating = NULL")
    return found


@pytest.mark.timeout(300)
def test_every_block_runs_in_the_order_of_the_page(
    reader: Reader, shop: Connection[Cursor]
) -> None:
    _write_the_task(reader)
    _set_up(reader)
    _run_a_worker(reader)
    _publish(reader, shop)
    _turn(reader)
    _move(reader, shop)
    _let_celery_publish(reader, shop)
    _let_celery_run(reader)

    assert list(reader.blocks) == []


def _write_the_task(reader: Reader) -> None:
    reader.save("shop_tasks.py")
    reader.save("test_shop_tasks.py")
    reader.python("import test_shop_tasks as page; page.test_the_shops_that_are_named_are_rated()")


def _set_up(reader: Reader) -> None:
    reader.root("add_vhost shop")
    said = reader.shell("aioworker init\n")
    permit = "rabbitmqctl set_permissions -p shop shop"
    assert f"{permit} '' '^amq\\.default$' '^aioworker\\.'\n" in said
    assert "queue aioworker.refresh_ratings: declared\n" in said
    reader.root("set_permissions -p shop shop '' ")
    _hurry(reader)


def _hurry(reader: Reader) -> None:
    """Set a rate that nobody has to wait for."""
    reader.run("aioworker", "rate-limit", "refresh_ratings", "100/s")


def _run_a_worker(reader: Reader) -> None:
    begin, reload, end = reader.take("sh", "kill -HUP").splitlines()
    with Background(reader, "bash") as terminal:
        terminal.type(begin)
        terminal.until("worker started")
        terminal.until("nothing queued")
        terminal.type(reload)
        terminal.until("worker started", 2)
        terminal.until("nothing queued", 2)
        terminal.type(end)
        terminal.type("wait $worker; echo it ended with $?")
        terminal.until("it ended with 0")


def _publish(reader: Reader, shop: Connection[Cursor]) -> None:
    reader.save("publish_some.py")
    reader.run(sys.executable, "publish_some.py")
    assert summary(2) in reader.serve()
    assert rated(shop) == [1, 2, 3, 4, 5]

    reader.save("view.py")
    call = "import view; print(view.review_added({}, lambda *status: print(status)))"
    assert reader.python(call) == "('204 No Content', [])\n[]\n"
    reader.save("test_view.py")
    test = "import test_view as page; page.test_a_review_has_its_shop_rated_first()"
    reader.run(sys.executable, "-c", test, AIOWORKER_AMQP_URL="amqp://127.0.0.1:1/")
    assert "published 1 id in 1 message to the urgent lane" in reader.shell(
        "aioworker publish refresh_rat"
    )
    assert reader.serve().count(" lane=urgent ") == 2
    assert rated(shop) == [3]

    _let_cron_publish(reader)
    assert summary(1) in reader.serve()
    assert rated(shop) == [1, 2, 3, 4, 5]


def _let_cron_publish(reader: Reader) -> None:
    """Run the line as cron does: by sh, with next to nothing in the environment."""
    [line] = reader.take("crontab", "publish-all").splitlines()
    found = re.fullmatch(r"(?:[\d*/]+ ){5}(.*)", line)
    assert found is not None
    ours = {name: value for name, value in reader.variables.items() if name.startswith("AIOWORKER")}
    lines = [f"{name}={value}\n" for name, value in ours.items()]
    (reader.folder / ".env").write_text("".join(lines))
    kept = ("HOME", "PYTHONPATH")
    bare = [f"{name}={reader.variables[name]}" for name in kept if name in reader.variables]
    path = "PATH=/usr/bin:/bin"
    said = reader.run("/usr/bin/env", "-i", path, *bare, "/bin/sh", "-c", found[1])
    assert said == "published 1 chunk, 5 ids, last confirmed id 5\n"


def _turn(reader: Reader) -> None:
    said = reader.shell("aioworker status refresh_ratings")
    assert "task       refresh_ratings\n" in said
    assert "10/m" in said
    _hurry(reader)


def _move(reader: Reader, shop: Connection[Cursor]) -> None:
    """The old queue's messages, as the old producer sends them, end up written by aioworker."""
    old = Celery("old", broker=reader.old_broker, set_as_current=False)
    old.conf.broker_transport_options = {"confirm_publish": True}  # lost at times without it
    for shops in ([[1], [2]], [[4]]):
        old.send_task("shop.refresh_ratings", [shops], {"why": "cron"})
    old.close()
    pools.reset()
    reader.save("celery_tasks.py")
    worker = ("celery", "-A", "celery_tasks", "worker", "--concurrency", "2", "-l", "INFO")
    with Background(reader, *worker) as passing:
        passing.until(" succeeded in ", 2)
        passing.process.terminate()
        assert passing.process.wait(30) == 0
    assert "celery\t0\t0\n" in reader.root("list_queues -p / name messages consumers")
    assert summary(2) in reader.serve()
    assert rated(shop) == [1, 2, 4]


def _let_celery_publish(reader: Reader, shop: Connection[Cursor]) -> None:
    reader.save("celery_producer.py")
    reader.run(sys.executable, "celery_producer.py")
    said = reader.serve()
    assert summary(2) in said
    assert said.count(" lane=urgent ") == 1
    assert rated(shop) == [1, 2, 3]


def _let_celery_run(reader: Reader) -> None:
    reader.save("celery_worker.py")
    command = shlex.split(reader.take("sh", "celery -A celery_worker"))
    with Background(reader, *command) as worker:
        worker.until(" ready.")
        reader.run(sys.executable, "publish_some.py")
        worker.until("celery runs", 2)
        worker.process.terminate()
        assert worker.process.wait(30) == 0
    assert summary(0) in reader.serve()


@pytest.mark.parametrize("reason", sorted({reason for reason, _send in REFUSED.values()}))
def test_every_reason_of_a_refusal_stands_in_the_page(reason: str) -> None:
    """One example stands for several values: `'callbacks'`, `'chain'`."""
    quoted = re.compile("'[^' ]*'")

    assert f"`{quoted.sub('…', reason)}`" in quoted.sub("…", PAGE)


def test_celerys_rates_are_what_the_page_says() -> None:
    """`0/m` is no limit to Celery, and a bare number is by the second."""
    assert (rate("0/m"), rate("2"), rate("2/s")) == (0, 2, 2)
