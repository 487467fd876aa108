"""A Galera cluster: refused by what needs named locks, unless its user vouches for one writer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from aioworker.budget import schema, tables
from support import servers, site
from support.servers import Maria
from tests.conftest import TASK, Lanes, Run, execute, rows

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

COMMANDS = (("init",), ("consume", "--burst"), ("health",), ("publish-all",))
WITHOUT_LOCKS = (
    ("pause",),
    ("resume",),
    ("rate-limit", "3/m"),
    ("status",),
    ("dead", "list"),
    ("publish-all", "--dry-run"),
)
WORDS = "is a Galera node, whose named locks hold on one node only: set AIOWORKER_GALERA="


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Maria]:
    """A server that says that it is a node of one."""
    server = Maria(tmp_path_factory.mktemp("node") / "private", "--wsrep-on=ON")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def cluster(node: Maria) -> Iterator[Connection[Cursor]]:
    """The site's tables on it."""
    connection = servers.connect(node.url("site"), create=True)
    site.create(connection)
    yield connection
    connection.close()


def test_all_that_needs_locks_refuses_a_node_unless_its_user_vouches_for_one_writer(
    run: Run, node: Maria, cluster: object, lanes: Lanes
) -> None:
    """`consume` alone did: `init` made the tables, and the workers then refused to start."""
    url = node.url("site")

    refused = {command: run(*command, AIOWORKER_MYSQL_URL=url) for command in COMMANDS}
    vouched = {
        command: run(*command, AIOWORKER_MYSQL_URL=url, AIOWORKER_GALERA="single-writer")
        for command in COMMANDS
    }

    for done in refused.values():
        assert done.returncode == 1
        assert WORDS in done.stdout + done.stderr
    for command, done in vouched.items():
        assert WORDS not in done.stdout + done.stderr
        assert done.returncode == (1 if command == ("health",) else 0), done.stderr
    assert "no worker of update_current_version is alive" in vouched["health",].stderr


def test_what_needs_no_lock_works_on_any_node(
    run: Run, node: Maria, cluster: Connection[Cursor], lanes: Lanes
) -> None:
    """An operator's shell has not the environment of the workers, and could not even pause."""
    execute(cluster, *schema.STATEMENTS.values(), tables.FIRST_ROW % {"task": f"'{TASK}'"})

    done = [run(*command, AIOWORKER_MYSQL_URL=node.url("site")) for command in WITHOUT_LOCKS]

    assert [one.returncode for one in done] == [0] * len(WITHOUT_LOCKS), done
    assert not [one for one in done if WORDS in one.stdout + one.stderr]
    assert rows(cluster, "SELECT paused, gap_us FROM aioworker_budget") == [(0, 20_000_000)]
