"""Which task is meant by every command, in projects with one task, with two and with none."""

from __future__ import annotations

import json
import os
import subprocess
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

import aio_pika
import pytest

from aioworker.budget import schema
from support import servers
from tests.conftest import AIOWORKER, COMMAND_SECONDS, TASK, execute

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

COMMANDS = {
    "init": ("--print",),
    "consume": ("--burst",),
    "publish": ("1",),
    "publish-all": ("--dry-run",),
    "status": (),
    "health": (),
    "dead list": (),
    "pause": (),
    "resume": (),
    "rate-limit": ("5/m",),
    "dead show": ("message",),
    "dead requeue": (),
    "dead drop": ("--yes",),
}
RUN = ("init", "consume")
PUBLISH = ("publish", "publish-all")
SHOW = ("status", "health", "dead list")
ONE = ("pause", "resume", "rate-limit", "dead show", "dead requeue", "dead drop")
CHANGE = ("dead requeue", "dead drop")  # what lies in queues, so they guess no task
TABLE = ("health", "pause", "resume", "rate-limit")  # need it, whatever is named
CODE = """
    from aioworker import task

    @task(name="shop.left", keys=lambda: [[1]])
    def left(ids: list[int]) -> None: ...
"""
BOTH = (
    CODE
    + """
    @task(name="shop.right", keys=lambda: [[1, 2]])
    def right(ids: list[int]) -> None: ...
"""
)
WORDS = {
    **{task: task for task in (TASK, "shop.left", "shop.right")},
    ".addons'": TASK,
    "would publish 1 chunk, 1 id\n": "shop.left",
    "would publish 1 chunk, 2 ids\n": "shop.right",
}
Do = Callable[..., "subprocess.CompletedProcess[str]"]
AWAY = {"AIOWORKER_MYSQL_URL": "mysql://root@127.0.0.1:1/d", "AIOWORKER_CONNECT_TIMEOUT": "1"}
ASKED = "expected one task to be named, there are: shop.left, shop.right"
NO_APP = f"without --app or AIOWORKER_APP only {TASK} is known"


@dataclass(frozen=True)
class Case:
    """Where a command is given, and what it then means, or says.

    Args:
        project: Which database and queues: of one task, of two, of none; `bare` has no table.
        expected: For each command the tasks that it means, or what its error says.
        name: The task that is named, if one is.
        app: What `--app` names; the folder is then the project's.
        variables: What else is set.
    """

    project: str
    expected: Mapping[str, str | set[str]]
    name: tuple[str, ...] = ()
    app: str | None = None
    variables: dict[str, str] = field(default_factory=dict)


def each(commands: tuple[str, ...], what: str | set[str]) -> dict[str, str | set[str]]:
    return dict.fromkeys(commands, what)


LEFT, RIGHT, MAIN = {"shop.left"}, {"shop.right"}, {TASK}
CASES = {
    "one task, with the app": Case("one", each(tuple(COMMANDS), LEFT), app="shop_one"),
    "one task, from another folder": Case(
        "one", each(RUN + PUBLISH, MAIN) | each(SHOW + ONE, LEFT)
    ),
    "one task, a module that is not there": Case(
        "one",
        each(RUN + PUBLISH, "module 'nowhere' does not import") | each(SHOW + ONE, LEFT),
        variables={"AIOWORKER_APP": "nowhere"},
    ),
    "two tasks, with the app": Case(
        "two",
        each(RUN + SHOW, LEFT | RIGHT) | each(PUBLISH + ONE, ASKED),
        app="shop_two",
    ),
    "two tasks, from another folder": Case(
        "two", each(RUN + PUBLISH, MAIN) | each(SHOW, LEFT | RIGHT) | each(ONE, ASKED)
    ),
    "two tasks, one named": Case(
        "two", each(tuple(COMMANDS), RIGHT), name=("shop.right",), app="shop_two"
    ),
    "two tasks, one named from another folder": Case(
        "two",
        each(RUN + PUBLISH, NO_APP) | each(SHOW + ONE, RIGHT),
        name=("shop.right",),
    ),
    "two tasks, another named": Case(
        "two",
        each(RUN + PUBLISH, NO_APP)
        | each(
            SHOW + ONE,
            "unknown task 'shop.rigth', did you mean shop.right? There are: shop.left, shop.right",
        ),
        name=("shop.rigth",),
    ),
    "two tasks, another named with the app": Case(
        "two",
        each(
            RUN + PUBLISH,
            "unknown task 'update_current_versio', did you mean shop.left?"
            " There are: shop.left, shop.right",
        ),
        name=("update_current_versio",),
        app="shop_two",
    ),
    "no task": Case(
        "none",
        each(RUN + PUBLISH, MAIN)
        | each(SHOW + ONE, "no task has a budget at mysql://")
        | each(SHOW + ONE, ": run `aioworker init`"),
    ),
    "no table": Case(
        "bare",
        each(tuple(COMMANDS), MAIN)
        | each(TABLE, ": run `aioworker init`, or set")
        | each(CHANGE, "name the task, since the database cannot tell"),
    ),
    "no table, with an app": Case(
        "bare",
        each(RUN + PUBLISH, LEFT)
        | each(("status", "dead list"), "name the task, since the database cannot tell")
        | each(ONE, "name the task, since the database cannot tell")
        | each(TABLE, ": run `aioworker init --app shop_one`, or set"),
        app="shop_one",
    ),
    "a database that is away": Case(
        "one",
        each(("status", "dead list", "dead show"), MAIN)
        | each(CHANGE, "name the task, since the database cannot tell")
        | each(TABLE, "cannot use MySQL at mysql://"),
        variables=AWAY,
    ),
    "a database that is away, and a name": Case(
        "one",
        each(("status", "dead list", "dead show", "dead requeue", "dead drop"), LEFT)
        | each(TABLE, "cannot use MySQL at mysql://"),
        name=("shop.left",),
        variables=AWAY,
    ),
    "budgets of each worker": Case(
        "two",
        each((*RUN, "status", "dead list"), LEFT | RIGHT)
        | each((*PUBLISH, *ONE), ASKED)
        | each(TABLE, "AIOWORKER_BUDGET=worker: "),
        app="shop_two",
        variables={"AIOWORKER_BUDGET": "worker"},
    ),
}


@pytest.fixture(scope="module")
def do(pair: servers.Servers, tmp_path_factory: pytest.TempPathFactory) -> Do:
    """Make the projects, each with a database and queues of its own; run commands in them."""
    root = tmp_path_factory.mktemp("projects")

    def run_command(
        project: str, *arguments: str, app: str | None, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        folder = root / ("code" if app else "elsewhere")
        option = ["--app", app] if app else []
        own = {
            "AIOWORKER_QUEUE_PREFIX": f"meant-{project}",
            "AIOWORKER_MYSQL_URL": url(pair, project),
        }
        return subprocess.run(
            [AIOWORKER, *arguments, *option],
            env=pair.environment | own | variables,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )

    write_code(root)
    for project in ("one", "two", "none", "bare"):
        connection = servers.connect(url(pair, project), create=True)
        if project == "none":
            execute(connection, *schema.STATEMENTS.values())
        connection.close()
    for project in ("one", "two"):
        done = run_command(project, "init", app=f"shop_{project}")
        assert done.returncode == 0, done.stderr
    return run_command


def url(pair: servers.Servers, project: str) -> str:
    parts = urlsplit(pair.mysql_url)
    return urlunsplit(parts._replace(path=f"/meant_{project}"))


def write_code(root: Path) -> None:
    (root / "elsewhere").mkdir()
    (root / "code").mkdir()
    (root / "code" / "shop_one.py").write_text(textwrap.dedent(CODE))
    (root / "code" / "shop_two.py").write_text(textwrap.dedent(BOTH))


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_every_command_means_the_right_task_or_says_what_to_name(do: Do, case: Case) -> None:
    """`pause` in a project of one task paused another one, which nobody ran."""

    def give(command: str) -> subprocess.CompletedProcess[str]:
        words = (*command.split(), *case.name, *COMMANDS[command])
        return do(case.project, *words, app=case.app, **case.variables)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        given = dict(zip(case.expected, pool.map(give, case.expected), strict=True))

    for command, expected in case.expected.items():
        done = given[command]
        if isinstance(expected, str):
            assert done.returncode > 0, command
            assert expected in done.stderr, command
        else:
            assert (done.returncode == 2, tasks_in(done)) == (False, expected), command


def tasks_in(done: subprocess.CompletedProcess[str]) -> set[str]:
    """Return the tasks that an output names, some by what is theirs alone."""
    text = done.stdout + done.stderr
    return {task for word, task in WORDS.items() if word in text}


@pytest.fixture
def two(do: Do, pair: servers.Servers) -> Iterator[Connection[Cursor]]:
    """The database of two tasks, nothing set, no worker there."""
    connection = servers.connect(url(pair, "two"))
    execute(connection, "UPDATE aioworker_budget SET paused = FALSE, gap_us = NULL")
    yield connection
    execute(connection, "DELETE FROM aioworker_worker")
    connection.close()


def test_a_monitor_gets_a_line_for_each_task(do: Do, two: Connection[Cursor]) -> None:
    """A rate that no worker tells is unknown: the task's module is not imported."""
    done = do("two", "status", "--json", app=None)

    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["task"] for one in found] == ["shop.left", "shop.right"]
    assert [one["queued"]["retry"] for one in found] == [0, 0]
    assert [one["budget"]["rate"] for one in found] == ["unknown", "unknown"]


async def test_the_dead_letters_of_several_tasks_are_told_apart(
    do: Do, pair: servers.Servers
) -> None:
    async with await aio_pika.connect(pair.amqp_url, timeout=10) as connection:
        channel = await connection.channel()
        for task in ("shop.left", "shop.right"):
            letter = aio_pika.Message(b"[]", headers={"task": task, "id": f"of-{task}"})
            await channel.default_exchange.publish(letter, f"meant-two.{task}.dead")

    listed = do("two", "dead", "list", app=None)
    as_json = do("two", "dead", "list", "--json", app=None)
    for task in ("shop.left", "shop.right"):
        assert do("two", "dead", "drop", task, "--yes", app=None).returncode == 0

    assert [line.split()[:2] for line in listed.stdout.splitlines()] == [
        ["shop.left:", "of-shop.left"],
        ["shop.right:", "of-shop.right"],
    ]
    found = [json.loads(line) for line in as_json.stdout.splitlines()]
    assert [(one["task"], one["id"]) for one in found] == [
        ("shop.left", "of-shop.left"),
        ("shop.right", "of-shop.right"),
    ]


def test_health_names_the_sick_ones_alone(do: Do, two: Connection[Cursor]) -> None:
    """Its worker's rate is the task's as long as nobody sets another."""
    columns = "(id, host, pid, task, version, rate, session, state, reason, since, seen)"
    well = f"('a', '{os.uname().nodename}', 7, 'shop.left', '1', '3/m', 1, 'waiting', 'nothing'"
    execute(two, f"INSERT INTO aioworker_worker {columns} VALUES {well}, SYSDATE(6), SYSDATE(6))")

    sick = do("two", "health", app=None)
    left = do("two", "health", "shop.left", app=None)
    rate = do("two", "status", "shop.left", app=None)

    assert sick.returncode == 1
    assert "no worker of shop.right is alive" in sick.stderr
    assert "shop.left" not in sick.stderr
    assert (left.returncode, left.stdout.split(":", 1)[1]) == (0, "7 waiting: nothing\n")
    assert "rate       3/m of all workers, the workers' own\n" in rate.stdout


PREFIX = "meant-untold"
UNTOLD = "the database cannot tell which"
NO_TABLE = "AIOWORKER_BUDGET=worker keeps no table of the tasks, and there is no app"


async def test_no_dead_letter_is_touched_on_a_guess(do: Do, pair: servers.Servers) -> None:
    """With a wrong password `dead drop --yes` dropped the main job's, in a project of others."""
    dead = f"{PREFIX}.{TASK}.dead"
    wrong = urlsplit(url(pair, "two"))
    wrong = wrong._replace(netloc=f"nobody:wrong@{wrong.hostname}:{wrong.port}")
    own = {"AIOWORKER_QUEUE_PREFIX": PREFIX}
    made = do("two", "init", app=None, AIOWORKER_BUDGET="worker", **own)
    assert made.returncode == 0, made.stderr
    async with await aio_pika.connect(pair.amqp_url, timeout=10) as connection:
        channel = await connection.channel()
        letter = aio_pika.Message(b"[]", headers={"task": TASK, "id": "kept"})
        await channel.default_exchange.publish(letter, dead)
    own["AIOWORKER_MYSQL_URL"] = urlunsplit(wrong)

    drop = do("two", "dead", "drop", "--yes", app=None, **own)
    requeue = do("two", "dead", "requeue", app=None, **own)
    listed = do("two", "dead", "list", app=None, **own)
    own["AIOWORKER_BUDGET"] = "worker"
    own_drop = do("two", "dead", "drop", "--yes", app=None, **own)
    own_requeue = do("two", "dead", "requeue", app=None, **own)
    own_listed = do("two", "dead", "list", app=None, **own)

    for done in (own_drop, own_requeue):
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"aioworker: name the task, since {NO_TABLE}\n"
    assert (own_listed.returncode, own_listed.stdout.split()[0]) == (0, "kept")
    assert own_listed.stderr.startswith(f"aioworker: {TASK} is meant, since {NO_TABLE}\n")
    for done in (drop, requeue):
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        assert done.stderr.startswith(f"aioworker: name the task, since {UNTOLD} are there: ")
        # MariaDB refuses the user, MySQL hands him a way to log in that wants TLS first.
        assert "cannot use MySQL at mysql://nobody@" in done.stderr
    assert (listed.returncode, listed.stdout.split()[0]) == (0, "kept")
    assert listed.stderr.startswith(f"aioworker: {TASK} is meant, since {UNTOLD} tasks there are: ")


def test_a_queue_that_is_missing_has_the_cure_of_its_task(do: Do) -> None:
    """A retired task's row made `dead list` fail for ever, and nothing told how to end it."""
    own = {"AIOWORKER_QUEUE_PREFIX": "meant-nothing"}
    away = AWAY | own
    worker = own | {"AIOWORKER_BUDGET": "worker"}

    errors = {
        "retired": do("two", "dead", "list", "shop.left", app=None, **own).stderr,
        "misspelt": do("two", "dead", "list", "shop.rigth", app=None, **away).stderr,
        "with the app": do("two", "dead", "list", "shop.rigth", app="shop_two", **away).stderr,
        "without the app": do("two", "dead", "list", app=None, **worker).stderr,
    }

    app = " and the app (--app, AIOWORKER_APP),"
    assert errors == {
        "retired": _missing(
            "shop.left",
            "run `aioworker init`; if shop.left is retired, see docs/operations.md, Retire a task",
        ),
        "misspelt": _missing(
            "shop.rigth", f"check the task's name, 'shop.rigth',{app} then run `aioworker init`"
        ),
        "with the app": _missing(
            "shop.rigth",
            "check the task's name, 'shop.rigth', then run `aioworker init --app shop_two`",
        ),
        "without the app": f"aioworker: {TASK} is meant, since {NO_TABLE}\n"
        + _missing(TASK, f"check the task's name, '{TASK}',{app} then run `aioworker init`"),
    }


def _missing(task: str, cure: str) -> str:
    return f"aioworker: queue meant-nothing.{task}.dead does not exist: {cure}\n"
