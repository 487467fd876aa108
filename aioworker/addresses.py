"""Addresses of the servers: parsed once, and shown without their passwords."""

from __future__ import annotations

import ipaddress
import re
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import SplitResult, quote, unquote, urlsplit

from pydantic import SecretStr

from aioworker import tls
from aioworker.tls import Tls

# What other clients' addresses begin with works as it is: Celery's, and SQLAlchemy's with a driver.
# No other: what stands behind a + may ask for TLS, which nobody must lose without a word.
_AMQP_SCHEMES = {"amqp": "amqp", "amqps": "amqps", "pyamqp": "amqp", "librabbitmq": "amqp"}
_MYSQL_DRIVERS = "aiomysql asyncmy cymysql mariadbconnector mysqlconnector mysqldb pymysql pyodbc"
_MYSQL_SCHEMES = {
    scheme + driver: "mysql"
    for scheme in ("mysql", "mariadb")
    for driver in ("", *(f"+{name}" for name in _MYSQL_DRIVERS.split()))
}
_AMQP_EXAMPLE = "amqp://user:password@host:5672/vhost"
_MYSQL_EXAMPLE = "mysql://user:password@host:3306/database"
_TLS_WORDS = {word: word for word in tls.WORDS}
_MYSQL_PARAMETERS = _TLS_WORDS | {"unix_socket": "unix_socket"}
_AMQP_PARAMETERS = (
    _TLS_WORDS
    | {"cafile": "ssl_ca", "certfile": "ssl_cert", "keyfile": "ssl_key"}
    | {word: word for word in (*tls.AMQP_WORDS, "auth", "heartbeat", "name", "timeout")}
)
_AUTH = ("plain", "external")
LONGEST_SECONDS = 3600
_QUOTES = "\"'`\u2018\u2019\u201c\u201d\xab\xbb"  # a word processor's too
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_SCHEME = re.compile(r"[a-z][a-z0-9+._-]*(?=://)", re.IGNORECASE)
_SECURE = re.compile(r".*\+(ssl|tls)")
_NEXT_NODE = re.compile(r"\s*,\s*(?=[a-z+]+://)", re.IGNORECASE)
_SEMICOLON = re.compile(r";\s*[a-z+]+://", re.IGNORECASE)


class BrokerAddress(NamedTuple):
    """One RabbitMQ node.

    Args:
        url: The address as aio-pika takes it, password included; never shown.
        shown: The address without its password, for logs and errors.
        user: The user's name.
        vhost: The virtual host.
        tls: What it asks of TLS; None for plain text.
        name: What RabbitMQ lists the connection as; None leaves it to the command.
        heartbeat: Seconds between two heartbeats, 1 to 3600; None leaves it to the worker.
        timeout: Seconds to connect to this node at most, 1 to 3600; None for no other bound
            than the setting's.
    """

    url: SecretStr
    shown: str
    user: str
    vhost: str
    tls: Tls | None = None
    name: str | None = None
    heartbeat: int | None = None
    timeout: int | None = None

    @classmethod
    def parse_all(cls, text: str) -> tuple[BrokerAddress, ...]:
        """Parse comma-separated URLs, the nodes of one cluster.

        Raises:
            ValueError: A URL is not `amqp[s]://user:password@host:port/vhost`, or a query
                parameter is unknown or contradicts another.
        """
        if _SEMICOLON.search(text):
            raise ValueError("expected ',' between the URLs of nodes, got ';'")
        return tuple(cls._parse(part) for part in _NEXT_NODE.split(text))

    @classmethod
    def _parse(cls, text: str) -> BrokerAddress:
        parts = _split(text, _AMQP_SCHEMES, _AMQP_EXAMPLE)
        if not parts.hostname:
            raise ValueError(f"expected a host, such as {_AMQP_EXAMPLE}, got none")
        if "," in parts.path:
            raise ValueError(_one_host(","))
        given = _parameters(parts.query, _AMQP_PARAMETERS)
        asked = Tls.parse(
            {word: given[word] for word in (*tls.WORDS, *tls.AMQP_WORDS) if word in given},
            secure=parts.scheme == "amqps",
        )
        scheme, port = ("amqp", 5672) if asked is None else ("amqps", 5671)
        user = _user(parts) or "guest"
        vhost = _decoded(parts.path[1:]) or "/"
        userinfo = ":".join(quote(each, "") for each in (user, _password(parts) or "guest"))
        auth = given.get("auth", "plain").lower()
        if auth not in _AUTH:
            raise ValueError(f"expected auth of {', '.join(_AUTH)}, got: {given['auth']!r}")
        url = f"{scheme}://{userinfo}@{_host(parts)}:{parts.port or port}/{quote(vhost, '')}"
        return cls(
            url=SecretStr(f"{url}?auth={auth}" if "auth" in given else url),
            shown=_without_password(parts),
            user=user,
            vhost=vhost,
            tls=asked,
            name=given.get("name"),
            heartbeat=_seconds("heartbeat", given),
            timeout=_seconds("timeout", given),
        )


# The nodes of one cluster, the next to be tried first. Whoever fails on one puts it last: a node
# that is cut off from the others lets everybody connect, and serves nothing.
Nodes = deque[BrokerAddress]


class DatabaseAddress(NamedTuple):
    """One MySQL or MariaDB database.

    Args:
        host: Name or address of the server.
        port: From 1 to 65535.
        user: The user's name.
        password: Never shown.
        database: The schema that holds the tables.
        shown: The address without its password, for logs and errors.
        tls: What it asks of TLS; None for plain text.
        unix_socket: Path of the server's socket, in place of host and port.
    """

    host: str
    port: int
    user: str
    password: SecretStr
    database: str
    shown: str
    tls: Tls | None = None
    unix_socket: str | None = None

    @classmethod
    def parse(cls, text: str) -> DatabaseAddress:
        """Parse `mysql://user:password@host:port/database?ssl_mode=…`.

        Raises:
            ValueError: The URL has another form, or a query parameter is unknown or
                contradicts another.
        """
        parts = _split(text, _MYSQL_SCHEMES, _MYSQL_EXAMPLE)
        given = _parameters(parts.query, _MYSQL_PARAMETERS)
        socket = given.get("unix_socket")
        if not parts.hostname and socket is None:
            raise ValueError(f"expected a host, such as {_MYSQL_EXAMPLE}, got none")
        database = _decoded(parts.path[1:])
        if not database or "/" in database or ";" in parts.path:
            raise ValueError(f"expected a database, such as {_MYSQL_EXAMPLE}, got: {_shown(parts)}")
        shown = _without_password(parts)
        return cls(
            host=parts.hostname or "127.0.0.1",
            port=parts.port or 3306,
            user=_user(parts) or "root",
            password=SecretStr(_password(parts)),
            database=database,
            shown=f"{shown}?unix_socket={quote(socket, '/+')}" if socket else shown,
            tls=Tls.parse({word: given[word] for word in tls.WORDS if word in given}),
            unix_socket=socket,
        )


def _split(text: str, schemes: Mapping[str, str], example: str) -> SplitResult:
    """Split a URL, and refuse one that cannot be used; no error holds a part of a password."""
    expected = f"expected a URL such as {example}, got"
    text = text.strip()
    if (quotes := set(text[:1] + text[-1:]) & set(_QUOTES)) and text:
        raise ValueError(f"{expected} one in quotes ({min(quotes)}): leave them out")
    if _UNPRINTABLE.search(text):
        raise ValueError(f"{expected} one with a control character, or not in UTF-8")
    scheme = _scheme(text, schemes, expected)
    userinfo, at, host = _authority(text).rpartition("@")
    between = {",", ";"} & set(host)
    if between:
        raise ValueError(_one_host(min(between)))
    try:
        # urlsplit takes a bracket for a part of the host, wherever it stands, and refuses what
        # some may read as another character, such as a wide colon.
        parts = urlsplit(text.replace(userinfo + at, "", 1))
    except ValueError:
        raise ValueError(f"{expected} one whose host is no name and no address") from None
    parts = parts._replace(scheme=scheme, netloc=userinfo + at + parts.netloc)
    if "@" in parts.path + parts.query + parts.fragment:
        # Whatever stands before it may be a part of the password: show none of it.
        raise ValueError(
            f"{expected} one with '@' behind its host: in a user or"
            " password write / as %2F, @ as %40, : as %3A, # as %23, ? as %3F"
        )
    if "#" in text:
        raise ValueError(f"{expected} one with '#': write it as %23")
    if not _is_port(parts):
        raise ValueError(f"{expected} one whose port is no number from 1 to 65535")
    if parts.hostname and not _is_host(parts.hostname):
        raise ValueError(f"{expected} one whose host is no name and no address")
    return parts


def _scheme(text: str, schemes: Mapping[str, str], expected: str) -> str:
    """Return what a URL's beginning means here."""
    begins = _SCHEME.match(text)
    if begins is None:
        raise ValueError(f"{expected} one without {next(iter(schemes))}:// at its beginning")
    given = begins[0].lower()
    if given in schemes:
        return schemes[given]
    cure = ""
    if asks := _SECURE.fullmatch(given):
        cure = f"; for TLS write ssl_mode=verify_identity behind a ? in place of +{asks[1]}"
    raise ValueError(f"{expected} one that begins with {given + '://'!r}{cure}")


def _is_port(parts: SplitResult) -> bool:
    try:
        return parts.port != 0  # raises if it is no number up to 65535
    except ValueError:
        return False


def _is_host(host: str) -> bool:
    """Return whether it can be looked up: an address, or a name that DNS could have."""
    try:
        if ":" in host:
            return bool(ipaddress.IPv6Address(host))
        return bool(host.encode("idna")) and not set(host) & set(" %")
    except ValueError:
        return False


def _authority(text: str) -> str:
    """Return user, password, host and port of a URL, however wrong."""
    return re.split(r"[/?#]", text.partition("://")[2], maxsplit=1)[0]


def _one_host(between: str) -> str:
    return f"expected one host in each URL, and ',' between whole URLs of nodes, got {between!r}"


def _parameters(query: str, known: Mapping[str, str]) -> dict[str, str]:
    """Return a query's parameters by their names here, however they are spelt."""
    found: dict[str, str] = {}
    for part in filter(None, query.split("&")):
        # A + is one, as in all other parts: forms write a space so, paths and base64 do not.
        word, _, value = map(_decoded, part.partition("="))
        name = known.get(word.lower().replace("-", "_"))
        if name is None:
            raise ValueError(f"expected query parameters of {', '.join(known)}, got: {word!r}")
        if name in found:
            raise ValueError(f"expected {name} once, got it twice")
        if not value:
            raise ValueError(f"expected a value for {name}, got none")
        found[name] = value
    return found


def _seconds(name: str, given: Mapping[str, str]) -> int | None:
    text = given.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:5]) <= LONGEST_SECONDS):
        raise ValueError(f"expected {name} of 1 to {LONGEST_SECONDS} seconds, got: {text!r}")
    return int(text)


def _decoded(text: str) -> str:
    """Return a part of a URL as it is meant; one with a NUL means nothing to any server."""
    try:
        decoded = unquote(text, errors="strict")
    except UnicodeDecodeError:
        decoded = "\0"
    if "\0" in decoded:
        raise ValueError(
            "expected UTF-8 without NUL behind each %, such as %C3%A9, got other bytes"
        )
    return decoded


def _user(parts: SplitResult) -> str:
    user = _decoded(parts.username or "")
    if ":" in user and not parts.password:
        # It is shown, and what stands behind the colon is a password.
        raise ValueError("expected ':' itself between user and password, got %3A")
    return user


def _password(parts: SplitResult) -> str:
    return _decoded(parts.password or "")


def _shown(parts: SplitResult) -> str:
    """Return the URL as given and quoted, its password and its query left out."""
    if not parts.hostname:
        # What was meant as a password may stand anywhere in a URL that is not one.
        return f"'{parts.scheme}://…'"
    return repr(_without_password(parts))


def _host(parts: SplitResult) -> str:
    host = parts.hostname or ""
    return f"[{host}]" if ":" in host else host


def _without_password(parts: SplitResult) -> str:
    user = f"{parts.username}@" if parts.username else ""
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{user}{_host(parts)}{port}{parts.path}"
