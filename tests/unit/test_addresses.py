"""Addresses: read, checked, and never shown with a password."""

from __future__ import annotations

import pytest

from aioworker.addresses import BrokerAddress, DatabaseAddress


def test_a_broker_address_shows_everything_but_the_password() -> None:
    [address] = BrokerAddress.parse_all("amqps://za%40mboni:s3cret@mq.example:5671/zam%2Fboni")

    assert address.url == "amqps://za%40mboni:s3cret@mq.example:5671/zam%2Fboni"
    assert (address.user, address.vhost) == ("za@mboni", "zam/boni")
    assert repr(address) == (
        "BrokerAddress(shown='amqps://za%40mboni@mq.example:5671/zam%2Fboni',"
        " user='za@mboni', vhost='zam/boni')"
    )


def test_several_broker_addresses_are_the_nodes_of_a_cluster() -> None:
    nodes = BrokerAddress.parse_all("amqp://one/, amqp://two:5673/v")

    assert [node.shown for node in nodes] == ["amqp://one/", "amqp://two:5673/v"]
    assert [node.vhost for node in nodes] == ["/", "v"]


def test_a_database_address_shows_everything_but_the_password() -> None:
    address = DatabaseAddress.parse("mysql://me:s3%3Acret@db:3307/site?ssl_mode=required")

    assert (address.user, address.password, address.port) == ("me", "s3:cret", 3307)
    assert address.options == {"ssl_mode": "required"}
    assert "s3" not in repr(address)
    assert address.shown == "mysql://me@db:3307/site"


AT_SIGN = (
    "got one with '@' behind its host: in a user or password write / as %2F, @ as %40,"
    " : as %3A, # as %23, ? as %3F"
)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("http://me:s3cret@h/", "got: 'http://me@h/'"),
        ("me:s3cret@h", AT_SIGN),
        ("amqp://me:s3cret@h:x/", "got one that cannot be read"),
        ("amqp://me:s3cret@h:0/", "got: 'amqp://me@h/'"),
        ("", "got: '…'"),
        ("amqp://me:12/s3cret@h/v", AT_SIGN),
        ("amqp://me:s3cret#@h/v", "got one that cannot be read"),
        ("amqp://me:s3@cret/x@h/v", AT_SIGN),
    ],
)
def test_a_broker_address_that_is_none_is_refused_without_its_password(
    text: str, problem: str
) -> None:
    with pytest.raises(ValueError, match="expected a URL such as") as refusal:
        BrokerAddress.parse_all(text)

    assert str(refusal.value) == (
        f"expected a URL such as amqp://user:password@host:5672/vhost, {problem}"
    )


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
    ],
)
def test_a_database_address_that_is_none_is_refused_without_its_password(
    text: str, problem: str
) -> None:
    with pytest.raises(ValueError, match="expected") as refusal:
        DatabaseAddress.parse(text)

    assert str(refusal.value) == problem
