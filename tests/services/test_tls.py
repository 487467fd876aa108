"""TLS to real servers with a private authority, for both addresses alike."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import psutil
import pytest

from aioworker.addresses import BrokerAddress, DatabaseAddress, Nodes
from aioworker.errors import BrokerError, DatabaseError
from aioworker.mysql.database import Database
from aioworker.rabbitmq.connection import close, connect, connected
from support import servers
from tests.authority import Authority
from tests.conftest import execute, rows

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

PASSWORD = "s3c€rät:/@% ret"


@dataclass(frozen=True)
class Encrypted:
    """Both servers with TLS, and the authority that both and their clients have."""

    broker: servers.Broker
    maria: servers.Maria
    tls_port: int
    authority: Authority
    folder: Path

    def amqps(self, query: str, host: str = "127.0.0.1", user: str = "me") -> str:
        """Return RabbitMQ's address, with the password that no Latin-1 has."""
        return f"amqps://{user}:{quote(PASSWORD, '')}@{host}:{self.tls_port}/{self._full(query)}"

    def mysql(self, query: str, host: str = "127.0.0.1", user: str = "me") -> str:
        """Return the database's address, likewise."""
        port = self.maria.port
        return f"mysql://{user}:{quote(PASSWORD, '')}@{host}:{port}/mysql{self._full(query)}"

    def _full(self, query: str) -> str:
        return query.format(folder=self.folder)


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Encrypted]:
    """Both servers, certified for 127.0.0.1; in the folder are the files of all parties."""
    folder = tmp_path_factory.mktemp("tls")
    authority, other = Authority(folder / "authority"), Authority(folder / "other")
    server = authority.certify("server", "IP:127.0.0.1,DNS:mq.internal,DNS:db.internal")
    authority.certify("client")
    other.certify("client")
    port = servers.free_port()
    node = servers.Broker(
        folder / "rabbitmq",
        f"listeners.ssl.default = 127.0.0.1:{port}",
        f"ssl_options.cacertfile = {authority.ca}",
        f"ssl_options.certfile = {server.cert}",
        f"ssl_options.keyfile = {server.key}",
        "ssl_options.verify = verify_peer",
        "ssl_options.fail_if_no_peer_cert = false",
    )
    maria = servers.Maria(
        folder / "mariadb",
        f"--ssl-cert={server.cert}",
        f"--ssl-key={server.key}",
        f"--ssl-ca={authority.ca}",
    )
    try:
        with ThreadPoolExecutor() as pool:
            ready = pool.submit(node.start)
            maria.start()
            ready.result()
        _make_users(node, maria)
        yield Encrypted(node, maria, port, authority, folder)
    finally:
        maria.stop()
        node.stop()


def _make_users(node: servers.Broker, maria: servers.Maria) -> None:
    node.control("add_user", "me", PASSWORD)
    node.control("set_permissions", "me", ".*", ".*", ".*")
    connection = servers.connect(maria.url("mysql"))
    for user, needs in (("me", "NONE"), ("secure", "SSL"), ("certified", "X509")):
        execute(
            connection,
            f"CREATE USER {user} IDENTIFIED BY '{PASSWORD}' REQUIRE {needs}",
            f"GRANT ALL ON *.* TO {user}",
        )
    connection.close()


async def cipher_of_database(url: str) -> str:
    """Return what encrypts a connection to the database, empty for nothing."""
    database = Database(DatabaseAddress.parse(url), connect_timeout=10, timeout=10)
    try:
        [[_name, cipher]] = await database.query("SHOW STATUS LIKE 'Ssl_cipher'")
    finally:
        database.close()
        await asyncio.sleep(0.1)  # TLS says goodbye before the test's event loop ends
    return str(cipher)


async def log_in_to_broker(url: str) -> None:
    """Connect to RabbitMQ; its port of TLS takes nothing else."""
    await close(await connect(Nodes(BrokerAddress.parse_all(url)), 10, "test"))


TRUSTED = [
    "?ssl_ca={folder}/authority/ca.pem",
    "?ssl_mode=VERIFY_IDENTITY&ssl_ca={folder}/authority/ca.pem",
    "?ssl_mode=verify_ca&ssl_ca={folder}/authority/ca.pem",
    "?ssl_mode=required",
    "?ssl_mode=required&ssl_ca={folder}/other/ca.pem",
    "?ssl_ca={folder}/authority/ca.pem&ssl_cert={folder}/authority/client.pem"
    "&ssl_key={folder}/authority/client-key.pem",
]


@pytest.mark.parametrize("query", TRUSTED)
async def test_a_connection_to_the_database_is_encrypted_as_the_address_asks(
    encrypted: Encrypted, query: str
) -> None:
    assert (await cipher_of_database(encrypted.mysql(query))).startswith("TLS_")


@pytest.mark.parametrize("query", [*TRUSTED, "?cafile={folder}/authority/ca.pem"])
async def test_a_connection_to_rabbitmq_is_encrypted_as_the_address_asks(
    encrypted: Encrypted, query: str
) -> None:
    await log_in_to_broker(encrypted.amqps(query))
    await log_in_to_broker(encrypted.amqps(query).replace("amqps://", "amqp://"))


async def test_without_a_word_of_tls_a_connection_is_plain_text(encrypted: Encrypted) -> None:
    """As before; a password that no Latin-1 has is right all the same."""
    plain = encrypted.broker.url(user="me", password=quote(PASSWORD, ""))

    assert await cipher_of_database(encrypted.mysql("")) == ""
    await log_in_to_broker(plain)


async def test_heartbeat_and_name_are_those_of_the_address(encrypted: Encrypted) -> None:
    url = encrypted.amqps("?ssl_mode=required&heartbeat=31&name=mine")

    async with connected(Nodes(BrokerAddress.parse_all(url)), 10, "test") as opened:
        assert opened.transport is not None
        assert opened.transport.connection.connection_tune.heartbeat == 31
        assert "mine" in encrypted.broker.control("list_connections", "client_properties")


@pytest.mark.parametrize(
    ("host", "query", "reason"),
    [
        (
            "127.0.0.1",
            "?ssl_ca={folder}/other/ca.pem",
            "TLS failed: self-signed certificate in certificate chain; expected the authority of"
            " the server's certificate, got: '{folder}/other/ca.pem'",
        ),
        (
            "127.0.0.1",
            "?ssl_mode=verify_ca",
            "TLS failed: self-signed certificate in certificate chain; name the authority of the"
            " server's certificate by ssl_ca",
        ),
        (
            "localhost",
            "?ssl_ca={folder}/authority/ca.pem",
            "TLS failed: Hostname mismatch, certificate is not valid for 'localhost'; use a host"
            " that its certificate names: 127.0.0.1, mq.internal, db.internal",
        ),
        (
            "127.0.0.1",
            "?ssl_ca={folder}/gone.pem",
            "ssl_ca: expected certificates in PEM, got: '{folder}/gone.pem' (No such file or"
            " directory)",
        ),
    ],
)
async def test_a_failure_of_tls_is_one_line_with_its_reason_for_both_servers(
    encrypted: Encrypted, host: str, query: str, reason: str
) -> None:
    """Not "is it running?"."""
    reason = reason.format(folder=encrypted.folder)

    with pytest.raises(DatabaseError) as of_database:
        await cipher_of_database(encrypted.mysql(query, host))
    with pytest.raises(BrokerError) as of_broker:
        await log_in_to_broker(encrypted.amqps(query, host))

    assert str(of_database.value) == (
        f"cannot use MySQL at mysql://me@{host}:{encrypted.maria.port}/mysql: {reason} (2026);"
        " check AIOWORKER_MYSQL_URL"
    )
    assert str(of_broker.value) == (
        f"cannot connect to RabbitMQ at amqps://me@{host}:{encrypted.tls_port}/: {reason};"
        " check AIOWORKER_AMQP_URL"
    )


async def test_a_look_at_a_certificate_leaves_no_connection_behind(encrypted: Encrypted) -> None:
    query = f"?ssl_ca={encrypted.folder}/authority/ca.pem"
    before = psutil.Process().num_fds()

    with pytest.raises(DatabaseError, match="use a host that its certificate names"):
        await cipher_of_database(encrypted.mysql(query, host="localhost"))
    with pytest.raises(BrokerError, match="use a host that its certificate names"):
        await log_in_to_broker(encrypted.amqps(query, host="localhost"))

    assert psutil.Process().num_fds() == before


async def test_a_client_certificate_that_is_refused_is_named(encrypted: Encrypted) -> None:
    """Some servers say why, some only close the connection: MariaDB does now this, now that."""
    own = f"{encrypted.folder}/other/client"
    query = f"?ssl_mode=required&ssl_cert={own}.pem&ssl_key={own}-key.pem"

    with pytest.raises(DatabaseError) as of_database:
        await cipher_of_database(encrypted.mysql(query))
    with pytest.raises(BrokerError) as of_broker:
        await log_in_to_broker(encrypted.amqps(query))

    for refused in (of_database, of_broker):
        assert f"it may not know the authority of ssl_cert '{own}.pem'" in str(refused.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"name": "expired", "days": -1},
            "certificate has expired; renew the server's certificate, or set this machine's clock",
        ),
        (
            {"name": "hostless", "names": "email:root@db.internal"},
            "IP address mismatch, certificate is not valid for '127.0.0.1'; the server's"
            " certificate names no host, as those that MySQL makes for itself:"
            " ssl_mode=verify_ca takes any host of the authority in ssl_ca",
        ),
        (
            {"name": "of_a_client", "use": "clientAuth"},
            "unsuitable certificate purpose; the server's certificate is not one for servers"
            " (serverAuth)",
        ),
    ],
)
async def test_what_is_wrong_with_a_server_s_certificate_is_said_with_its_cure(
    encrypted: Encrypted, given: dict[str, Any], words: str
) -> None:
    made = encrypted.authority.certify(**given)
    files = [encrypted.folder / "authority" / name for name in ("server.pem", "server-key.pem")]
    good = [file.read_bytes() for file in files]
    admin: Connection[Cursor] = servers.connect(encrypted.maria.url("mysql"))
    try:
        for file, other in zip(files, (made.cert, made.key), strict=True):
            file.write_bytes(other.read_bytes())
        execute(admin, "FLUSH SSL")
        with pytest.raises(DatabaseError) as refused:
            await cipher_of_database(encrypted.mysql("?ssl_ca={folder}/authority/ca.pem"))
    finally:
        for file, content in zip(files, good, strict=True):
            file.write_bytes(content)
        execute(admin, "FLUSH SSL")
        admin.close()

    assert str(refused.value).endswith(
        f"/mysql: TLS failed: {words} (2026); check AIOWORKER_MYSQL_URL"
    )


@pytest.mark.parametrize(
    ("user", "query", "cure"),
    [
        (
            "secure",
            "",
            "if the server asks for TLS, add ssl_mode=required or ssl_ca=FILE to the URL",
        ),
        (
            "certified",
            "?ssl_mode=required",
            "if it asks for a client's certificate, add ssl_cert and ssl_key",
        ),
    ],
)
async def test_a_user_who_must_use_tls_is_told_how(
    encrypted: Encrypted, user: str, query: str, cure: str
) -> None:
    """MariaDB tells them nothing but "access denied"."""
    with pytest.raises(DatabaseError, match="Access denied") as refused:
        await cipher_of_database(encrypted.mysql(query, user=user))

    assert str(refused.value).endswith(
        f"(1045); check user and password in AIOWORKER_MYSQL_URL; {cure}"
    )


async def test_a_server_that_wants_tls_of_all_is_told_with_the_cure(
    encrypted: Encrypted,
) -> None:
    admin: Connection[Cursor] = servers.connect(encrypted.maria.url("mysql"))
    execute(admin, "SET GLOBAL require_secure_transport = ON")
    try:
        with pytest.raises(DatabaseError, match="add ssl_mode=required or ssl_ca=FILE to the URL"):
            await cipher_of_database(encrypted.mysql(""))
        assert await cipher_of_database(encrypted.mysql("?ssl_mode=required"))
    finally:
        execute(admin, "SET GLOBAL require_secure_transport = OFF")
        admin.close()


async def test_rabbitmq_without_tls_is_told_from_one_that_is_away(encrypted: Encrypted) -> None:
    url = f"amqps://127.0.0.1:{encrypted.broker.port}/?ssl_mode=required"

    with pytest.raises(BrokerError) as refused:
        await log_in_to_broker(url)

    assert str(refused.value).startswith(
        f"cannot connect to RabbitMQ at amqps://127.0.0.1:{encrypted.broker.port}/: TLS failed: "
    )
    assert str(refused.value).endswith(
        "; the server speaks no TLS on this port; check AIOWORKER_AMQP_URL"
    )


async def test_a_port_of_tls_is_no_broker_that_is_away(encrypted: Encrypted) -> None:
    """`amqp://` where `amqps://` is meant."""
    words = "it speaks TLS on this port|is it running, and without TLS"  # as far as it got
    with pytest.raises(BrokerError, match=words) as refused:
        await log_in_to_broker(f"amqp://127.0.0.1:{encrypted.tls_port}/")

    assert "\n" not in str(refused.value)


async def test_renewed_files_are_taken_at_the_next_connection(
    encrypted: Encrypted, tmp_path: Path
) -> None:
    """And missing ones are waited for: the address is parsed once, the files are read each time."""
    ca = tmp_path / "ca.pem"
    address = DatabaseAddress.parse(encrypted.mysql(f"?ssl_ca={ca}"))
    database = Database(address, connect_timeout=10, timeout=10)
    with pytest.raises(DatabaseError, match="No such file"):
        await database.ready()

    ca.write_bytes(encrypted.authority.ca.read_bytes())

    assert await database.query("SELECT 1") == [(1,)]
    database.close()
    await asyncio.sleep(0.1)  # as above


async def test_no_login_hangs_on_somebody_else_s(
    pair: servers.Servers, shop: Connection[Cursor]
) -> None:
    """MySQL remembers who logged in by TLS, and lets them in by a hash until it restarts."""
    [[version]] = rows(shop, "SELECT VERSION()")
    if "MariaDB" in version:
        pytest.skip("MariaDB has no caching_sha2_password")
    address = DatabaseAddress.parse(pair.mysql_url)
    execute(
        shop,
        "DROP USER IF EXISTS hashed",
        f"CREATE USER hashed IDENTIFIED WITH caching_sha2_password BY '{PASSWORD}'",
        "GRANT ALL ON *.* TO hashed",
    )
    plain = f"mysql://hashed:{quote(PASSWORD, '')}@{address.host}:{address.port}/mysql"

    async def alone() -> None:
        """Log in without TLS: only with the package for it, whoever was there before."""
        if find_spec("cryptography") is None:
            with pytest.raises(DatabaseError, match=r"needs TLS .* or .*aioworker\[rsa\]"):
                await cipher_of_database(plain)
        else:
            assert await cipher_of_database(plain) == ""

    await alone()
    assert await cipher_of_database(f"{plain}?ssl_mode=required")
    await alone()
    execute(shop, "DROP USER hashed")
