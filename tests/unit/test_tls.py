"""TLS as an address asks for it: the words, and the files that they name."""

from __future__ import annotations

import base64
import os
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from aioworker.addresses import BrokerAddress, DatabaseAddress
from aioworker.errors import TlsFileError, UsageError
from aioworker.settings import Settings
from aioworker.tls import Tls
from tests.authority import Authority


def of_broker(query: str, scheme: str = "amqp") -> Tls | None:
    """Return what an address of RabbitMQ asks for."""
    [address] = BrokerAddress.parse_all(f"{scheme}://me:s3cret@host/v{query}")
    return address.tls


def of_database(query: str) -> Tls | None:
    """Return what an address of MySQL asks for."""
    return DatabaseAddress.parse(f"mysql://me:s3cret@host/d{query}").tls


ASKED = [
    ("", None),
    ("?ssl_mode=disabled", None),
    ("?ssl_mode=DISABLED&ssl_ca=/ca", None),
    ("?ssl_mode=required", Tls("required")),
    ("?ssl-mode=VERIFY_CA", Tls("verify_ca")),
    ("?ssl_mode=VERIFY_IDENTITY", Tls("verify_identity")),
    ("?ssl_ca=/ca", Tls("verify_identity", ca="/ca")),
    ("?ssl_cert=/c", Tls("verify_identity", cert="/c")),
    ("?ssl_cert=/c&ssl_key=/k", Tls("verify_identity", cert="/c", key="/k")),
    ("?ssl_mode=verify_ca&ssl_ca=/ca%20s", Tls("verify_ca", ca="/ca s")),
]


@pytest.mark.parametrize(("query", "asked"), ASKED)
@pytest.mark.parametrize("of", [of_broker, of_database])
def test_both_addresses_take_the_same_words(
    of: Callable[[str], Tls | None], query: str, asked: Tls | None
) -> None:
    """Any of them means TLS, and with no mode named the server's identity is verified."""
    assert of(query) == asked


@pytest.mark.parametrize(
    ("query", "asked"),
    [
        ("", Tls("verify_identity")),
        ("?cafile=/ca&certfile=/c&keyfile=/k", Tls("verify_identity", "/ca", "/c", "/k")),
        ("?capath=/cas", Tls("verify_identity", folder="/cas")),
        ("?cadata=QU/+QQ==", Tls("verify_identity", authorities="QU/+QQ==")),
        ("?no_verify_ssl=1", Tls("required")),
        ("?no_verify_ssl=TRUE", Tls("required")),
        ("?no_verify_ssl=yes", Tls("required")),
        ("?no_verify_ssl=on", Tls("required")),
        ("?no_verify_ssl=0", Tls("verify_identity")),
        ("?no_verify_ssl=false", Tls("verify_identity")),
        ("?no_verify_ssl=no", Tls("verify_identity")),
        ("?no_verify_ssl=Off", Tls("verify_identity")),
    ],
)
@pytest.mark.parametrize("scheme", ["amqps", "amqp"])
def test_verification_of_rabbitmq_is_off_only_by_a_clear_word(
    scheme: str, query: str, asked: Tls
) -> None:
    """`no_verify_ssl=false` turned it off; the words of aiormq still mean what they meant."""
    if query or scheme == "amqps":
        assert of_broker(query, scheme) == asked


@pytest.mark.parametrize(
    ("url", "port"),
    [
        ("amqp://h/", "5672"),
        ("amqps://h/", "5671"),
        ("amqp://h/?ssl_ca=/ca", "5671"),
        ("amqp://h/?ssl_mode=disabled", "5672"),
        ("amqp://h:99/?ssl_ca=/ca", "99"),
    ],
)
def test_the_port_of_rabbitmq_follows_from_tls(url: str, port: str) -> None:
    [address] = BrokerAddress.parse_all(url)

    written = address.url.get_secret_value()
    assert written == f"amqp{'' if address.tls is None else 's'}://guest:guest@h:{port}/%2F"


@pytest.mark.parametrize(
    ("of", "query", "problem"),
    [
        (
            of_database,
            "?ssl_mode=PREFERRED",
            "expected ssl_mode of required, verify_ca or verify_identity, got: 'PREFERRED', which"
            " anybody on the way can turn into plain text",
        ),
        (
            of_broker,
            "?ssl_mode=none",
            "expected ssl_mode of disabled, required, verify_ca, verify_identity, got: 'none'",
        ),
        (
            of_broker,
            "?no_verify_ssl=maybe",
            "expected no_verify_ssl of 1, true, yes, on, 0, false, no, off, got: 'maybe'",
        ),
        (of_broker, "?no_verify_ssl=", "expected a value for no_verify_ssl, got none"),
        (of_database, "?ssl_ca=", "expected a value for ssl_ca, got none"),
        (
            of_broker,
            "?no_verify_ssl=1&ssl_mode=verify_ca",
            "expected ssl_mode or no_verify_ssl, got both",
        ),
        (of_database, "?ssl_key=/k", "expected ssl_cert beside ssl_key, got ssl_key alone"),
        (of_broker, "?cafile=/a&ssl_ca=/b", "expected ssl_ca once, got it twice"),
        (
            of_database,
            "?ssl_mode=disabled&ssl-mode=required",
            "expected ssl_mode once, got it twice",
        ),
        (of_broker, "?cadata=€", "expected cadata as certificates in DER, in base64"),
    ],
)
def test_words_that_contradict_or_mean_nothing_are_refused(
    of: Callable[[str], Tls | None], query: str, problem: str
) -> None:
    with pytest.raises(ValueError, match="expected") as refusal:
        of(query)

    assert str(refusal.value) == problem


def test_amqps_is_never_plain_text() -> None:
    with pytest.raises(ValueError, match="expected amqp:// beside ssl_mode=disabled, got amqps://"):
        of_broker("?ssl_mode=disabled", "amqps")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Files of a private authority."""
    return Authority(tmp_path_factory.mktemp("tls") / "authority")


@pytest.mark.parametrize(
    ("mode", "verified", "host"),
    [
        ("required", ssl.CERT_NONE, False),
        ("verify_ca", ssl.CERT_REQUIRED, False),
        ("verify_identity", ssl.CERT_REQUIRED, True),
    ],
)
def test_a_mode_verifies_what_it_says(
    authority: Authority, mode: str, verified: ssl.VerifyMode, host: bool
) -> None:
    context = Tls(mode, ca=str(authority.ca)).context()

    assert (context.verify_mode, context.check_hostname) == (verified, host)
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert not context.verify_flags & ssl.VERIFY_X509_STRICT
    assert len(context.get_ca_certs()) == 1


def test_authorities_may_stand_in_the_address(authority: Authority) -> None:
    der = ssl.PEM_cert_to_DER_cert(authority.ca.read_text())

    context = Tls("verify_ca", authorities=base64.b64encode(der).decode()).context()

    assert context.get_ca_certs(binary_form=True) == [der]


@pytest.fixture(scope="module")
def files(authority: Authority) -> Path:
    """Good ones and bad ones, by name."""
    folder = authority.ca.parent
    good, _other = authority.certify("good"), authority.certify("other")
    (folder / "junk.pem").write_text("no PEM")
    os.mkfifo(folder / "pipe")
    (folder / "both.pem").write_text(good.cert.read_text() + good.key.read_text())
    subprocess.run(
        [
            *("openssl", "pkey", "-aes128", "-passout", "pass:x"),
            *("-in", good.key, "-out", folder / "locked.pem"),
        ],
        check=True,
    )
    return folder


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"ca": "gone"}, "ssl_ca: expected certificates in PEM, got: 'gone' (No such file or"),
        ({"ca": "junk.pem"}, "ssl_ca: expected certificates in PEM, got: 'junk.pem' (no certi"),
        ({"ca": "."}, "ssl_ca: expected certificates in PEM, got: '.' (Is a directory)"),
        ({"ca": "pipe"}, "ssl_ca: expected certificates in PEM, got: 'pipe' (a named pipe)"),
        ({"cert": "pipe"}, "ssl_cert: expected a certificate in PEM, got: 'pipe' (a named pipe)"),
        (
            {"cert": "good.pem", "key": "pipe"},
            "ssl_key: expected the key of 'good.pem' in PEM, without a passphrase, got: 'pipe' (a",
        ),
        ({"folder": "gone"}, "capath: expected a folder of certificates, got: 'gone'"),
        (
            {"ca": "ca.pem", "authorities": "QUJD"},
            "cadata: expected certificates in DER, in base64, got: '…' (",
        ),
        ({"authorities": "QUJD"}, "cadata: expected certificates in DER, in base64, got: '…' ("),
        ({"cert": "gone"}, "ssl_cert: expected a certificate in PEM, got: 'gone' (No such file"),
        ({"cert": "junk.pem"}, "ssl_cert: expected a certificate in PEM, got: 'junk.pem' (no c"),
        (
            {"cert": "good.pem"},
            "ssl_key: expected the key of 'good.pem' in PEM, without a passphrase, got:"
            " 'good.pem' (cannot be read)",
        ),
        (
            {"cert": "good.pem", "key": "gone"},
            "ssl_key: expected the key of 'good.pem' in PEM, without a passphrase, got: 'gone' (No",
        ),
        (
            {"cert": "good.pem", "key": "other-key.pem"},
            "ssl_key: expected the key of 'good.pem' in PEM, without a passphrase, got:"
            " 'other-key.pem' (key values mismatch)",
        ),
        (
            {"cert": "good.pem", "key": "locked.pem"},
            "ssl_key: expected the key of 'good.pem' in PEM, without a passphrase, got:"
            " 'locked.pem' (cannot be read)",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_its_parameter(
    given: dict[str, str], problem: str, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key with a passphrase must not ask the terminal for it either."""
    monkeypatch.chdir(files)

    with pytest.raises(TlsFileError) as refusal:
        Tls("verify_identity", **given).context()

    assert str(refusal.value).startswith(problem)


def test_a_certificate_and_its_key_may_be_one_file(files: Path) -> None:
    assert Tls("required", cert=str(files / "both.pem")).context()


def test_a_file_of_the_settings_is_looked_at_by_who_uses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that only publishes may not be able to read the database's files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AIOWORKER_MYSQL_URL", "mysql://me:s3cret@db/site?ssl_ca=/gone/ca.pem")
    monkeypatch.setenv("AIOWORKER_AMQP_URL", "amqps://me:s3cret@mq/")
    settings = Settings.load()

    assert tuple(settings.nodes()) == settings.amqp_url
    with pytest.raises(UsageError) as refusal:
        settings.database()

    assert str(refusal.value) == (
        "AIOWORKER_MYSQL_URL: ssl_ca: expected certificates in PEM, got: '/gone/ca.pem'"
        " (No such file or directory)"
    )
