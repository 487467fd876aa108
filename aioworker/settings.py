"""Every setting: read once from the environment and `.env`, checked before anything is done.

A setting is a variable with the prefix `AIOWORKER_`; a command's option of the same name
wins over it. Secrets may come as files of the folder that `AIOWORKER_SECRETS_DIR` names.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from dotenv.parser import parse_stream
from pydantic import BeforeValidator, Field, GetPydanticSchema, ValidationError
from pydantic_core.core_schema import no_info_plain_validator_function
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from aioworker.addresses import BrokerAddress, DatabaseAddress, Nodes
from aioworker.errors import TlsFileError, UsageError
from aioworker.limits import NoLimit, RateLimit, parse_limit
from aioworker.rabbitmq.message import LONGEST_RUN_SECONDS, RETRIES_LIMIT
from aioworker.tasks.chunk import CHUNK_LIMIT
from aioworker.tls import refuse_pipe

if TYPE_CHECKING:
    from aioworker.mysql.database import Database

PREFIX = "AIOWORKER_"
ENV_FILE = ".env"
SECRETS_DIR = f"{PREFIX}SECRETS_DIR"
_QUEUE_PREFIX = re.compile(r"[A-Za-z0-9_-]{1,50}")
_URL_PASSWORD = re.compile(r"(://[^\s/@:]*):\S*@")
# What Kubernetes sets for a service that is called aioworker.
_KUBERNETES = re.compile(rf"{PREFIX}(PORT|SERVICE)(_|$)")


def _whole(low: int, high: int) -> BeforeValidator:
    def check(value: object) -> int:
        text = str(value)
        if not (text.isascii() and text.isdigit()) or not low <= int(text) <= high:
            raise ValueError(f"expected a whole number from {low} to {high}, got: {text!r}")
        return int(text)

    return BeforeValidator(check)


def _seconds(low: float, high: float) -> BeforeValidator:
    def check(value: object) -> float:
        try:
            seconds = float(str(value))
        except ValueError:
            seconds = float("nan")
        if not low <= seconds <= high:
            raise ValueError(f"expected seconds from {low:g} to {high:g}, got: {str(value)!r}")
        return seconds

    return BeforeValidator(check)


def _one_of(*values: str) -> BeforeValidator:
    def check(value: object) -> str:
        if value not in values:
            raise ValueError(f"expected one of {', '.join(values)}, got: {value!r}")
        return str(value)

    return BeforeValidator(check)


def _parsed(parse: Callable[[str], object]) -> GetPydanticSchema:
    def read(value: object) -> object:
        return parse(value) if isinstance(value, str) else value

    # What *parse* returns is checked. Left to itself, pydantic reads the fields of its class, and
    # of theirs, for 3 ms.
    return GetPydanticSchema(lambda _class, _handler: no_info_plain_validator_function(read))


def checked_prefix(text: object) -> str:
    """Return a prefix of queues: without a dot, so that no other prefix and task are the same.

    Raises:
        ValueError: It cannot be one.
    """
    if not (isinstance(text, str) and _QUEUE_PREFIX.fullmatch(text)):
        raise ValueError(f"expected 1 to 50 letters, digits, _ or -, got: {text!r}")
    if text == "amq":
        raise ValueError("expected another prefix: queues called amq.… are RabbitMQ's own")
    return text


def _modules(text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(","))
    for name in names:
        if name.endswith(".py") or not all(part.isidentifier() for part in name.split(".")):
            raise ValueError(f"expected modules such as shop.tasks, without .py, got: {name!r}")
    return names


class Settings(BaseSettings):
    """The settings, with the only defaults there are; `Settings.load` reads them."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_ignore_empty=True,
        extra="ignore",
        arbitrary_types_allowed=True,
        hide_input_in_errors=True,
    )

    amqp_url: Annotated[tuple[BrokerAddress, ...], NoDecode, _parsed(BrokerAddress.parse_all)] = (
        Field(
            "amqp://guest:guest@127.0.0.1:5672/",
            validate_default=True,
            description="RabbitMQ; amqps:// for TLS; several, comma-separated, are cluster nodes.",
        )
    )
    mysql_url: Annotated[DatabaseAddress, NoDecode, _parsed(DatabaseAddress.parse)] = Field(
        "mysql://root@127.0.0.1:3306/aioworker",
        validate_default=True,
        description="MySQL or MariaDB; TLS by ssl_mode, ssl_ca, ssl_cert, ssl_key in the query.",
    )
    mysql_read_url: Annotated[DatabaseAddress | None, NoDecode, _parsed(DatabaseAddress.parse)] = (
        Field(
            None,
            description="A replica, where publish-all --only-needed and status --stale read.",
        )
    )
    app: Annotated[tuple[str, ...], NoDecode, _parsed(_modules)] = Field(
        (), description="Modules that register tasks, comma-separated; the current folder's too."
    )
    rate_limit: Annotated[RateLimit | NoLimit | None, NoDecode, _parsed(parse_limit)] = Field(
        None,
        description="How often a task starts, such as 2/m, or none; unset, as the task says.",
    )
    budget: Annotated[str, _one_of("shared", "worker")] = Field(
        "shared",
        description="Whose starts the rate limit counts: shared, all workers'; worker, its own.",
    )
    galera: Annotated[str, _one_of("single-writer")] | None = Field(
        None,
        description="single-writer: all workers write through one node of a Galera cluster.",
    )
    queue_type: Annotated[str, _one_of("quorum", "classic")] = Field(
        "quorum", description="Kind of the queues that init declares: quorum or classic."
    )
    queue_prefix: Annotated[str, _parsed(checked_prefix)] = Field(
        "aioworker",
        description="What its queues' names begin with, so that projects can share a virtual host.",
    )
    chunk_size: Annotated[int, _whole(1, CHUNK_LIMIT)] = Field(
        CHUNK_LIMIT, description=f"Ids in one message of a sweep, 1 to {CHUNK_LIMIT}."
    )
    gather_seconds: Annotated[float, _seconds(0, 120)] = Field(
        20.0,
        description="Seconds before a start is due that messages are gathered for it, 0 to 120.",
    )
    max_retries: Annotated[int, _whole(0, RETRIES_LIMIT)] = Field(
        5, description=f"Attempts after the first before a dead letter, 0 to {RETRIES_LIMIT}."
    )
    task_timeout: Annotated[float, _seconds(1, LONGEST_RUN_SECONDS)] = Field(
        30.0,
        description=f"Seconds a run may take before it is cut off, 1 to {LONGEST_RUN_SECONDS}.",
    )
    shutdown_timeout: Annotated[float, _seconds(1, 3600)] = Field(
        40.0, description="Seconds to finish the running chunk after SIGTERM, 1 to 3600."
    )
    connect_timeout: Annotated[float, _seconds(0.1, 3600)] = Field(
        10.0, description="Seconds to connect, and for each answer of RabbitMQ, 0.1 to 3600."
    )
    log_level: Annotated[str, _one_of("debug", "info", "warning", "error")] = Field(
        "info", description="Lines to log: debug, info, warning or error, and worse."
    )
    log_format: Annotated[str, _one_of("console", "json")] = Field(
        "console", description="Form of log lines: console or json."
    )

    @classmethod
    def load(cls, **options: object) -> Settings:
        """Read the settings; *options* that are not None win over the environment.

        Raises:
            UsageError: A name is unknown or a value wrong; the text has no secrets.
        """
        given = {name: value for name, value in options.items() if value is not None}
        env_file = _env_file()
        secrets = _secrets(os.environ.get(SECRETS_DIR) or env_file.get(SECRETS_DIR))
        _refuse_unknown([*os.environ, *env_file, *secrets])
        # The last one that says something wins.
        found = {
            name.upper(): value
            for source in (secrets, env_file, os.environ)
            for name, value in source.items()
            if value
        }
        values = {
            name: found[PREFIX + name.upper()]
            for name in cls.model_fields
            if PREFIX + name.upper() in found
        }
        try:
            return cls(**values | given)  # type: ignore[arg-type]
        except ValidationError as error:
            # The first is enough: one line, one cure.
            first = error.errors(include_url=False, include_input=False)[0]
            name = str(first["loc"][0])
            shown = f"--{name.replace('_', '-')}" if name in given else PREFIX + name.upper()
            expected, got, value = first["msg"].removeprefix("Value error, ").partition(" got: ")
            raise UsageError(f"{shown}: {expected}{got}{_without_password(value)}") from None

    def nodes(self) -> Nodes:
        """Return RabbitMQ's nodes.

        Raises:
            UsageError: A file that they name for TLS cannot be used.
        """
        for node in self.amqp_url:
            _check_files("amqp_url", node)
        return Nodes(self.amqp_url)

    def database(
        self, timeout: float | None = None, *, check: bool = True, locks: bool = True
    ) -> Database:
        """Return the database, not yet connected.

        Args:
            timeout: Seconds for each use; without it `task_timeout`.
            check: Whether to look at files for TLS now too, and not only at each connect.
            locks: Whether named locks are relied on; what needs none works on any node of a
                Galera cluster.

        Raises:
            UsageError: A file that its address names for TLS cannot be used.
        """
        from aioworker.mysql.database import Database  # help needs no client of a server

        if check:
            _check_files("mysql_url", self.mysql_url)

        return Database(
            self.mysql_url,
            connect_timeout=self.connect_timeout,
            timeout=self.task_timeout if timeout is None else timeout,
            # With a budget of its own no worker relies on a lock.
            any_node=not locks or self.galera is not None or self.budget == "worker",
        )

    def reader(self) -> Database:
        """Return where a sweep may be read, not yet connected: a replica, if one is named.

        Raises:
            UsageError: A file that its address names for TLS cannot be used.
        """
        from aioworker.mysql.reader import Reader  # help needs no client of a server

        if self.mysql_read_url is None:
            return self.database(locks=False)
        _check_files("mysql_read_url", self.mysql_read_url)
        return Reader(
            self.mysql_read_url, connect_timeout=self.connect_timeout, timeout=self.task_timeout
        )

    @classmethod
    def table(cls) -> list[tuple[str, str, str]]:
        """Return the variable, the default and the meaning of each setting."""
        rows = [
            (PREFIX + name.upper(), _default(field.default), field.description or "")
            for name, field in cls.model_fields.items()
        ]
        folder = "Folder with a file for each secret setting, named as its variable."
        return [*rows, (SECRETS_DIR, "unset", folder)]


def _check_files(name: str, address: BrokerAddress | DatabaseAddress) -> None:
    """Make what the address asks of TLS once: what is the setting's fault is said at the start."""
    try:
        if address.tls is not None:
            address.tls.context()
    except TlsFileError as error:
        raise UsageError(f"{PREFIX}{name.upper()}: {error}") from error


def _without_password(value: str) -> str:
    """Return a wrong value as it is told: it may be a URL that was meant for another setting."""
    return _URL_PASSWORD.sub(r"\1:…@", value)


def _default(value: Any) -> str:
    if value in (None, ()):
        return "unset"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _env_file() -> dict[str, str]:
    """Return what `.env` says, nothing if there is none; `$` and `${…}` stand for themselves.

    Raises:
        UsageError: It is no text, or a line of it cannot be read.
    """
    path = Path(ENV_FILE)
    found: dict[str, str] = {}
    for binding in parse_stream(StringIO(_text(path))) if os.path.lexists(path) else ():
        name = binding.key or ""
        nothing = binding.value is None and name.upper().startswith(PREFIX)
        if binding.error or nothing:
            text = binding.original.string
            line = binding.original.line + text[: -len(text.lstrip())].count("\n")
            # What stands there may be a secret.
            raise UsageError(
                f"expected NAME=value, quotes closed, in line {line} of {path.absolute()}"
            )
        if name and binding.value is not None:
            found[name] = binding.value
    return found


def _secrets(folder: str | None) -> dict[str, str]:
    """Return what the files in the folder of secrets say, by their names.

    Raises:
        UsageError: It is none, or a secret in it is no text that can be read.
    """
    if not folder:
        return {}
    try:
        paths = list(Path(folder).iterdir())
    except OSError as error:
        shown = _without_password(repr(folder))
        raise UsageError(
            f"{SECRETS_DIR}: expected a folder, got: {shown} ({error.strerror})"
        ) from None
    ours = [path for path in paths if path.name.upper().startswith(PREFIX)]
    return {path.name: _text(path).strip() for path in ours}


def _text(path: Path) -> str:
    """Return a file's text, without the mark that some editors begin UTF-8 with.

    Raises:
        UsageError: It cannot be read, or is no UTF-8; the text names the file.
    """
    try:
        refuse_pipe(path)
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    except OSError as error:
        raise UsageError(
            f"expected a file to read, got: {path.absolute()} ({error.strerror})"
        ) from None
    if "\0" in text:  # UTF-16 without its mark, too
        raise UsageError(f"expected a text in UTF-8, got another encoding: {path.absolute()}")
    return text


def _refuse_unknown(names: Iterable[str]) -> None:
    """Refuse a misspelt `AIOWORKER_…`, wherever it stands, with the nearest known name.

    Raises:
        UsageError: There is one.
    """
    known = [PREFIX + name.upper() for name in Settings.model_fields] + [SECRETS_DIR]
    for name in map(str.upper, names):
        if name.startswith(PREFIX) and name not in known and not _KUBERNETES.match(name):
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
            raise UsageError(f"unknown setting {name}, did you mean {nearest}?")
