"""A server that is none: nothing secret leaves, it ends in one line, and in time."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Awaitable
from pathlib import Path
from traceback import TracebackException
from urllib.parse import quote

import pytest
from pymysql.constants import CLIENT

from aioworker.addresses import BrokerAddress, DatabaseAddress, Nodes
from aioworker.errors import AioworkerError, BrokerError, DatabaseError
from aioworker.mysql.database import Database
from aioworker.rabbitmq.connection import connect
from tests import false_servers
from tests.false_servers import FalseServer, Part, greeting, packet, refusal, says, slowly, switch

PASSWORD = "s3cr€t"
OTHER = "0ther"  # which is sent to who says the right words
TLS = "?ssl_mode=required"
USE = "use mysql_native_password or caching_sha2_password"
WRONGLY = "what answers there speaks RabbitMQ's protocol wrongly"
SILENCE = "no answer in time"
MUCH_LATER = 60.0  # nothing here takes longer than the connect timeout


def connect_seconds(words: str) -> float:
    """Return a connect timeout: short for those that are waited for in vain."""
    return 1.0 if words == SILENCE else 20.0


async def refused_by(
    server: FalseServer, using: Awaitable[object], error: type[AioworkerError]
) -> str:
    """Return the one line that it ends with; nothing secret has left."""
    async with asyncio.timeout(MUCH_LATER):
        with pytest.raises(error) as refused:
            await using
    await asyncio.sleep(0.05)  # what was sent arrives

    words = str(refused.value)
    assert len(words.splitlines()) == 1
    all_that_is_known = TracebackException.from_exception(refused.value, capture_locals=True)
    for text in (words, repr(refused.value.__cause__), "".join(all_that_is_known.format())):
        for password in (PASSWORD, quote(PASSWORD), PASSWORD.encode().decode("latin-1"), OTHER):
            assert password not in text
    assert PASSWORD.encode() not in server.received
    assert PASSWORD.encode().decode("latin-1").encode() not in server.received
    return words


OLD = greeting().replace(
    struct.pack("<H", CLIENT.PLUGIN_AUTH >> 16) + bytes([21]), struct.pack("<H", 0) + bytes([21])
)
DATABASES: list[tuple[str, str, Part, str]] = [
    ("silent", "", says(b""), SILENCE),
    ("closes at once", "", says(b"", then_close=True), "Lost connection"),
    ("speaks HTTP", "", says(false_servers.HTTP), "is it a MySQL server?"),
    ("random bytes", "", says(false_servers.RANDOM), "is it a MySQL server?"),
    ("huge packet", "", says(false_servers.A_HUGE_PACKET), "16777215 bytes before the login"),
    (
        "huge packets without end",
        "",
        false_servers.endlessly(packet(0, bytes(16_777_210))),
        "bytes before the login",
    ),
    ("empty greeting", "", says(packet(0, b"")), "is it a MySQL server?"),
    ("half a greeting", "", says(greeting()[:20]), SILENCE),
    ("half a greeting, closed", "", says(greeting()[:20], then_close=True), "Lost connection"),
    ("cut greeting", "", says(packet(0, greeting()[4:30])), "is it a MySQL server?"),
    ("old greeting", "", says(OLD), "older than MySQL 5.5.7"),
    ("slow", "", slowly(greeting()), SILENCE),
    ("silent after the greeting", "", says(greeting()), SILENCE),
    ("closes after the login", "", says(greeting(), b"", then_close=True), "Lost connection"),
    ("no TLS", TLS, says(greeting()), "the server offers no TLS"),
    ("no TLS, mode", "?ssl_mode=VERIFY_IDENTITY", says(greeting()), "the server offers no TLS"),
    (
        "no TLS, wants the password",
        TLS,
        says(greeting(b"mysql_clear_password")),
        "the server offers no TLS",
    ),
    (
        "TLS that is none",
        TLS,
        says(greeting(flags=CLIENT.SSL), packet(2, b"\x00" * 7)),
        "speaks no TLS on this port",
    ),
    (
        "silent in place of TLS",
        TLS,
        says(greeting(b"mysql_clear_password", CLIENT.SSL)),
        SILENCE,
    ),
    (
        "wants the password at once",
        "",
        says(greeting(b"mysql_clear_password")),
        "cannot log in by 'mysql_clear_password' without TLS",
    ),
    (
        "wants the password",
        "",
        says(greeting(), switch(b"mysql_clear_password")),
        "cannot log in by 'mysql_clear_password' without TLS",
    ),
    (
        "wants a dialog",
        "",
        says(greeting(), switch(b"dialog")),
        f"cannot log in by 'dialog': {USE}",
    ),
    (
        "wants the old hash",
        "",
        says(greeting(), switch(b"mysql_old_password")),
        f"cannot log in by 'mysql_old_password': {USE}",
    ),
    (
        "wants the old hash, unnamed",
        "",
        says(greeting(), packet(2, b"\xfe")),
        "is it a MySQL server?",
    ),
    (
        "wants the password behind sha2",
        "",
        says(greeting(b"caching_sha2_password"), packet(2, b"\x01\x04")),
        "caching_sha2_password needs TLS",
    ),
    (
        "remembers another's login",
        "",
        says(
            greeting(b"caching_sha2_password"),
            packet(2, b"\x01\x03") + packet(3, false_servers.LOGGED_IN[4:]),
        ),
        "caching_sha2_password needs TLS",
    ),
    (
        "wants the password behind sha256",
        "",
        says(greeting(), switch(b"sha256_password")),
        "sha256_password needs TLS",
    ),
    (
        "wants a file",
        "",
        says(greeting(), false_servers.LOGGED_IN, false_servers.WANTS_A_FILE),
        "is it a MySQL server?",
    ),
    (
        "talks nonsense after the login",
        "",
        says(greeting(), false_servers.LOGGED_IN, packet(1, b"\x01") + packet(2, b"\x03")),
        "is it a MySQL server?",
    ),
    (
        "agrees to whatever it is asked",
        "",
        says(greeting(), false_servers.LOGGED_IN, *[false_servers.AGREED] * 6),
        "is it a MySQL server?",
    ),
    (
        "silent after the login",
        "",
        says(greeting(), false_servers.LOGGED_IN),
        SILENCE,
    ),
    ("refuses at once", "", says(refusal(0, b"too many\x1b[2J\n of you")), "too many"),
    (
        "a plugin with a strange name",
        "",
        says(greeting(), switch(b"caf\xe9\x1b[2J")),
        USE,
    ),
]


@pytest.mark.parametrize(
    ("query", "part", "words"), [row[1:] for row in DATABASES], ids=[row[0] for row in DATABASES]
)
async def test_a_database_that_is_none_gets_nothing_and_holds_nobody_up(
    query: str, part: Part, words: str
) -> None:
    with FalseServer(part) as server:
        address = f"mysql://me:{quote(PASSWORD)}@127.0.0.1:{server.port}/site{query}"
        database = Database(
            DatabaseAddress.parse(address), connect_timeout=connect_seconds(words), timeout=5
        )
        said = await refused_by(server, database.ready(), DatabaseError)

    assert said.startswith(f"cannot use MySQL at mysql://me@127.0.0.1:{server.port}/site: ")
    assert words in said


BROKERS: list[tuple[str, str, Part, str]] = [
    ("silent", "", says(b""), SILENCE),
    ("closes at once", "", says(b"", then_close=True), "is it running, and without TLS?"),
    ("speaks HTTP", "", says(false_servers.HTTP), "what answers there is no RabbitMQ; check"),
    ("random bytes", "", says(false_servers.RANDOM), "what answers there is no RabbitMQ; check"),
    ("a database", "", says(greeting()), "what answers there is no RabbitMQ; check"),
    (
        "a database that refuses",
        "",
        says(refusal(0, b"too many of you")),
        "what answers there is no RabbitMQ; check",
    ),
    ("a port of TLS", "", says(b"\x15\x03\x03\0\x02\x02\x28"), "it speaks TLS on this port"),
    ("huge frame", "", says(false_servers.A_HUGE_FRAME), "4294967295 bytes before the login"),
    (
        "huge frames without end",
        "",
        false_servers.endlessly(false_servers.A_HUGE_FRAME + bytes(1_000_000)),
        "4294967295 bytes before the login",
    ),
    ("half a frame", "", says(false_servers.start()[:20]), SILENCE),
    (
        "half a frame, closed",
        "",
        says(false_servers.start()[:20], then_close=True),
        "is it running, and without TLS?",
    ),
    ("slow", "", slowly(false_servers.start()), SILENCE),
    ("another protocol", "", says(b"AMQP\x00\x01\x00\x00"), "check AIOWORKER_AMQP_URL"),
    ("another login", "", says(false_servers.start("GSSAPI")), "it logs in by GSSAPI alone"),
    ("no way to log in", "", says(false_servers.start("")), ": it lets nobody in, check auth"),
    ("a wrong frame", "", says(false_servers.TUNE), WRONGLY),
    ("a frame that is none", "", says(false_servers.NO_FRAME), WRONGLY),
    ("TLS that is none", TLS, says(b"AMQP\x00\x00\x09\x01"), "speaks no TLS on this port"),
    ("TLS that is HTTP", TLS, says(false_servers.HTTP), "speaks no TLS on this port"),
    ("silent in place of TLS", TLS, says(b""), SILENCE),
    ("closes in place of TLS", TLS, says(b"", b"", then_close=True), "closed the connection"),
    ("slow in place of TLS", TLS, slowly(b"\x16\x03\x03\x00\x7a"), SILENCE),
    ("plain text", TLS, says(false_servers.start()), "speaks no TLS on this port"),
]
BROKERS_LATER: list[tuple[str, str, Part, str]] = [
    ("silent after the login", "", says(false_servers.start(), b""), SILENCE),
    (
        "closes after the login",
        "",
        says(false_servers.start(), b"", then_close=True),
        "is it running",
    ),
    (
        "wants to know more",
        "",
        says(false_servers.start(), false_servers.WANTS_MORE),
        WRONGLY,
    ),
    (
        "names nothing it can",
        "",
        says(
            false_servers.start(),
            false_servers.TUNE + false_servers.OPENED + false_servers.CLOSED,
        ),
        "what answers there confirms no message, as RabbitMQ does; check",
    ),
    (
        "confirms nothing",
        "",
        says(
            false_servers.start(capabilities={}),
            false_servers.TUNE + false_servers.OPENED + false_servers.CLOSED,
        ),
        "what answers there confirms no message, as RabbitMQ does; check",
    ),
    (
        "silent after tuning",
        "",
        says(false_servers.start(), false_servers.TUNE),
        SILENCE,
    ),
]


def connecting(server: FalseServer, query: str, password: str, words: str) -> Awaitable[object]:
    """Connect to it as RabbitMQ."""
    url = f"amqp://me:{quote(password)}@127.0.0.1:{server.port}/v{query}"
    return connect(Nodes(BrokerAddress.parse_all(url)), connect_seconds(words), "test")


@pytest.mark.parametrize(
    ("query", "part", "words"), [row[1:] for row in BROKERS], ids=[row[0] for row in BROKERS]
)
async def test_a_broker_that_is_none_gets_nothing_and_holds_nobody_up(
    query: str, part: Part, words: str
) -> None:
    with FalseServer(part) as server:
        said = await refused_by(server, connecting(server, query, PASSWORD, words), BrokerError)

    assert said.startswith("cannot connect to RabbitMQ at amqp")
    assert words in said


@pytest.mark.parametrize(
    ("query", "part", "words"),
    [row[1:] for row in BROKERS_LATER],
    ids=[row[0] for row in BROKERS_LATER],
)
async def test_a_broker_that_stops_in_the_middle_holds_nobody_up(
    query: str, part: Part, words: str
) -> None:
    """It has the password then: without TLS that is how RabbitMQ logs in."""
    with FalseServer(part) as server:
        said = await refused_by(server, connecting(server, query, OTHER, words), BrokerError)

    assert said.startswith("cannot connect to RabbitMQ at amqp://me@")
    assert words in said


async def test_a_node_s_own_timeout_is_kept() -> None:
    """As its address says, where that is shorter than the setting."""
    with FalseServer(says(b"")) as server:
        addresses = BrokerAddress.parse_all(f"amqp://127.0.0.1:{server.port}/?timeout=1")
        said = await refused_by(server, connect(Nodes(addresses), MUCH_LATER, "test"), BrokerError)

    assert SILENCE in said


async def test_a_socket_that_is_not_there_is_named_and_no_host(tmp_path: Path) -> None:
    path = tmp_path / "mysqld.sock"
    address = DatabaseAddress.parse(f"mysql://me@/site?unix_socket={path}")

    with pytest.raises(DatabaseError) as refused:
        await Database(address, connect_timeout=20, timeout=20).ready()

    assert str(refused.value) == (
        f"cannot use MySQL at mysql://me@/site?unix_socket={path}: Can't connect through the socket"
        f" '{path}': No such file or directory (2003); is it running? check AIOWORKER_MYSQL_URL"
    )
    assert refused.value.unreachable
