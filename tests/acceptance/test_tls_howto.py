"""The how-to about TLS: what it says to do is done, to real servers."""

from __future__ import annotations

import re
import socket
import ssl
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from support import servers, site
from tests.conftest import AIOWORKER, execute

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

HOWTO = Path(__file__).parents[2] / "docs/tls.md"
FOLDER, HOSTS, SHELL_SECONDS = "/etc/tls", ("mq.example.org", "db.example.org"), 60


def blocks(heading: str, kind: str) -> list[str]:
    """Return the blocks of a kind below a heading."""
    [part] = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", HOWTO.read_text(), re.M | re.S)
    return re.findall(rf"^```{kind}\n(.*?)^```", part, re.M | re.S)


class Place:
    """The how-to's machines, all of them here: its hosts are localhost, its folder is a new one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        [self._certify] = blocks("Make the certificates", "sh")
        self.shell(self._certify)
        (rabbitmq, mysqld), [more] = (
            blocks("Set up the servers", "ini"),
            blocks("Ask for the worker's certificate", "ini"),
        )
        self.port = servers.free_port()
        listener = self.here(rabbitmq).replace("= 5671", f"= 127.0.0.1:{self.port}")
        self.broker = servers.Broker(folder / "rabbitmq", listener, more)
        options = [f"--{line.replace(' = ', '=')}" for line in self.here(mysqld).splitlines()]
        self.maria = servers.Maria(folder / "mariadb", *options)

    def here(self, text: str) -> str:
        """Return a text of the how-to with this folder and this host."""
        for host in HOSTS:
            text = text.replace(host, "localhost")
        return text.replace(FOLDER, str(self.folder))

    def shell(self, script: str) -> subprocess.CompletedProcess[str]:
        """Run a script of the how-to."""
        if hasattr(self, "port"):
            script = script.replace("@mq.example.org/", f"@localhost:{self.port}/")
            script = script.replace("@db.example.org/", f"@localhost:{self.maria.port}/")
        path = f"export PATH={AIOWORKER.parent}:$PATH\n"
        return subprocess.run(
            ["sh", "-euc", path + self.here(script)],
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=SHELL_SECONDS,
            check=False,
        )

    def start(self) -> Connection[Cursor]:
        """Start both, with the user and the places that the addresses name."""
        self.broker.start()
        self.maria.start()
        self.broker.control("add_vhost", "shop")
        self.broker.control("add_user", "aioworker", "secret")
        self.broker.control("set_permissions", "-p", "shop", "aioworker", ".*", ".*", ".*")
        connection = servers.connect(self.maria.url("shop"), create=True)
        site.create(connection)
        execute(
            connection,
            "CREATE USER aioworker IDENTIFIED BY 'secret'",
            "GRANT ALL ON shop.* TO aioworker",
        )
        return connection

    def renew(self, name: str) -> None:
        """Make another certificate by the how-to's function."""
        function = self._certify[
            self._certify.index("certify()") : self._certify.index("\n}\n") + 3
        ]
        done = self.shell(f"{function}certify {name} {name}.example.org serverAuth")
        assert done.returncode == 0, done.stderr

    def stop(self) -> None:
        """End both."""
        self.maria.stop()
        self.broker.stop()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """Both servers as the how-to sets them up."""
    place = Place(tmp_path)
    yield place
    place.stop()


def test_what_the_how_to_says_works_as_it_stands(place: Place) -> None:
    """Without the worker's certificate RabbitMQ refuses it, with it both take it, renewed too."""
    admin = place.start()
    [without], [own] = (
        blocks("Set up the worker", "sh"),
        blocks("Ask for the worker's certificate", "sh"),
    )

    refused = place.shell(without)

    assert refused.returncode == 1
    assert "if it asks for a client's certificate, give ssl_cert and ssl_key" in refused.stderr

    [needs] = blocks("Ask for the worker's certificate", "sql")
    execute(admin, needs)
    execute(admin, "SET GLOBAL require_secure_transport = ON")
    taken = place.shell(own.replace("aioworker status", "aioworker init && aioworker status"))

    assert (taken.returncode, "update_current_version" in taken.stdout) == (0, True)

    reload_database, reload_broker = blocks("Renew", "sql")[0], blocks("Renew", "sh")[0]
    place.renew("mq")
    place.renew("db")
    execute(admin, reload_database)
    place.broker.control("eval", re.findall(r"'(.*)'", reload_broker)[0])
    renewed = place.shell(own)

    assert renewed.returncode == 0, renewed.stderr
    new = ssl.PEM_cert_to_DER_cert((place.folder / "mq.pem").read_text())
    assert served_by(place) == new
    admin.close()


def served_by(place: Place) -> bytes:
    """Return the certificate that RabbitMQ shows now."""
    context = ssl.create_default_context(cafile=place.folder / "ca.pem")
    context.verify_flags |= ssl.VERIFY_X509_STRICT  # as Python does from 3.13 on
    context.load_cert_chain(place.folder / "worker.pem", place.folder / "worker-key.pem")
    with (
        socket.create_connection(("127.0.0.1", place.port)) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as encrypted,
    ):
        found = encrypted.getpeercert(binary_form=True)
    assert found is not None
    return found


OPENSSL = ("self-signed", "Hostname mismatch", "certificate has expired", "ssl_ca: ", "ssl_key: ")
TABLE = HOWTO.read_text().partition("What the errors mean")[2]


@pytest.mark.parametrize("words", re.findall(r"^\| `([^`]+)`.*\|$", TABLE, re.M))
def test_each_error_of_the_how_to_is_one_that_is_made(words: str) -> None:
    """But for those that are OpenSSL's own words, or named by a parameter."""
    sources = "".join(
        (HOWTO.parents[1] / "aioworker" / name).read_text()
        for name in (
            *("tls.py", "mysql/login.py", "mysql/database.py"),
            *("rabbitmq/connection.py", "rabbitmq/frames.py"),
        )
    )
    ours = words.removeprefix("Access denied … ").removeprefix("caching_sha2_password ")

    assert words.startswith(OPENSSL) or ours.partition(" '")[0] in sources
