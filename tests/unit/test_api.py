"""What users import: typed, told by help(), and cheap to import."""

from __future__ import annotations

import ast
import builtins
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pymysql.err
import pytest

import aioworker
from aioworker import Context, Producer, Task, errors, publish_sync, task

TYPED = Path(__file__).parent.parent / "typing/api.py"
TAKES_ARGUMENTS = [
    one
    for name in aioworker.__all__
    if not (inspect.isclass(one := getattr(aioworker, name)) and issubclass(one, Exception))
]
RAISES = [task, publish_sync, Producer, Producer.publish, Task.needed, Context.transaction]


def section(one: Callable[..., Any], title: str) -> list[str]:
    """Return the names that a section of a docstring explains."""
    text = inspect.getdoc(one) or ""
    found = re.search(rf"^{title}:\n((?:    .*\n?|\n)*)", text, re.MULTILINE)
    return re.findall(r"^    (\w+): ", found.group(1), re.MULTILINE) if found else []


def test_the_module_that_mypy_reads_uses_all_that_is_public() -> None:
    """Whose types are not held by it may change unnoticed."""
    imports = [
        alias.name
        for node in ast.walk(ast.parse(TYPED.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module == "aioworker"
        for alias in node.names
    ]

    assert imports == aioworker.__all__


def test_what_is_public_is_there_and_nothing_else() -> None:
    assert [name for name in aioworker.__all__ if not hasattr(aioworker, name)] == []
    assert {*aioworker.__all__, "__version__"} <= set(dir(aioworker))
    assert re.fullmatch(r"\d+\.\d+\.\d+", aioworker.__version__)
    with pytest.raises(AttributeError, match=r"^module 'aioworker' has no attribute 'Worker'$"):
        _ = aioworker.Worker


@pytest.mark.parametrize("one", TAKES_ARGUMENTS, ids=lambda one: one.__name__)
def test_help_tells_every_argument(one: Callable[..., Any]) -> None:
    """Of what is public, and of the errors that a task raises."""
    parameters = [name for name in inspect.signature(one).parameters if not name.startswith("_")]

    assert [name for name in parameters if name not in section(one, "Args")] == []
    assert (inspect.getdoc(one) or "").partition("\n")[0].endswith((".", ":"))


@pytest.mark.parametrize("one", [aioworker.Retry, aioworker.DeadLetter])
def test_help_tells_what_an_error_of_a_task_is_made_with(one: Callable[..., Any]) -> None:
    assert section(one, "Args") == ["reason"]


@pytest.mark.parametrize("one", [aioworker.Retry, aioworker.DeadLetter])
def test_what_a_task_raises_without_a_reason_says_so(one: type[aioworker.Retry]) -> None:
    """An empty `reason=` looks like a fault of the log's."""
    with pytest.raises(one, match=r"^no reason given$"):
        raise one

    assert [str(one("")), str(one("  ")), str(one("closed"))] == [
        *2 * ["no reason given"],
        "closed",
    ]


@pytest.mark.parametrize("one", RAISES, ids=lambda one: one.__qualname__)
def test_help_tells_what_is_raised_by_names_that_exist(one: Callable[..., Any]) -> None:
    raised = section(one, "Raises")

    assert raised
    places = (errors, builtins, pymysql.err)
    assert [name for name in raised if not any(hasattr(place, name) for place in places)] == []


def test_a_module_of_tasks_costs_no_client_of_a_server() -> None:
    """A site imports its tasks in each of its processes."""
    code = (
        "import sys, aioworker; from aioworker import Context, task\n"
        "@task(rate_limit='2/m', keys=lambda: [])\n"
        "def note(ctx: Context, shops: list[int], text: str = '') -> None: ...\n"
        "note.needed(lambda shops: shops)\n"
        "clients = ('aio_pika', 'aiormq', 'aiomysql', 'pymysql', 'pydantic', 'typer', 'email')\n"
        "print([name for name in clients if name in sys.modules])"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


@pytest.mark.parametrize("command", ["health", "controls"])
def test_a_command_that_asks_the_database_alone_costs_no_client_of_rabbitmq(command: str) -> None:
    """A monitor starts `health` again and again, on each machine."""
    code = f"import sys, aioworker.commands.{command}; print('aio_pika' in sys.modules)"

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
    )

    assert done.stdout == "False\n"
