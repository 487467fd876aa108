"""Addresses of the servers: parsed once, and shown without their passwords."""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

AMQP_SCHEMES = ("amqp", "amqps")
TLS_MODES = ("disabled", "required", "verify_ca", "verify_identity")
MYSQL_PARAMETERS = ("ssl_mode", "ssl_ca", "ssl_cert", "ssl_key", "unix_socket")


@dataclass(frozen=True, slots=True)
class BrokerAddress:
    """One RabbitMQ node.

    Args:
        url: The address as aio-pika takes it, password included; never shown.
        shown: The address without its password, for logs and errors.
        user: The user's name.
        vhost: The virtual host.
    """

    url: str = field(repr=False)
    shown: str
    user: str
    vhost: str

    @classmethod
    def parse_all(cls, text: str) -> tuple[BrokerAddress, ...]:
        """Parse comma-separated URLs, the nodes of one cluster.

        Raises:
            ValueError: A URL is not `amqp[s]://user:password@host:port/vhost`.
        """
        return tuple(cls._parse(part.strip()) for part in text.split(","))

    @classmethod
    def _parse(cls, text: str) -> BrokerAddress:
        example = "amqp://user:password@host:5672/vhost"
        parts = _split(text, AMQP_SCHEMES, example)
        vhost = unquote(parts.path[1:]) or "/"
        user = unquote(parts.username or "guest")
        return cls(url=text, shown=_without_password(parts), user=user, vhost=vhost)


@dataclass(frozen=True, slots=True)
class DatabaseAddress:
    """One MySQL or MariaDB database.

    Args:
        host: Name or address of the server.
        port: From 1 to 65535.
        user: The user's name.
        password: Never shown.
        database: The schema that holds the tables.
        shown: The address without its password, for logs and errors.
        options: Query parameters: `ssl_mode`, `ssl_ca`, `ssl_cert`, `ssl_key` (as the mysql
            client means them) and `unix_socket`.
    """

    host: str
    port: int
    user: str
    password: str = field(repr=False)
    database: str
    shown: str
    options: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> DatabaseAddress:
        """Parse `mysql://user:password@host:port/database?ssl_mode=…`.

        Raises:
            ValueError: The URL has another form, or a query parameter is unknown.
        """
        example = "mysql://user:password@host:3306/database"
        parts = _split(text, ("mysql",), example)
        database = unquote(parts.path[1:])
        if not database or "/" in database:
            raise ValueError(f"expected a database, such as {example}, got: {_shown(parts)!r}")
        options = dict(parse_qsl(parts.query, keep_blank_values=True))
        for name in options:
            if name not in MYSQL_PARAMETERS:
                known = ", ".join(MYSQL_PARAMETERS)
                raise ValueError(f"expected query parameters of {known}, got: {name!r}")
        if options.get("ssl_mode", "required") not in TLS_MODES:
            modes = ", ".join(TLS_MODES)
            raise ValueError(f"expected ssl_mode of {modes}, got: {options['ssl_mode']!r}")
        return cls(
            host=parts.hostname or "127.0.0.1",
            port=parts.port or 3306,
            user=unquote(parts.username or "root"),
            password=unquote(parts.password or ""),
            database=database,
            shown=_without_password(parts),
            options=options,
        )


def _split(text: str, schemes: tuple[str, ...], example: str) -> SplitResult:
    """Split a URL, and refuse one whose scheme, host or port cannot be used."""
    try:
        parts = urlsplit(text)
        port = parts.port  # raises when it is not a number up to 65535
    except ValueError:
        raise ValueError(f"expected a URL such as {example}, got one that cannot be read") from None
    if "@" in parts.path + parts.query + parts.fragment:
        # Whatever stands before it may be a part of the password: show none of it.
        raise ValueError(
            f"expected a URL such as {example}, got one with '@' behind its host: in a user or"
            " password write / as %2F, @ as %40, : as %3A, # as %23, ? as %3F"
        )
    if parts.scheme not in schemes or not parts.hostname or port == 0:
        raise ValueError(f"expected a URL such as {example}, got: {_shown(parts)!r}")
    return parts


def _shown(parts: SplitResult) -> str:
    """Return the URL as given, its password and its query left out."""
    if not parts.scheme or not parts.hostname:
        # What was meant as a password may stand anywhere in a URL that is not one.
        return parts.scheme + "://…" if parts.scheme else "…"
    return _without_password(parts)


def _without_password(parts: SplitResult) -> str:
    user = f"{parts.username}@" if parts.username else ""
    port = f":{parts.port}" if parts.port else ""
    host = parts.hostname or ""
    if ":" in host:
        host = f"[{host}]"
    return f"{parts.scheme}://{user}{host}{port}{parts.path}"
