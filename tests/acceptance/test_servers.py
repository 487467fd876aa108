"""On which servers the tests run: those that the environment names, private ones else."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from aioworker.addresses import DatabaseAddress
from support import servers

ROOT = Path(__file__).parent.parent.parent
SECONDS = 100
PROBE = """
from support import servers

def test_that_uses_both(pair):
    assert pair.amqp_url == {amqp_url!r}
    servers.connect(pair.mysql_url, create=True).close()

def test_that_commands_the_broker(broker):
    assert False

def test_that_commands_the_database(maria):
    assert maria.port != {port}
"""


def run_python(pair: servers.Servers, *arguments: str, **urls: str) -> str:
    """Run a Python program that knows no server but those; return what it prints."""
    names = ("AIOWORKER_AMQP_URL", "AIOWORKER_MYSQL_URL")
    known = {k: v for k, v in pair.environment.items() if k not in names}
    done = subprocess.run(
        [sys.executable, *arguments],
        env=known | urls,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    return done.stdout


def test_with_one_url_set_that_server_is_used_and_the_other_is_private(
    pair: servers.Servers, tmp_path: Path
) -> None:
    """What cannot run then, since it must command the server that is named, is listed last."""
    port = DatabaseAddress.parse(pair.mysql_url).port
    probe = tmp_path / "test_probe.py"
    probe.write_text(PROBE.format(amqp_url=pair.amqp_url, port=port))
    options = ("-q", "-p", "tests.conftest", "-p", "no:cacheprovider", f"--basetemp={tmp_path}/tmp")

    said = run_python(pair, "-m", "pytest", *options, str(probe), AIOWORKER_AMQP_URL=pair.amqp_url)

    assert "2 passed, 1 skipped" in said, said
    listed = said[said.index("not run: 1") :].splitlines()
    assert listed[1] == "must command RabbitMQ, and AIOWORKER_AMQP_URL names one that runs already:"
    assert listed[2].endswith("test_probe.py::test_that_commands_the_broker")


def test_each_server_is_told_by_name_and_version(pair: servers.Servers) -> None:
    address = DatabaseAddress.parse(pair.mysql_url)
    with servers.login(address) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT VERSION()")
        version = str(cursor.fetchall()[0][0])
    kind = "MariaDB" if "MariaDB" in version else "MySQL"

    named = run_python(
        pair,
        "-m",
        "support.versions",
        AIOWORKER_AMQP_URL=pair.amqp_url,
        AIOWORKER_MYSQL_URL=pair.mysql_url,
    )

    assert re.match(r"RabbitMQ \d+\.\d+\.\d+, at amqp://", named), named
    assert f"\n{kind} {version.partition('-')[0]}, at mysql://" in named


def test_a_server_that_will_be_started_is_told_by_its_program(private: servers.Servers) -> None:
    said = run_python(private, "-m", "support.versions")

    number = r"\d+\.\d+\.\d+"
    assert re.fullmatch(f"RabbitMQ {number}, private\nMariaDB {number}, private\n", said), said


def test_a_server_that_does_not_answer_is_told_in_one_line(pair: servers.Servers) -> None:
    port = servers.free_port()

    said = run_python(
        pair,
        "-m",
        "support.versions",
        AIOWORKER_AMQP_URL=pair.amqp_url,
        AIOWORKER_MYSQL_URL=f"mysql://root:s3cret@{servers.HOST}:{port}/shop",
    )

    told = f"AIOWORKER_MYSQL_URL: no server answers at mysql://root@{servers.HOST}:{port}/shop: "
    assert len([line for line in said.splitlines() if line.startswith(told)]) == 1
    assert "s3cret" not in said
