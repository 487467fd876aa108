"""Tasks of a user's own modules, by the installed commands."""

from __future__ import annotations

import json
import sqlite3
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from aioworker import Producer
from tests.conftest import ONE_A_START, Run, Worker, eventually, execute, importable, rows, summary

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

    from support.servers import Servers

Start = Callable[..., Worker]

SHOP = """
    import time
    from aioworker import Context, task

    def shops(after):
        yield [n for n in range(1, 8) if n > after]

    @task(name="shop.rate", keys=shops, constants=(10,))
    async def rate(ctx: Context, ids: list[int], factor: int) -> None:
        async with ctx.transaction() as cursor:
            for n in ids:
                await cursor.execute("REPLACE INTO ratings VALUES (%s, %s)", (n, n * factor))

    @rate.needed
    def unrated(ctx: Context, ids: list[int]) -> list[int]:
        with ctx.transaction() as cursor:
            cursor.execute("SELECT shop FROM ratings")
            rated = {row[0] for row in cursor.fetchall()}
        return [n for n in ids if n not in rated]

    @task(name="shop.slow", rate_limit="1/h")
    def slow(seconds: float) -> None:
        time.sleep(seconds)

    @task(name="shop.note")
    def note(ctx: Context, text: str) -> None:
        with ctx.transaction() as cursor:
            cursor.execute("INSERT INTO notes VALUES (%s, SYSDATE(6))", (text,))
"""


@pytest.fixture
def app(tmp_path: Path, run: Run, shop: Connection[Cursor]) -> str:
    """A module in the commands' folder, its tables, and its queues, declared and empty."""
    (tmp_path / "shop_tasks.py").write_text(textwrap.dedent(SHOP))
    execute(
        shop,
        "CREATE TABLE ratings (shop INT PRIMARY KEY, rating INT NOT NULL)",
        "CREATE TABLE notes (text VARCHAR(100) NOT NULL, at DATETIME(6) NOT NULL)",
    )
    done = run("init", "--app", "shop_tasks")
    assert done.returncode == 0, done.stderr
    assert "queue aioworker.shop.rate.urgent:" in done.stdout
    return "shop_tasks"


def test_a_sweep_of_a_users_task(run: Run, app: str, shop: Connection[Cursor]) -> None:
    """Its keys in chunks, its constants behind each; what is rated already costs nothing."""
    execute(shop, "INSERT INTO ratings VALUES (2, 0)")

    swept = run("publish-all", "shop.rate", "--app", app, "--chunk-size", "3", "--after", "1")
    burst = ("--app", app, "--burst", "--rate-limit", "100/s")
    served = run("consume", "shop.rate", *burst, **ONE_A_START)

    assert swept.stdout == "published 2 chunks, 6 ids, last confirmed id 7\n"
    assert (served.returncode, served.stdout) == (0, summary(2)), served.stderr
    assert rows(shop, "SELECT * FROM ratings ORDER BY shop") == [
        (2, 0),
        *((n, n * 10) for n in range(3, 8)),
    ]


WRONG_KEYS = """
    from aioworker import task

    def texts():
        return [[1, 2], ["3", 4]]

    @task(keys=texts)
    def refresh(ids: list[int]) -> None: ...

    @refresh.needed
    def needed(ids: list[int]) -> list[int]:
        return ids
"""


@pytest.mark.parametrize("option", ["--append", "--dry-run", "--only-needed"])
def test_a_sweep_of_what_its_task_cannot_take_publishes_nothing(
    run: Run, app: str, tmp_path: Path, option: str
) -> None:
    """Its ids as text, perhaps: each chunk would be one more dead letter."""
    (tmp_path / "wrong.py").write_text(textwrap.dedent(WRONG_KEYS))
    assert run("init", "--app", "wrong").returncode == 0

    swept = run("publish-all", "refresh", "--app", "wrong", option)
    left = run("consume", "refresh", "--app", "wrong", "--burst")

    assert (swept.returncode, swept.stdout, swept.stderr) == (
        2,
        "",
        "aioworker: task 'refresh': its keys: expected ids from 1 to 9223372036854775807,"
        " got: '3'\n",
    )
    assert left.stdout == summary(0)


LITE = """
    import sqlite3
    from aioworker import task

    def found():
        connection = sqlite3.connect("shops.sqlite")  # refuses every other thread
        return pages(connection)

    def pages(connection):
        try:
            for last in range(0, 200, 4):
                found = connection.execute("SELECT id FROM shops WHERE id > ? LIMIT 4", (last,))
                yield [row[0] for row in found]
        finally:
            connection.close()
            print("closed")

    @task(name="shop.lite", keys=found)
    def rate(ids: list[int]) -> None: ...
"""


def test_keys_are_read_in_one_thread(run: Run, tmp_path: Path, shop: Connection[Cursor]) -> None:
    """A connection of sqlite3, or of Django, is of use only where it was made."""
    (tmp_path / "lite_tasks.py").write_text(textwrap.dedent(LITE))
    connection = sqlite3.connect(tmp_path / "shops.sqlite")
    connection.execute("CREATE TABLE shops (id INTEGER PRIMARY KEY)")
    connection.executemany("INSERT INTO shops VALUES (?)", [(n,) for n in range(1, 201)])
    connection.commit()
    connection.close()
    assert run("init", "--app", "lite_tasks").returncode == 0

    swept = run("publish-all", "shop.lite", "--app", "lite_tasks", "--chunk-size", "4")

    assert swept.stderr == ""
    assert swept.stdout == "closed\npublished 50 chunks, 200 ids, last confirmed id 200\n"


def test_a_single_change_of_a_users_task(run: Run, app: str, shop: Connection[Cursor]) -> None:
    assert run("publish", "5", "--task", "shop.rate", AIOWORKER_APP=app).returncode == 0
    assert run("publish", "shop.rate", "-", "7", text="6", AIOWORKER_APP=app).returncode == 0
    assert run("consume", "shop.rate", "--burst", AIOWORKER_APP=app).returncode == 0
    assert rows(shop, "SELECT * FROM ratings ORDER BY shop") == [(5, 50), (6, 60), (7, 70)]


def test_a_burst_that_one_of_several_tasks_ends_names_it(
    run: Run, app: str, shop: Connection[Cursor]
) -> None:
    assert run("pause", "shop.note").returncode == 0

    done = run("consume", "--burst", AIOWORKER_APP=app)

    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("aioworker: paused by ")
    assert last.endswith("; that was shop.note")


async def test_a_slow_and_limited_task_holds_up_no_other(
    start: Start, pair: Servers, tmp_path: Path, app: str, shop: Connection[Cursor]
) -> None:
    """One worker, three tasks: while one blocks its thread for 25 s the others go on."""
    async with Producer(pair.amqp_url, timeout=10) as producer:
        for _ in range(3):
            await producer.publish("shop.slow", 25)
        worker = start("consume", "--app", app, PYTHONPATH=importable(tmp_path))
        state = "SELECT 1 FROM aioworker_worker WHERE task = 'shop.slow' AND state = 'running'"
        eventually(lambda: rows(shop, state), "the slow one runs")
        for number in range(100):
            await producer.publish("shop.note", f"note {number}")

    eventually(lambda: rows(shop, "SELECT COUNT(*) FROM notes") == [(100,)], "all are noted")

    assert rows(shop, state) == [(1,)]
    starts = "SELECT starts FROM aioworker_budget WHERE task = 'shop.slow'"
    assert rows(shop, starts) == [(1,)]
    tasks = rows(shop, "SELECT task FROM aioworker_worker ORDER BY task")
    assert tasks == [("shop.note",), ("shop.rate",), ("shop.slow",)]
    assert "Traceback" not in worker.log


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, "module 'broken' does not import: ModuleNotFoundError: No module named 'broken'"),
        (
            "import nothing_like_it",
            "module 'broken' does not import: ModuleNotFoundError: No module named"
            " 'nothing_like_it' (broken.py, line 1)",
        ),
        ("def f(:\n", "module 'broken' does not import: SyntaxError: invalid syntax"),
        (
            "class OddError(Exception):\n    def __str__(self):\n        return self.shop\n\n"
            "raise OddError\n",
            "module 'broken' does not import: OddError, which cannot be told: its own code raises"
            " AttributeError (broken.py, line 5)",
        ),
        (
            "from aioworker import task\n\n@task(rate_limit='2/min')\ndef f(): ...\n",
            "module 'broken': task 'f': expected rate limit as COUNT/UNIT, such as '2/m', or none,"
            " got: '2/min'; write '2/m'",
        ),
        (
            "from aioworker import task\n\n@task(keys=lambda: [])\ndef f(): ...\n",
            "module 'broken': task 'f': expected a parameter for the chunk, since it has keys,"
            " got: ()",
        ),
        (
            "from aioworker import task\n\n@task\ndef f(n: int, urgent: bool) -> None: ...\n",
            "module 'broken': task 'f': a parameter cannot be named 'urgent': publishing takes that"
            " for the lane",
        ),
        (
            "from aioworker import task\n\n@task\ndef f(ids: list[int]) -> None: ...\n\n"
            "@f.needed\ndef g(ids, more): ...\n",
            "module 'broken': task 'f': expected needed to take a chunk, got (ids, more): missing a"
            " required argument: 'more'",
        ),
        (
            "from aioworker import task\n\n@task(keys=lambda: [])\ndef f(ids, mode): ...\n",
            "module 'broken': task 'f': a sweep calls it with a chunk and 0 constants, got (ids,"
            " mode): missing a required argument: 'mode'; a context is annotated `Context`",
        ),
        (
            "from aioworker import Context, task\n\n@task\ndef f(n: int, ctx: Context): ...\n",
            "module 'broken': task 'f': expected `Context` itself as an annotation, of the first"
            " positional parameter alone, got: ctx: aioworker.tasks.context.Context",
        ),
        (
            "from aioworker import task\n\n@task(timeout='30')\ndef f(): ...\n",
            "module 'broken': task 'f': expected timeout from 1 to 1500 seconds, got: '30'",
        ),
        (
            "from aioworker import task\n\n@task(rate_limit=2)\ndef f(): ...\n",
            "module 'broken': task 'f': expected rate_limit such as '2/m', or none, got: 2",
        ),
        (
            "from aioworker import task\n\n@task('2/m')\ndef f(): ...\n",
            "module 'broken': expected @task, or @task(name=…, …), got: @task('2/m')",
        ),
        (
            "from aioworker import task\n\n@task(name='update_current_version')\ndef f(): ...\n",
            "module 'broken': task 'update_current_version' is registered twice: by"
            " aioworker.addons.update_current_version and by broken.f; give one of them another"
            " name=",
        ),
    ],
    ids=[
        "absent",
        "import",
        "syntax",
        "odd",
        "rate",
        "no chunk",
        "urgent",
        "needed",
        *("sweep", "context", "timeout", "rate type", "no function"),
        "twice",
    ],
)
def test_an_app_that_cannot_work_is_one_line(
    run: Run, tmp_path: Path, content: str | None, line: str
) -> None:
    if content is not None:
        (tmp_path / "broken.py").write_text(content)

    done = run("consume", "--app", "broken")

    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"aioworker: {line}")


@pytest.mark.parametrize("name", ["shop/tasks.py", "tasks.py"])
def test_a_file_is_no_name_of_a_module(run: Run, tmp_path: Path, name: str) -> None:
    """`tasks.py` was taken for the part `py` of a package, and its code executed before that."""
    (tmp_path / "tasks.py").write_text("print('executed')")

    done = run("consume", "--app", name)

    assert (done.returncode, done.stdout, done.stderr) == (
        2,
        "",
        f"aioworker: --app: expected modules such as shop.tasks, without .py, got: {name!r}\n",
    )


def test_a_task_that_takes_no_ids_is_not_published_from_the_command_line(
    run: Run, app: str
) -> None:
    done = run("publish", "5", "--task", "shop.note", "--app", app)

    assert (done.returncode, done.stdout, done.stderr) == (
        2,
        "",
        "aioworker: task 'shop.note' takes no ids: publish to it from Python\n",
    )


FAILING = """
    from aioworker import task

    @task
    def fail(shop: int) -> None:
        password = "hidden"
        raise KeyError(shop)
"""


@pytest.mark.parametrize("form", ["console", "json"])
async def test_a_task_that_fails_shows_where_in_the_log(
    run: Run, pair: Servers, tmp_path: Path, form: str
) -> None:
    """Once for what fails alike, by line and file, without the values of its variables."""
    (tmp_path / "failing.py").write_text(textwrap.dedent(FAILING))
    assert run("init", "--app", "failing").returncode == 0
    async with Producer(pair.amqp_url) as producer:
        for shop in (7, 8):
            await producer.publish("fail", shop)

    log = run("consume", "--app", "failing", "--burst", AIOWORKER_LOG_FORMAT=form).stderr

    lines = [line for line in log.splitlines() if "chunk failed" in line]
    assert len(lines) == 2
    assert log.count("Traceback") == log.count("raise KeyError(shop)") == 1
    assert 'failing.py", line 7' in log.replace("\\", "")
    assert "hidden" not in log
    if form == "json":
        assert ["traceback" in json.loads(line) for line in lines] == [True, False]
