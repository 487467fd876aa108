"""The examples: each is run as its first lines say, against real servers."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import aio_pika
import pytest

from aioworker.rabbitmq.queues import Queues
from support import servers
from tests.conftest import (
    AIOWORKER,
    COMMAND_SECONDS,
    ONE_A_START,
    PREFIX,
    eventually,
    execute,
    rows,
    summary,
)

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

ROOT = Path(__file__).parent.parent.parent
FILES = sorted(Path(path.name) for path in (ROOT / "examples").glob("*.py"))
EXAMPLES = [path for path in FILES if not path.name.startswith("test_")]
SITE = Path("django_site/worker.py")
TESTS = Path("django_site/reviews/tests.py")
AWAY = "amqp://127.0.0.1:1/"
TASKS = ("update_rating", "count_reviews", "update_daily_users", "update_review_count")
FAST = "--burst --rate-limit 100/s"
COUNTS = "SELECT review_count FROM reviews_shop"
Example = Callable[[Path], str]
Shell = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
async def site(pair: servers.Servers) -> AsyncIterator[Connection[Cursor]]:
    """A connection to an empty database, and none of the queues: the examples make theirs."""
    broker = await aio_pika.connect(pair.amqp_url, timeout=10)
    async with broker, broker.channel() as channel:
        for task in TASKS:
            queues = Queues.of(task, PREFIX)
            for queue in queues.arguments("quorum"):
                await channel.queue_delete(queue)
    connection = servers.connect(pair.mysql_url, create=True)
    yield connection
    connection.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the examples, in which nothing of the checkout is within reach."""
    return shutil.copytree(
        ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__")
    )


@pytest.fixture
def shell(pair: servers.Servers, folder: Path) -> Shell:
    """Run lines of a shell in the examples' folder, or one of its own, and wait for their end."""

    def run(
        *lines: str, inside: Path | str = ".", **variables: str
    ) -> subprocess.CompletedProcess[str]:
        path = f"{AIOWORKER.parent}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(
            ["sh", "-ec", "\n".join(lines)],
            env=pair.environment | {"PATH": path} | variables,
            cwd=folder / inside,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )

    return run


@pytest.fixture
def example(site: Connection[Cursor], folder: Path, shell: Shell) -> Example:
    """Run an example as its first lines say, and return what that printed."""

    def run(name: Path) -> str:
        commands = []
        for line in commands_of(folder / name):
            if line.startswith("mariadb "):  # not every machine has its client
                execute(site, *statements_of((folder / name).parent / line.partition("<")[2]))
            else:
                commands.append(line)
        done = shell(*commands, inside=name.parent)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def commands_of(path: Path) -> list[str]:
    """Return the commands in a module's first lines: those that are indented."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return re.findall(r"^    (\S.*)$", text, re.MULTILINE)


def statements_of(path: Path) -> list[str]:
    """Return a file's statements."""
    return [statement for statement in path.read_text().split(";\n") if statement.strip()]


@pytest.mark.parametrize("name", [*EXAMPLES, SITE], ids=str)
def test_an_example_says_how_it_is_run_and_is_read_at_once(name: Path) -> None:
    path = ROOT / "examples" / name

    commands = commands_of(path)

    assert [one for one in commands if one.startswith("aioworker init")]
    assert commands[-1].startswith("aioworker consume ")
    assert len(path.read_text().splitlines()) <= 60


@pytest.fixture
def administrator(maria: servers.Maria, site: Connection[Cursor]) -> Iterator[Connection[Cursor]]:
    """A connection as root to a server that has no database of ours."""
    execute(site, "DROP DATABASE aioworker")
    yield site
    execute(site, "DROP DATABASE IF EXISTS aioworker", "DROP USER IF EXISTS shops@'127.0.0.1'")


def test_the_first_task_of_the_readme_runs_as_written(
    shell: Shell, maria: servers.Maria, administrator: Connection[Cursor], tmp_path: Path
) -> None:
    """Its database, its module, each command, and what each prints: nothing has to be added."""
    readme = (ROOT / "README.md").read_text()
    [module, *_] = blocks_of(readme, "python")
    [tables, *_] = blocks_of(readme, "sql")
    [session] = blocks_of(readme, "console")
    (tmp_path / "shops.py").write_text(module)
    (tmp_path / "shops.sql").write_text(tables)
    # But for its port all is as written; without the URL that is exported nothing is found.
    variables = {"AIOWORKER_MYSQL_URL": f"mysql://nobody@127.0.0.1:{maria.port}/none"}

    for command, shown in re.findall(r"^\$ (.*)\n((?:[^$].*\n)*)", session, re.MULTILINE):
        if command.endswith("< shops.sql"):  # not every machine has its client
            execute(administrator, *statements_of(tmp_path / "shops.sql"))
        elif command.startswith("sudo mariadb "):
            [query] = shlex.split(command)[-1:]
            printed = [tuple(map(int, one)) for one in re.findall(r"\| +(\d+) \| +(\d+) \|", shown)]
            assert rows(administrator, query) == printed
        elif command.startswith("export "):
            name, _equals, value = command.removeprefix("export ").partition("=")
            variables[name] = value.replace("127.0.0.1/", f"127.0.0.1:{maria.port}/")
        else:
            done = shell(command, inside=tmp_path, **variables)
            assert (done.returncode, done.stdout) == (0, shown), done.stderr
    assert rows(administrator, "SELECT reviews FROM shops ORDER BY id") == [(2,), (0,), (1,)]


def blocks_of(text: str, language: str) -> list[str]:
    """Return a document's blocks of code in a language."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_what_the_readme_shows_of_a_task_is_run_by_a_test() -> None:
    """Verbatim, of the main job or of an example, so that it cannot grow stale."""
    sources = [ROOT / "aioworker/addons.py", *(ROOT / "examples").glob("*.py")]
    _first, *blocks = blocks_of((ROOT / "README.md").read_text(), "python")

    texts = [path.read_text() for path in sources]
    assert blocks
    assert [block for block in blocks if not any(block in text for text in texts)] == []
    for block in blocks:
        compile(block, "README.md", "exec")  # whole, not cut off in its middle


def test_a_shops_rating(example: Example, shell: Shell, site: Connection[Cursor]) -> None:
    """A sweep writes what differs; done again it costs nothing; a single change goes first."""
    assert summary(1) in example(Path("shop.py"))
    ratings = "SELECT id, rating FROM shops ORDER BY id"
    assert rows(site, ratings) == [(1, Decimal("4.33")), (2, Decimal("3.50")), (3, None)]

    shell("aioworker publish-all update_rating --app shop")
    again = shell(f"aioworker consume --app shop {FAST}")

    assert again.stdout == summary(1, starts=0)

    execute(site, "INSERT INTO reviews (shop_id, stars) VALUES (2, 5)")
    assert shell("aioworker publish 2 --task update_rating --app shop").returncode == 0
    one = shell(f"aioworker consume --app shop {FAST}")

    assert " lane=urgent attempt=1 ids=1 changed=1 " in one.stderr
    assert rows(site, ratings)[1] == (2, Decimal("4.00"))


def test_more_shops_than_one_chunk_and_one_transaction_hold(
    example: Example, shell: Shell, site: Connection[Cursor]
) -> None:
    example(Path("shop.py"))
    execute(
        site,
        "INSERT INTO shops (id, name) WITH RECURSIVE numbers AS"
        " (SELECT 101 AS id UNION ALL SELECT id + 1 FROM numbers WHERE id < 1100)"
        " SELECT id, 'Market' FROM numbers",
        "INSERT INTO reviews (shop_id, stars) SELECT id, 2 FROM shops WHERE id > 100",
    )

    swept = shell("aioworker publish-all update_rating --app shop")
    done = shell(f"aioworker consume --app shop {FAST}", **ONE_A_START)

    assert swept.stdout == "published 2 chunks, 1003 ids, last confirmed id 1100\n"
    assert done.stdout == summary(2)
    assert re.findall(r" changed=\d+ ", done.stderr) == [" changed=997 ", " changed=3 "]
    assert rows(site, "SELECT COUNT(*) FROM shops WHERE id > 100 AND rating = 2") == [(1000,)]


def test_a_rating_that_another_writes_meanwhile_is_not_overwritten(
    example: Example, shell: Shell, site: Connection[Cursor], pair: servers.Servers
) -> None:
    """The other one commits between the task's read and its write: tried again in a minute."""
    example(Path("shop.py"))
    execute(site, "INSERT INTO reviews (shop_id, stars) VALUES (2, 5)")
    shell("aioworker publish 2 --task update_rating --app shop")
    watcher = servers.connect(pair.mysql_url)
    waits = "SELECT 1 FROM information_schema.processlist WHERE info LIKE 'UPDATE shops%'"

    with site.cursor() as cursor, ThreadPoolExecutor() as pool:
        cursor.execute("UPDATE shops SET rating = 1 WHERE id = 2")
        served = pool.submit(shell, f"aioworker consume --app shop {FAST}")
        eventually(lambda: rows(watcher, waits), "it waits for the row")
        site.commit()
    watcher.close()

    assert 'reason="ratings changed between read and write"' in served.result().stderr
    assert "to retry 1," in served.result().stdout
    assert rows(site, "SELECT rating FROM shops WHERE id = 2") == [(1,)]


def test_average_daily_users(example: Example, shell: Shell, site: Connection[Cursor]) -> None:
    """Rows travel whole, ids and answers; what is written already is not written again."""
    assert "published 1 chunk, 2 ids, last confirmed id 3615\n" in example(Path("daily_users.py"))
    averages = "SELECT id, average_daily_users FROM addons ORDER BY id"
    assert rows(site, averages) == [(55, 7), (3615, 18)]

    shell("aioworker publish-all update_daily_users --app daily_users")
    again = shell(f"aioworker consume --app daily_users {FAST}")

    assert " ids=2 changed=0 " in again.stderr
    assert rows(site, averages) == [(55, 7), (3615, 18)]


def test_a_task_in_five_lines(example: Example, site: Connection[Cursor]) -> None:
    example(Path("five_lines.py"))

    assert rows(site, "SELECT reviews FROM shops ORDER BY id") == [(3,), (0,), (0,)]


def test_an_examples_tests_need_no_rabbitmq_and_leave_nothing(
    shell: Shell, folder: Path, site: Connection[Cursor]
) -> None:
    [load, check] = commands_of(folder / "test_shop.py")
    assert load.endswith(" <shop.sql")
    execute(site, *statements_of(folder / "shop.sql"))
    everything = "SELECT id, rating, (SELECT COUNT(*) FROM reviews) FROM shops ORDER BY id"
    before = rows(site, everything)

    done = shell(check, AIOWORKER_AMQP_URL=AWAY)

    assert (done.returncode, " 3 passed " in done.stdout) == (0, True), done.stdout
    assert rows(site, everything) == before


@pytest.fixture
def django(shell: Shell) -> Shell:
    """Run lines of a shell in the Django site's folder, where its settings are known."""
    return partial(
        shell, inside=SITE.parent, DJANGO_SETTINGS_MODULE="settings", AIOWORKER_APP="worker"
    )


def test_a_django_site(example: Example, django: Shell, site: Connection[Cursor]) -> None:
    """A model that is saved publishes its shop; a sweep finds nothing left to do."""
    assert summary(1) in example(SITE)
    assert rows(site, COUNTS) == [(1,)]

    django("aioworker publish-all update_review_count")
    again = django("aioworker consume --burst")

    assert again.stdout == summary(1, starts=0)
    assert rows(site, COUNTS) == [(1,)]

    deleted = django("python manage.py shell -c 'Review.objects.all().delete()'")
    django("aioworker consume --burst")

    assert (deleted.returncode, deleted.stderr) == (0, "")
    assert rows(site, COUNTS) == [(0,)]


def test_a_django_sites_tests_need_no_rabbitmq(
    django: Shell, folder: Path, site: Connection[Cursor]
) -> None:
    """On the database that Django makes for them, and takes away again."""
    [command] = re.findall("`(python .*)`", (folder / TESTS).read_text().partition("\n")[0])

    done = django(command, AIOWORKER_AMQP_URL=AWAY)

    assert (done.returncode, "Ran 2 tests " in done.stderr) == (0, True), done.stderr
    assert "test_aioworker" not in [name for (name,) in rows(site, "SHOW DATABASES")]


def test_a_save_that_is_rolled_back_publishes_nothing(example: Example, django: Shell) -> None:
    example(SITE)
    program = """
from django.db import transaction
with transaction.atomic():
    Shop.objects.get().review_set.create(stars=1)
    transaction.set_rollback(True)
"""

    saved = django(f"python manage.py shell -c {shlex.quote(program)}")
    served = django("aioworker consume --burst")

    assert (saved.returncode, saved.stderr) == (0, "")
    assert served.stdout == summary(0)


def test_a_save_stands_while_rabbitmq_is_away(
    example: Example, django: Shell, site: Connection[Cursor]
) -> None:
    """The page works, the log says why its shop was not published, the next sweep mends it."""
    example(SITE)
    away = f"amqp://{servers.HOST}:{servers.free_port()}/"

    saved = django(
        "python manage.py shell -c 'Shop.objects.get().review_set.create(stars=1)'",
        AIOWORKER_AMQP_URL=away,
    )

    assert saved.returncode == 0
    assert "BrokerError: cannot connect to RabbitMQ" in saved.stderr
    assert rows(site, COUNTS) == [(1,)]

    django("aioworker publish-all update_review_count")
    django("aioworker consume --burst")

    assert rows(site, COUNTS) == [(2,)]
