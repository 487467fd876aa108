"""Settings: one line that names the value and the cure, before anything is done."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from aioworker import Producer
from aioworker.errors import UsageError
from aioworker.limits import RateLimit
from aioworker.rabbitmq.queues import Queues
from aioworker.settings import Settings


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No `.env` of the checkout, no variable of the machine."""
    monkeypatch.chdir(tmp_path)
    for name in ("AMQP_URL", "MYSQL_URL"):
        monkeypatch.delenv(f"AIOWORKER_{name}", raising=False)
    return tmp_path


def test_without_any_variable_the_defaults_hold() -> None:
    settings = Settings.load()

    assert [node.shown for node in settings.amqp_url] == ["amqp://guest@127.0.0.1:5672/"]
    assert settings.mysql_url.shown == "mysql://root@127.0.0.1:3306/aioworker"
    assert settings.rate_limit is None
    assert (settings.chunk_size, settings.queue_type) == (1000, "quorum")
    assert (settings.task_timeout, settings.shutdown_timeout, settings.connect_timeout) == (
        30,
        40,
        10,
    )


def test_an_option_wins_over_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIOWORKER_RATE_LIMIT", "2/m")

    assert Settings.load(rate_limit="3/h").rate_limit == RateLimit(3, "h")
    assert Settings.load(rate_limit=None).rate_limit == RateLimit(2, "m")


def test_a_variable_wins_over_the_env_file(
    empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (empty_folder / ".env").write_text("AIOWORKER_CHUNK_SIZE=10\nAIOWORKER_RATE_LIMIT=1/h\nX=1\n")
    monkeypatch.setenv("AIOWORKER_CHUNK_SIZE", "20")

    settings = Settings.load()

    assert (settings.chunk_size, str(settings.rate_limit)) == (20, "1/h")


def test_an_empty_variable_is_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIOWORKER_RATE_LIMIT", "")

    assert Settings.load().rate_limit is None


def test_secrets_come_from_files(empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What systemd's LoadCredential puts there, with the newline an editor adds."""
    secrets = empty_folder / "secrets"
    secrets.mkdir()
    (secrets / "AIOWORKER_MYSQL_URL").write_text("mysql://me:s3cret@db/site\n")
    monkeypatch.setenv("AIOWORKER_SECRETS_DIR", str(secrets))

    settings = Settings.load()

    assert settings.mysql_url.password.get_secret_value() == "s3cret"
    assert settings.mysql_url.database == "site"
    assert "s3cret" not in repr(settings)


BAD = [
    (
        "AIOWORKER_RATE_LIMIT",
        "2/min",
        "expected rate limit as COUNT/UNIT, such as '2/m', or none, got: '2/min'; write '2/m'",
    ),
    ("AIOWORKER_CHUNK_SIZE", "5000", "expected a whole number from 1 to 1000, got: '5000'"),
    ("AIOWORKER_CHUNK_SIZE", "1e2", "expected a whole number from 1 to 1000, got: '1e2'"),
    ("AIOWORKER_TASK_TIMEOUT", "nan", "expected seconds from 1 to 1500, got: 'nan'"),
    ("AIOWORKER_CONNECT_TIMEOUT", "0", "expected seconds from 0.1 to 3600, got: '0'"),
    ("AIOWORKER_QUEUE_TYPE", "stream", "expected one of quorum, classic, got: 'stream'"),
    (
        "AIOWORKER_MYSQL_URL",
        "postgres://me:s3cret@db/site",
        "expected a URL such as mysql://user:password@host:3306/database,"
        " got one that begins with 'postgres://'",
    ),
    (
        "AIOWORKER_MYSQL_READ_URL",
        "mysql://me:s3cret@db2,db3/site",
        "expected one host in each URL, and ',' between whole URLs of nodes, got ','",
    ),
]


@pytest.mark.parametrize(("name", "value", "problem"), BAD)
def test_a_bad_value_is_refused_by_its_variable(
    name: str, value: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)

    with pytest.raises(UsageError) as refusal:
        Settings.load()

    assert str(refusal.value) == f"{name}: {problem}"


@pytest.mark.parametrize("name", [name for name, _default, _meaning in Settings.table()])
@pytest.mark.parametrize("url", ["amqps://me:s3cret@mq/", "x://:s3cret/s3cret@s3cret@db/site"])
def test_no_setting_tells_the_password_of_a_url_that_was_meant_for_another(
    name: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, url)

    try:
        found = repr(Settings.load())
    except UsageError as refusal:
        found = str(refusal)
    assert "s3cret" not in found


def test_a_bad_option_is_refused_by_its_option() -> None:
    with pytest.raises(UsageError) as refusal:
        Settings.load(chunk_size="0")

    assert str(refusal.value) == "--chunk-size: expected a whole number from 1 to 1000, got: '0'"


@pytest.mark.parametrize(
    "line",
    [
        "AIOWORKER_MYSQL_URL: mysql://me:s3cret@db/site",
        "AIOWORKER_MYSQL_URL mysql://me:s3cret@db/site",
        "AIOWORKER_MYSQL_URL",
        "aioworker_mysql_url",
        'AIOWORKER_MYSQL_URL="mysql://me:s3cret@db/site',
        "AIOWORKER_MYSQL_URL='mysql://me:s3cret@db/site",
        "AIOWORKER_MYSQL_URL='mysql://me:s3cret@db/site' and more",
        "OTHERS: line",
    ],
)
@pytest.mark.parametrize("end", ["", "\n", "\n\n# the end\n"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_line_of_the_env_file_that_cannot_be_read_is_named(
    newline: str, end: str, line: str, empty_folder: Path
) -> None:
    """It was dropped, and the command went to the database of the defaults."""
    file = empty_folder / ".env"
    file.write_text(f"A=1\n\n  \n{line}{end}", newline=newline)

    with pytest.raises(UsageError) as refusal:
        Settings.load()

    assert str(refusal.value) == f"expected NAME=value, quotes closed, in line 4 of {file}"


def test_the_env_file_means_what_is_written(empty_folder: Path) -> None:
    """As systemd and Docker read it: `${n}` in a password was replaced by nothing."""
    (empty_folder / ".env").write_text(
        "\ufeffAIOWORKER_MYSQL_URL = 'mysql://me:a${n}b$c@db/site'  # ours\n"
        "export AIOWORKER_CHUNK_SIZE=10\n"
        "OTHERS\n"
    )

    settings = Settings.load()

    assert settings.mysql_url.password.get_secret_value() == "a${n}b$c"
    assert settings.chunk_size == 10


def test_a_secret_may_begin_with_the_mark_of_utf_8(
    empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some editors write one, which nobody sees."""
    (empty_folder / "aioworker_amqp_url").write_text("amqp://me:s3cret@mq/\r\n", "utf-8-sig")
    monkeypatch.setenv("AIOWORKER_SECRETS_DIR", str(empty_folder))

    assert [node.shown for node in Settings.load().amqp_url] == ["amqp://me@mq/"]


def test_an_env_file_may_be_the_null_device(empty_folder: Path) -> None:
    """So a container's own is hidden."""
    (empty_folder / ".env").symlink_to("/dev/null")

    assert Settings.load().chunk_size == 1000


def test_no_error_of_a_value_given_in_code_shows_it() -> None:
    with pytest.raises(ValidationError) as refusal:
        Settings(amqp_url="amqp://u:s3cret/x@h/")  # type: ignore[arg-type, call-arg]

    assert "s3cret" not in str(refusal.value)


@pytest.mark.parametrize("where", ["environment", "file", "secrets"])
def test_a_misspelt_name_is_refused_with_the_nearest_one(
    where: str, empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    match where:
        case "environment":
            monkeypatch.setenv("AIOWORKER_RATE_LMIT", "2/m")
        case "file":
            (empty_folder / ".env").write_text("AIOWORKER_RATE_LMIT=2/m\n")
        case _:
            (empty_folder / "AIOWORKER_RATE_LMIT").write_text("2/m")
            monkeypatch.setenv("AIOWORKER_SECRETS_DIR", str(empty_folder))

    with pytest.raises(UsageError) as refusal:
        Settings.load()

    assert str(refusal.value) == (
        "unknown setting AIOWORKER_RATE_LMIT, did you mean AIOWORKER_RATE_LIMIT?"
    )


def test_what_kubernetes_sets_for_a_service_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PORT", "PORT_80_TCP_ADDR", "SERVICE_HOST", "SERVICE_PORT"):
        monkeypatch.setenv(f"AIOWORKER_{name}", "tcp://10.0.0.1:80")

    assert Settings.load().chunk_size == 1000


@pytest.mark.parametrize("prefix", ["a.b", "shöp", "a b", "x" * 51, "^", "amq"])
def test_a_prefix_that_could_name_the_queues_of_others_is_refused(
    prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`a.b` and task `c` would be prefix `a` and task `b.c`; RabbitMQ keeps `amq.` for itself."""
    monkeypatch.setenv("AIOWORKER_QUEUE_PREFIX", prefix)

    with pytest.raises(UsageError, match=r"^AIOWORKER_QUEUE_PREFIX: expected "):
        Settings.load()
    with pytest.raises(UsageError, match=r"^expected "):
        Producer("amqp://127.0.0.1/", timeout=1, queue_prefix=prefix)


@pytest.mark.parametrize("prefix", ["shop", "Shop-2_b", "amq-", "x" * 50])
def test_a_prefix_begins_every_queue_of_a_task(
    prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIOWORKER_QUEUE_PREFIX", prefix)

    names = Queues.of("a.task", Settings.load().queue_prefix).arguments("quorum")

    assert sorted(names) == [f"{prefix}.a.task{end}" for end in ("", ".dead", ".retry", ".urgent")]


UNREADABLE: dict[str, Callable[[Path], object]] = {
    "UTF-16": lambda path: path.write_text("AIOWORKER_RATE_LIMIT=2/m\n", "utf-16"),
    "UTF-16, unmarked": lambda path: path.write_text("AIOWORKER_RATE_LIMIT=2/m\n", "utf-16-le"),
    "Latin-1": lambda path: path.write_text("AIOWORKER_APP=caf\xe9\n", "latin-1"),
    "folder": lambda path: path.mkdir(),
    "named pipe": lambda path: os.mkfifo(path),
    "link to itself": lambda path: path.symlink_to(path),
}


@pytest.mark.parametrize("kind", UNREADABLE)
@pytest.mark.parametrize("name", [".env", "AIOWORKER_MYSQL_URL"])
def test_a_file_of_settings_that_is_no_text_is_named(
    name: str, kind: str, empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder is what Docker makes of a file that is not there; `.env` was then ignored."""
    if name != ".env":
        monkeypatch.setenv("AIOWORKER_SECRETS_DIR", str(empty_folder))
    UNREADABLE[kind](empty_folder / name)

    with pytest.raises(UsageError) as refusal:
        Settings.load()

    assert str(empty_folder / name) in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


def test_no_dump_of_the_settings_holds_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIOWORKER_MYSQL_URL", "mysql://me:s3cret@db/site?ssl_ca=/ca.pem")
    monkeypatch.setenv("AIOWORKER_MYSQL_READ_URL", "mysql://me:s3cret@db2/site")
    monkeypatch.setenv("AIOWORKER_AMQP_URL", "amqp://me:s3cret@one/,amqps://me:s3cret@two/")
    settings = Settings.load()
    dumps = [
        str(settings),
        repr(settings),
        settings.model_dump(),
        settings.model_dump(mode="json"),
        settings.model_dump_json(),
        [node._asdict() for node in settings.amqp_url],
        settings.mysql_url._asdict(),
        f"{settings.amqp_url} {settings.mysql_url} {settings.mysql_read_url}",
        dict(settings),
    ]

    assert "s3cret" not in str(dumps)
