"""Which task is meant by every command, in projects with one task, with two and with none."""

from __future__ import annotations

import os
import subprocess
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

import pytest

from aioworker import tables
from support import servers
from tests.conftest import AIOWORKER, COMMAND_SECONDS, TASK, execute

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

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
    "no task": Case(
        "none",
        each(RUN + PUBLISH, MAIN)
        | each(SHOW + ONE, "no task has a budget at mysql://")
        | each(SHOW + ONE, ": run `aioworker init`"),
    ),
    "no table": Case(
        "bare",
        each(tuple(COMMANDS), MAIN) | each(TABLE, ": run `aioworker init`, or set"),
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
        each(("status", "dead list", "dead show", "dead requeue", "dead drop"), MAIN)
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
def do(
    pair: servers.Servers, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., subprocess.CompletedProcess[str]]:
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
            execute(connection, tables.BUDGET, tables.WORKER)
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
def test_every_command_means_the_right_task_or_says_what_to_name(
    do: Callable[..., subprocess.CompletedProcess[str]], case: Case
) -> None:
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
