"""Addresses: read, checked, and never shown with a password."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import quote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aioworker.addresses import BrokerAddress, DatabaseAddress
from aioworker.tls import Tls

MYSQL = "expected a URL such as mysql://user:password@host:3306/database, got"
AMQP = "expected a URL such as amqp://user:password@host:5672/vhost, got"


def test_a_broker_address_shows_everything_but_the_password() -> None:
    [address] = BrokerAddress.parse_all("amqps://za%40mboni:s3cret@mq.example:5671/zam%2Fboni")

    assert address.url.get_secret_value() == (
        "amqps://za%40mboni:s3cret@mq.example:5671/zam%2Fboni"
    )
    assert (address.user, address.vhost) == ("za@mboni", "zam/boni")
    assert address.shown == "amqps://za%40mboni@mq.example:5671/zam%2Fboni"
    assert "s3" not in repr(address)


def test_several_broker_addresses_are_the_nodes_of_a_cluster() -> None:
    nodes = BrokerAddress.parse_all("amqp://one/, amqp://two:5673/v")

    assert [node.shown for node in nodes] == ["amqp://one/", "amqp://two:5673/v"]
    assert [node.vhost for node in nodes] == ["/", "v"]


def test_a_database_address_shows_everything_but_the_password() -> None:
    address = DatabaseAddress.parse("mysql://me:s3%3Acret@db:3307/site?ssl_mode=required")

    assert (address.user, address.port) == ("me", 3307)
    assert address.password.get_secret_value() == "s3:cret"
    assert address.tls == Tls("required")
    assert "s3" not in repr(address)
    assert address.shown == "mysql://me@db:3307/site"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("mysql+pymysql://me:s3cret@db/site", "mysql://me@db/site"),
        ("mysql+aiomysql://me:s3cret@db/site", "mysql://me@db/site"),
        ("mariadb://me:s3cret@db/site", "mysql://me@db/site"),
        ("mariadb+mariadbconnector://me:s3cret@db/site", "mysql://me@db/site"),
        ("  MySQL://me:s3cret@db/site\n", "mysql://me@db/site"),
    ],
)
def test_a_database_address_of_another_client_works_as_it_is(text: str, shown: str) -> None:
    assert DatabaseAddress.parse(text).shown == shown


@pytest.mark.parametrize("scheme", ["amqp", "pyamqp", "librabbitmq", "AMQP"])
def test_a_broker_address_of_another_client_works_as_it_is(scheme: str) -> None:
    [address] = BrokerAddress.parse_all(f"{scheme}://me:s3cret@mq//")

    assert address.url.get_secret_value() == "amqp://me:s3cret@mq:5672/%2F"
    assert (address.shown, address.vhost) == ("amqp://me@mq//", "/")


AT_SIGN = (
    "one with '@' behind its host: in a user or password write / as %2F, @ as %40,"
    " : as %3A, # as %23, ? as %3F"
)
PORT = "one whose port is no number from 1 to 65535"
HOST = "one whose host is no name and no address"
NO_HOST = "expected a host, such as amqp://user:password@host:5672/vhost, got none"
BEHIND_PERCENT = "expected UTF-8 without NUL behind each %, such as %C3%A9, got other bytes"
BETWEEN = "expected one host in each URL, and ',' between whole URLs of nodes, got"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("http://me:s3cret@h/", f"{AMQP} one that begins with 'http://'"),
        ("amqp+x://me:s3cret@h/", f"{AMQP} one that begins with 'amqp+x://'"),
        ("amqp+://me:s3cret@h/", f"{AMQP} one that begins with 'amqp+://'"),
        ("url=amqp://me:s3cret@h/", f"{AMQP} one without amqp:// at its beginning"),
        ("jdbc:amqp://me:s3cret@h/", f"{AMQP} one without amqp:// at its beginning"),
        ("export URL=amqp://me:s3cret@h/", f"{AMQP} one without amqp:// at its beginning"),
        ("amqp://me:s3cret@h:x/", f"{AMQP} {PORT}"),
        ("amqp://me:s3cret@h:0/", f"{AMQP} {PORT}"),
        ("amqp://me:s3cret@h:65536/", f"{AMQP} {PORT}"),
        ("amqp:///s3cret", NO_HOST),
        ("amqp://me:s3cret@/v", NO_HOST),
        ("amqp://me:s3cret@a..h/v", f"{AMQP} {HOST}"),
        (f"amqp://me:s3cret@{'h' * 64}/v", f"{AMQP} {HOST}"),
        ("amqp://me%3As3cret%40h/v", f"{AMQP} {HOST}"),
        ("amqp://me:s3cret@[h/v", f"{AMQP} {HOST}"),
        ("amqp://me:s3cret@[::x]/v", f"{AMQP} {HOST}"),
        ("amqp://me%3As3cret@h/v", "expected ':' itself between user and password, got %3A"),
        ("amqp://h/rev_a#2", f"{AMQP} one with '#': write it as %23"),
        ("amqp://h/rev_a#", f"{AMQP} one with '#': write it as %23"),
        ("", f"{AMQP} one without amqp:// at its beginning"),
        ("me:s3cret@h", f"{AMQP} one without amqp:// at its beginning"),
        ("amqp://me:12/s3cret@h/v", f"{AMQP} {AT_SIGN}"),
        ("amqp://me:s3cret#@h/v", f"{AMQP} {AT_SIGN}"),
        ("amqp://me:s3@cret/x@h/v", f"{AMQP} {AT_SIGN}"),
        ("amqp://me:s3cr%E9t@h/v", BEHIND_PERCENT),
        ("amqp://me%00:s3cret@h/v", BEHIND_PERCENT),
        ("amqp://me:s3cret@h/%00", BEHIND_PERCENT),
        ("amqp://me:s3cret@h/v?ssl_ca=%00", BEHIND_PERCENT),
        ("amqp://me:s3\ncret@h/v", f"{AMQP} one with a control character, or not in UTF-8"),
        ("amqp://me:s3\udce9cret@h/v", f"{AMQP} one with a control character, or not in UTF-8"),
        ("amqp://me:s3cret@a host/v", f"{AMQP} {HOST}"),
        ("'amqp://me:s3cret@h/v'", f"{AMQP} one in quotes ('): leave them out"),
        ('"amqp://me:s3cret@h/v"', f'{AMQP} one in quotes ("): leave them out'),
        ("\u201camqp://me:s3cret@h/v\u201d", f"{AMQP} one in quotes (\u201c): leave them out"),
        (
            "amqp://me:s3cret@one//;amqp://me:s3cret@two//",
            "expected ',' between the URLs of nodes, got ';'",
        ),
        ("amqp://me:s3cret@one;two/v", f"{BETWEEN} ';'"),
        ("amqp://me:s3cret@one:5672,two:5672/v", f"{BETWEEN} ','"),
        ("amqp://me:s3cret@one/v,two/v", f"{BETWEEN} ','"),
        (
            "amqp://h/?vhost=v",
            "expected query parameters of ssl_mode, ssl_ca, ssl_cert, ssl_key, cafile, certfile,"
            " keyfile, no_verify_ssl, capath, cadata, auth, heartbeat, name, timeout, got: 'vhost'",
        ),
        ("amqp://h/?auth=gssapi", "expected auth of plain, external, got: 'gssapi'"),
        ("amqp://h/?heartbeat=0", "expected heartbeat of 1 to 3600 seconds, got: '0'"),
        ("amqp://h/?timeout=soon", "expected timeout of 1 to 3600 seconds, got: 'soon'"),
    ],
)
def test_a_broker_address_that_is_none_is_refused_without_its_password(
    text: str, problem: str
) -> None:
    with pytest.raises(ValueError, match="expected") as refusal:
        BrokerAddress.parse_all(text)

    assert str(refusal.value) == problem


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "mysql://me:s3cret@db/",
            "expected a database, such as mysql://user:password@host:3306/database,"
            " got: 'mysql://me@db/'",
        ),
        (
            "mysql://me:s3cret@db/site?tls=1",
            "expected query parameters of ssl_mode, ssl_ca, ssl_cert, ssl_key, unix_socket,"
            " got: 'tls'",
        ),
        (
            "mysql://db/site?ssl_mode=on",
            "expected ssl_mode of disabled, required, verify_ca, verify_identity, got: 'on'",
        ),
        ("'mysql://me:s3cret@db/site'", f"{MYSQL} one in quotes ('): leave them out"),
        ("me:s3cret@db/site", f"{MYSQL} one without mysql:// at its beginning"),
        ("postgres://me:s3cret@db/site", f"{MYSQL} one that begins with 'postgres://'"),
        ("mysql+x://me:s3cret@db/site", f"{MYSQL} one that begins with 'mysql+x://'"),
        ("mysql://db/site#x", f"{MYSQL} one with '#': write it as %23"),
        ("mysql://db/site?unix_socket=", "expected a value for unix_socket, got none"),
        (
            "mysql://me:s3cret@db/site;",
            "expected a database, such as mysql://user:password@host:3306/database,"
            " got: 'mysql://me@db/site;'",
        ),
        (
            "mysql://me:s3cret@/site",
            "expected a host, such as mysql://user:password@host:3306/database, got none",
        ),
    ],
)
def test_a_database_address_that_is_none_is_refused_without_its_password(
    text: str, problem: str
) -> None:
    with pytest.raises(ValueError, match="expected") as refusal:
        DatabaseAddress.parse(text)

    assert str(refusal.value) == problem


@pytest.mark.parametrize("parse", [BrokerAddress.parse_all, DatabaseAddress.parse])
@pytest.mark.parametrize("scheme", ["amqp", "pyamqp", "mysql", "mariadb"])
@pytest.mark.parametrize("driver", ["ssl", "tls", "SSL", "pymysql+ssl"])
def test_a_scheme_that_asks_for_tls_is_never_plain_text(
    parse: Callable[[str], object], scheme: str, driver: str
) -> None:
    """The password went out unencrypted: what stood behind the + was dropped."""
    with pytest.raises(ValueError, match=r"for TLS write ssl_mode=verify_identity behind a \?"):
        parse(f"{scheme}+{driver}://me:s3cret@h/v")


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("me:s3cret@db", "mysql://me@db/site?unix_socket=/run/a+b.sock"),
        ("me:s3cret@", "mysql://me@/site?unix_socket=/run/a+b.sock"),
        ("", "mysql:///site?unix_socket=/run/a+b.sock"),
    ],
)
def test_a_socket_needs_no_host_and_is_shown(written: str, shown: str) -> None:
    """A + is a + in a path, not a form's space."""
    address = DatabaseAddress.parse(f"mysql://{written}/site?unix_socket=/run/a+b.sock")

    assert (address.unix_socket, address.shown) == ("/run/a+b.sock", shown)


@pytest.mark.parametrize("host", ["[::1]", "[fe80::1%eth0]", "a_b", "m\xfcnchen.example", "mq."])
def test_a_host_is_whatever_can_be_looked_up(host: str) -> None:
    [address] = BrokerAddress.parse_all(f"amqp://{host}/")

    assert address.shown == f"amqp://{host}/"


PASSWORDS = st.text(min_size=1).map(lambda text: f"s3c{text}r3t")
FORMS = [
    "export URL={scheme}://me:{password}@host/v",
    "{scheme}+ssl://me:{password}@host/v",
    "{scheme}://me:{password}@host..name/v#{password}",
    "{scheme}://me:{password}@host/v",
    "'{scheme}://me:{password}@host/v'",
    "me:{password}@host/v",
    "{scheme}://me:{password}@host:x/v?ssl_mode=none",
    "{scheme}://me:{password}@one;{scheme}://me:{password}@two/v",
    "{scheme}://me:{password}@one,two/v?what=1",
    "postgres://me:{password}@host/v",
]


@pytest.mark.parametrize("form", FORMS)
@given(password=PASSWORDS)
def test_no_error_of_an_address_holds_a_part_of_its_password(form: str, password: str) -> None:
    """Whatever is in it, and however wrong the URL is."""
    for scheme, parse in (("mysql", DatabaseAddress.parse), ("amqp", BrokerAddress.parse_all)):
        try:
            found = str(parse(form.format(scheme=scheme, password=password)))
        except ValueError as error:
            found = str(error)
        assert "s3c" not in found
        assert "r3t" not in found


@given(password=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1))
def test_any_password_is_read_as_it_was_written(password: str) -> None:
    written = quote(password, "")

    [broker] = BrokerAddress.parse_all(f"amqp://me:{written}@h/")
    database = DatabaseAddress.parse(f"mysql://me:{written}@h/d")

    assert broker.url.get_secret_value() == f"amqp://me:{written}@h:5672/%2F"
    assert database.password.get_secret_value() == password


@given(
    password=st.text(
        st.characters(codec="utf-8", exclude_characters="%/?#", exclude_categories=["Cc"]),
        min_size=1,
    )
)
@example("s3[c]r3t")
@example("s3[cr3t")
@example("s3\uff1acr3t")  # a wide colon
@example("s3\u2100cr3t")  # a sign that holds a slash
def test_few_characters_of_a_password_must_be_written_otherwise(password: str) -> None:
    """A bracket in it was blamed on the host."""
    [broker] = BrokerAddress.parse_all(f"amqp://me:{password}@h/")
    database = DatabaseAddress.parse(f"mysql://me:{password}@[::1]:3307/d")

    assert broker.url.get_secret_value() == f"amqp://me:{quote(password, '')}@h:5672/%2F"
    assert (database.host, database.port) == ("::1", 3307)
    assert database.password.get_secret_value() == password
