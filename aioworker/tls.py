"""TLS as an address asks for it: the words, the context made of them, and what goes wrong.

The addresses of both servers take the words of MySQL's clients. A context is made for each
connection, so that renewed files are taken without a restart.
"""

from __future__ import annotations

import asyncio
import base64
import errno
import os
import ssl
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from aioworker.errors import TlsFileError

Certificate = Mapping[str, Any]  # as ssl decodes one

_Error = TypeVar("_Error", bound=BaseException)

MODES = ("disabled", "required", "verify_ca", "verify_identity")
WORDS = ("ssl_mode", "ssl_ca", "ssl_cert", "ssl_key")
# What aiormq takes in a URL beside them.
AMQP_WORDS = ("no_verify_ssl", "capath", "cadata")
NAMES_SECONDS = 2.0
_ON, _OFF = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
_OTHER_HOST = (62, 64)  # OpenSSL's numbers: a host's name, an address
_OUT_OF_DATE = (9, 10)
_OTHER_USE = 26
# What OpenSSL says of bytes that are no TLS, in its versions.
_NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG")
_TOO_OLD = ("UNSUPPORTED_PROTOCOL", "TLSV1_ALERT_PROTOCOL_VERSION", "NO_PROTOCOLS_AVAILABLE")


class Tls(NamedTuple):
    """What an address asks of TLS.

    Args:
        mode: `required`: encrypted, whoever answers; `verify_ca`: with a certificate of a
            known authority; `verify_identity`: and one that is for the host of the address.
        ca: File of the authorities' certificates; None means the system's.
        cert: File of the client's certificate, and of its key if `key` is None.
        key: File of the client's key, without a passphrase.
        folder: Folder of authorities' certificates, named by their hashes.
        authorities: Certificates of authorities, in DER and base64.
    """

    mode: str
    ca: str | None = None
    cert: str | None = None
    key: str | None = None
    folder: str | None = None
    authorities: str | None = None

    @classmethod
    def parse(cls, words: Mapping[str, str], *, secure: bool = False) -> Tls | None:
        """Read the words of an address; None if it asks for no TLS.

        Args:
            words: Those of `WORDS` and `AMQP_WORDS` that the address has.
            secure: Whether its scheme asks for TLS.

        Raises:
            ValueError: A value is none, or contradicts another.
        """
        if "ssl_key" in words and "ssl_cert" not in words:
            raise ValueError("expected ssl_cert beside ssl_key, got ssl_key alone")
        mode = _mode(words, secure=secure)
        if mode == "disabled":
            return None
        return cls(
            mode,
            words.get("ssl_ca"),
            words.get("ssl_cert"),
            words.get("ssl_key"),
            words.get("capath"),
            _base64(words["cadata"]) if "cadata" in words else None,
        )

    def context(self) -> ssl.SSLContext:
        """Return a context made of the files as they are now: TLS 1.2 or newer.

        Raises:
            TlsFileError: One of them cannot be used; the text names it and its parameter.
        """
        context = self._trusting()
        # Python 3.13 sets it: it refuses authorities that MySQL makes for itself.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.check_hostname = self.mode == "verify_identity"
        if self.mode == "required":
            context.verify_mode = ssl.CERT_NONE
        if self.cert is not None:
            # OpenSSL does not say which of the two files it means.
            with _naming("ssl_cert", self.cert, "a certificate in PEM"):
                refuse_pipe(self.cert)
                ssl.create_default_context(cafile=self.cert)
            own = f"the key of {self.cert!r} in PEM, without a passphrase"
            with _naming("ssl_key", self.key or self.cert, own):
                refuse_pipe(self.key or self.cert)
                # Without a password OpenSSL would ask the terminal for one.
                context.load_cert_chain(self.cert, self.key, password="")
        return context

    def explain(self, error: BaseException) -> str | None:
        """Say what went wrong with TLS, and the cure; None if *error* comes from elsewhere."""
        if cut_off(error):
            return f"the server closed the connection; {self._about_own()}"
        cause = _cause(error, ssl.SSLError)
        if cause is None:
            return None
        if isinstance(cause, ssl.SSLCertVerificationError):
            return self._about_certificate(cause)
        reason = cause.reason or str(cause)
        words = f"TLS failed: {reason.replace('_', ' ').lower()}"
        if reason in _NO_TLS:
            return f"{words}; the server speaks no TLS on this port"
        if reason in _TOO_OLD:
            return f"{words}; the server must speak TLS 1.2 or newer"
        return f"{words}; {self._about_own()}" if "ALERT" in reason else words

    def _about_own(self) -> str:
        if self.cert is None:
            return "if it asks for a client's certificate, give ssl_cert and ssl_key"
        return f"it may not know the authority of ssl_cert {self.cert!r}"

    def _about_certificate(self, error: ssl.SSLCertVerificationError) -> str:
        words = f"TLS failed: {error.verify_message.rstrip('.')}"
        if error.verify_code in _OTHER_HOST:
            return words  # `explained` has the rest
        if error.verify_code == _OTHER_USE:
            return f"{words}; the server's certificate is not one for servers (serverAuth)"
        if error.verify_code in _OUT_OF_DATE:
            return f"{words}; renew the server's certificate, or set this machine's clock"
        named = self.ca or self.folder or (self.authorities and "cadata")
        if named is None:
            return f"{words}; name the authority of the server's certificate by ssl_ca"
        return f"{words}; expected the authority of the server's certificate, got: {named!r}"

    def _trusting(self) -> ssl.SSLContext:
        """Return a context that trusts the authorities that are named, or the system's."""
        if self.folder is not None and not os.path.isdir(self.folder):
            raise TlsFileError(f"capath: expected a folder of certificates, got: {self.folder!r}")
        der = None if self.authorities is None else base64.b64decode(self.authorities)
        if der is not None:
            # OpenSSL does not say which of them it means.
            with _naming("cadata", "…", "certificates in DER, in base64"):
                ssl.create_default_context(cadata=der)
        with _naming("ssl_ca", self.ca or "", "certificates in PEM"):
            refuse_pipe(self.ca or "")
            return ssl.create_default_context(cafile=self.ca, capath=self.folder, cadata=der)


def refuse_pipe(path: str | Path) -> None:
    """Refuse a file to whose reader nobody may ever say anything; no signal would end the wait.

    Raises:
        OSError: It is a named pipe, or its folder cannot be read.
    """
    if Path(path).is_fifo():
        raise OSError(errno.EINVAL, "a named pipe")


async def explained(
    error: BaseException, asked: Tls | None, shake_hands: Callable[[Tls], Awaitable[Certificate]]
) -> str | None:
    """Say what went wrong with TLS, and the cure; None if *error* comes from elsewhere.

    Args:
        error: What connecting ended with.
        asked: What the address asks of TLS.
        shake_hands: Connects again to see a certificate that is for another host, and says no more.
    """
    reason = None if asked is None else asked.explain(error)
    cause = _cause(error, ssl.SSLCertVerificationError)
    if asked is None or cause is None or cause.verify_code not in _OTHER_HOST:
        return reason
    try:
        async with asyncio.timeout(NAMES_SECONDS):
            certificate = await shake_hands(asked._replace(mode="verify_ca"))
    except Exception:  # noqa: BLE001 - the error is told without them
        return f"{reason}; use a host that its certificate names"
    named = certificate.get("subjectAltName", ())
    hosts = [value for kind, value in named if kind in ("DNS", "IP Address")]
    if not hosts:  # the first that users of MySQL meet
        return (
            f"{reason}; the server's certificate names no host, as those that MySQL makes for"
            " itself: ssl_mode=verify_ca takes any host of the authority in ssl_ca"
        )
    return f"{reason}; use a host that its certificate names: {', '.join(hosts)}"


def cut_off(error: BaseException) -> bool:
    """Return whether a server that had answered closed the connection, without a reason."""
    closed = (asyncio.IncompleteReadError, ssl.SSLEOFError, ConnectionResetError, BrokenPipeError)
    return any(_cause(error, kind) is not None for kind in closed)


def _cause(error: BaseException, kind: type[_Error]) -> _Error | None:
    """Return the first of a kind among an error and its causes."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, kind):
        cause = cause.__cause__
    return cause


def _mode(words: Mapping[str, str], *, secure: bool) -> str:
    if not words and not secure:
        return "disabled"
    unverified = _is_on("no_verify_ssl", words.get("no_verify_ssl", "0"))
    given = words.get("ssl_mode")
    if given is None:
        return "required" if unverified else "verify_identity"
    mode = given.lower().replace("-", "_")
    if mode == "preferred":
        raise ValueError(
            f"expected ssl_mode of required, verify_ca or verify_identity, got: {given!r}, which"
            " anybody on the way can turn into plain text"
        )
    if mode not in MODES:
        raise ValueError(f"expected ssl_mode of {', '.join(MODES)}, got: {given!r}")
    if unverified:
        raise ValueError("expected ssl_mode or no_verify_ssl, got both")
    if secure and mode == "disabled":
        raise ValueError(f"expected amqp:// beside ssl_mode={given}, got amqps://")
    return mode


def _is_on(word: str, value: str) -> bool:
    if value.lower() not in _ON + _OFF:
        raise ValueError(f"expected {word} of {', '.join(_ON + _OFF)}, got: {value!r}")
    return value.lower() in _ON


def _base64(text: str) -> str:
    try:
        base64.b64decode(text, validate=True)
    except ValueError:
        raise ValueError("expected cadata as certificates in DER, in base64") from None
    return text


@contextmanager
def _naming(parameter: str, path: str, what: str) -> Iterator[None]:
    """Name the parameter and the file that cannot be used, and say why."""
    try:
        yield
    except OSError as error:  # OpenSSL's errors are of this kind too
        reason = error.strerror
        if isinstance(error, ssl.SSLError):
            reason = (error.reason or "cannot be read").replace("_", " ").lower()
        raise TlsFileError(f"{parameter}: expected {what}, got: {path!r} ({reason})") from error
