"""Two projects in one virtual host, whose tasks have the same name."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from aioworker import Producer
from support import servers
from tests.conftest import Run, execute, rows, summary

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

APP = """
    from aioworker import Context, task

    @task(keys=lambda: [list(range(1, 21))])
    async def count_comments(ctx: Context, ids: list[int]) -> None:
        async with ctx.transaction() as cursor:
            for n in ids:
                await cursor.execute("INSERT INTO counted VALUES (%s)", (n,))
"""
COUNTED = "SELECT COUNT(*) FROM counted"
QUEUE = "count_comments"


class Project:
    """A project: its database, its prefix, and its commands."""

    def __init__(self, run: Run, amqp_url: str, mysql_url: str, prefix: str) -> None:
        self.shop = servers.connect(mysql_url, create=True)
        execute(self.shop, "CREATE TABLE counted (id INT)")
        self._run = run
        self._variables = {
            "AIOWORKER_APP": "comments",
            "AIOWORKER_AMQP_URL": amqp_url,
            "AIOWORKER_MYSQL_URL": mysql_url,
            "AIOWORKER_QUEUE_PREFIX": prefix,
        }

    def run(self, *arguments: str) -> str:
        """Run a command to its good end, and return what it prints."""
        done = self._run(*arguments, **self._variables)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def counted(self) -> int:
        """Return how many rows its runs wrote."""
        return int(rows(self.shop, COUNTED)[0][0])


@pytest.fixture
def vhost(broker: servers.Broker) -> Iterator[str]:
    """The address of a virtual host of the test's own."""
    broker.control("add_vhost", "shared")
    broker.control("set_permissions", "-p", "shared", "guest", ".*", ".*", ".*")
    yield broker.url("shared")
    broker.control("delete_vhost", "shared")


@pytest.fixture
def two(
    pair: servers.Servers, vhost: str, run: Run, tmp_path: Path, shop: Connection[Cursor]
) -> tuple[Project, Project]:
    """Two projects, the same code, two prefixes; one's database is called as the tests' own."""
    (tmp_path / "comments.py").write_text(textwrap.dedent(APP))
    first = Project(run, vhost, pair.mysql_url, "aioworker")
    second = Project(run, vhost, f"{pair.mysql_url}_other", "blog-2")
    first.run("init")
    assert f"queue blog-2.{QUEUE}.retry: declared\n" in second.run("init")
    return first, second


def test_another_prefix_takes_nothing_of_the_first_ones(two: tuple[Project, Project]) -> None:
    """The second's worker took the first's chunks, and ran them on its own database."""
    first, second = two
    first.run("publish-all", QUEUE)

    assert second.run("consume", "--burst") == summary(0)
    assert '"bulk": 0' in second.run("status", QUEUE, "--json")
    assert second.run("publish", "--task", QUEUE, "7").startswith("published 1 id")
    assert second.run("consume", "--burst") == summary(1)
    assert (first.counted(), second.counted()) == (0, 1)

    assert first.run("consume", "--burst") == summary(1)
    assert (first.counted(), second.counted()) == (20, 1)


async def test_code_publishes_to_its_own_prefix(
    two: tuple[Project, Project], vhost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = two
    async with Producer(vhost, timeout=10, queue_prefix="blog-2") as producer:
        await producer.publish(QUEUE, [1])
    monkeypatch.setenv("AIOWORKER_QUEUE_PREFIX", "blog-2")
    async with Producer(vhost, timeout=10) as producer:
        await producer.publish(QUEUE, [2])

    assert '"bulk": 0' in first.run("status", QUEUE, "--json")
    assert '"bulk": 2' in second.run("status", QUEUE, "--json")
    assert second.run("dead", "list", QUEUE) == ""


def test_init_says_what_the_queues_hold_that_were_there(
    two: tuple[Project, Project],
) -> None:
    """So that whoever meets another project's queues by one name hears of it."""
    first, _second = two
    first.run("publish-all", QUEUE, "--chunk-size", "1")

    assert f"queue aioworker.{QUEUE}: was there, RabbitMQ counts 20 messages\n" in first.run("init")


def test_the_printed_rights_are_the_prefixs_own(two: tuple[Project, Project]) -> None:
    _first, second = two

    permissions = [
        line for line in second.run("init", "--print").splitlines() if "set_permissions" in line
    ]

    assert all("aioworker" not in line for line in permissions)
    # Who only publishes needs no queue of its own.
    assert len([line for line in permissions if r"^blog-2\." in line]) == 3
