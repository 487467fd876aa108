"""The login to MySQL: TLS if the address asks for it, and no password in clear.

The first packets of a connection may come from anybody on the way. aiomysql goes on in plain
text if they offer no TLS, and hands over the password if they ask for it; here that ends it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any, TypeVar

import aiomysql
from pymysql.constants import CLIENT, CR
from pymysql.err import MySQLError, OperationalError

from aioworker import tls
from aioworker.addresses import DatabaseAddress
from aioworker.errors import TlsFileError, let_go
from aioworker.mysql import errors
from aioworker.mysql.errors import ErrorKind

PACKET_BYTES = 65_536  # before the login; MySQL's own are a few hundred
# Ways to log in that never send the password itself over a connection that anybody can read.
_HASHED = ("mysql_native_password", "caching_sha2_password", "sha256_password")
_CLEAR = "mysql_clear_password"
_Kind = TypeVar("_Kind", bound="Connection")


async def connect(address: DatabaseAddress, **settings: Any) -> Connection:
    """Connect and log in; the caller bounds it in time.

    Args:
        address: Where, as whom, and whether by TLS.
        settings: Others of aiomysql's.

    Raises:
        MySQLError: It cannot be had, whatever the server sent.
    """
    try:
        connection = _unopened(Connection, address, address.tls, settings)
    except TlsFileError as error:
        raise OperationalError(CR.CR_SSL_CONNECTION_ERROR, str(error)) from error
    try:
        with expecting_mysql():
            await connection._connect()
    except BaseException as error:
        connection.close()
        explained = await _explained(error, address) if isinstance(error, Exception) else None
        let_go(error)
        if explained is None:
            raise
        raise explained from error
    return connection


@contextmanager
def expecting_mysql() -> Iterator[None]:
    """Turn what aiomysql makes of packets that are none into an error of MySQL's."""
    try:
        yield
    except (MySQLError, OSError):
        raise
    except Exception as error:
        words = " ".join(str(error).split()) or type(error).__name__
        raise OperationalError(0, f"no MySQL server's answer: {words}") from error


def _unopened(
    kind: type[_Kind], address: DatabaseAddress, asked: tls.Tls | None, settings: dict[str, Any]
) -> _Kind:
    # Not in the class: if a file of TLS cannot be read, `__del__` would find a half-made object.
    return kind(
        host=address.host,
        port=address.port,
        user=address.user,
        # aiomysql writes it in Latin-1; this makes UTF-8 of that, as MySQL's clients write it.
        password=address.password.get_secret_value().encode().decode("latin-1"),
        db=address.database,
        unix_socket=address.unix_socket,
        ssl=None if asked is None else asked.context(),
        **settings,
    )


async def _explained(error: Exception, address: DatabaseAddress) -> OperationalError | None:
    """Return what went wrong with TLS or with a socket, if it was that."""
    if address.unix_socket is not None and error.args[:1] == (CR.CR_CONN_HOST_ERROR,):
        # aiomysql blames a host, which nobody asked.
        why = getattr(error.__cause__, "strerror", None) or "no answer"
        words = f"Can't connect through the socket {address.unix_socket!r}: {why}"
        return OperationalError(CR.CR_CONN_HOST_ERROR, words)
    reason = await tls.explained(error, address.tls, partial(_certificate, address))
    if reason is None:
        return None
    lost = tls.cut_off(error)
    return OperationalError(CR.CR_SERVER_LOST if lost else CR.CR_SSL_CONNECTION_ERROR, reason)


async def _certificate(address: DatabaseAddress, asked: tls.Tls) -> tls.Certificate:
    """Shake hands with the server, and say no more."""
    looking = _unopened(_Looking, address, asked, {})
    try:
        await looking._connect()
    except _SeenError as seen:
        return seen.certificate
    finally:
        looking.close()
    return {}


class Connection(aiomysql.Connection):  # type: ignore[misc]  # aiomysql has no types
    """aiomysql's connection, which gives nothing away before it knows the server.

    Attributes:
        no_room: What its server said last when it had no room for a write; None for nothing.
    """

    no_room: MySQLError | None = None
    _logged_in = False

    async def _read_query_result(self, unbuffered: bool = False) -> None:
        try:
            await super()._read_query_result(unbuffered)
        except MySQLError as error:
            if errors.kind(error) is ErrorKind.NO_ROOM:
                self.no_room = error
            raise

    async def _read_bytes(self, num_bytes: int) -> bytes:
        if num_bytes > PACKET_BYTES and not self._logged_in:
            raise OperationalError(0, f"a packet of {num_bytes} bytes before the login")
        read: bytes = await super()._read_bytes(num_bytes)
        return read

    async def _get_server_information(self) -> None:
        await super()._get_server_information()
        if self._ssl_context is not None and not self.server_capabilities & CLIENT.SSL:
            raise OperationalError(
                CR.CR_SSL_CONNECTION_ERROR,
                "the server offers no TLS, which ssl_… in the address asks for",
            )
        if not self.server_capabilities & CLIENT.PLUGIN_AUTH:
            raise OperationalError(0, "the server is older than MySQL 5.5.7, or none")

    async def _request_authentication(self) -> None:
        # With TLS it may be any: what is asked for then is asked for again, encrypted.
        if self._ssl_context is None and self._server_auth_plugin == _CLEAR:
            self._refuse_unless_hashed(_CLEAR)
        await super()._request_authentication()
        self._logged_in = True

    async def _process_auth(self, plugin_name: bytes, auth_packet: Any) -> Any:
        self._refuse_unless_hashed(plugin_name.decode("ascii", "backslashreplace"))
        return await super()._process_auth(plugin_name, auth_packet)

    def _refuse_unless_hashed(self, plugin: str) -> None:
        if plugin in _HASHED or (plugin == _CLEAR and self._secure):
            return
        cure = ": use mysql_native_password or caching_sha2_password"
        if plugin == _CLEAR:
            cure = " without TLS (ssl_mode, ssl_ca)"
        words = f"cannot log in by {plugin!r}{cure}"
        raise OperationalError(CR.CR_AUTH_PLUGIN_CANNOT_LOAD, words)

    async def caching_sha2_password_auth(self, pkt: Any) -> Any:
        """Log in by the password's hash, or by the password itself, encrypted."""
        self._refuse_without_encryption("caching_sha2_password")
        return await super().caching_sha2_password_auth(pkt)

    async def sha256_password_auth(self, pkt: Any) -> Any:
        """Log in by the password, encrypted."""
        self._refuse_without_encryption("sha256_password")
        return await super().sha256_password_auth(pkt)

    def _refuse_without_encryption(self, plugin: str) -> None:
        """Refuse what only works as long as the server remembers another login of this user."""
        if self._password and not self._secure and find_spec("cryptography") is None:
            raise OperationalError(
                CR.CR_AUTH_PLUGIN_ERR,
                f"{plugin} needs TLS (ssl_mode, ssl_ca) or `pip install 'aioworker[rsa]'`",
            )


class _SeenError(Exception):
    def __init__(self, certificate: tls.Certificate) -> None:
        self.certificate = certificate


class _Looking(Connection):
    """A connection that ends with the handshake of TLS, before the login."""

    def write_packet(self, payload: bytes) -> None:
        """Send what asks for TLS, and nothing after it."""
        certificate = self._writer.transport.get_extra_info("peercert")
        if certificate is not None:
            raise _SeenError(certificate)
        super().write_packet(payload)
