"""What is written is true: help, README, settings, and what the help costs to print."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from aioworker.budget import schema
from aioworker.commands.history import AUDIT
from aioworker.mysql import session
from aioworker.settings import Settings
from tests.conftest import TASK, Run, execute, rows

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

ROOT = Path(__file__).parent.parent.parent
OPERATIONS = (ROOT / "docs/operations.md").read_text()
README = (ROOT / "README.md").read_text()
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = (
    "init",
    "consume",
    "publish-all",
    "publish",
    "status",
    "health",
    "rate-limit",
    "pause",
    "resume",
    "dead list",
    "dead show",
    "dead requeue",
    "dead drop",
)


def test_what_a_session_sets_is_told() -> None:
    """A DBA, and whoever writes a task, wants to know what holds in a transaction."""
    part = OPERATIONS.partition("## What a session of aioworker sets")[2].partition("\n## ")[0]
    assigned = re.findall(r"(\w+) = ", session.statement(30))

    assert len(assigned) > 20
    assert [name for name in assigned if f"`{name}`" not in part] == []


def test_the_table_of_settings_is_the_codes() -> None:
    rows = [
        f"| `{name}` | {default if default == 'unset' else f'`{default}`'} | {meaning} |"
        for name, default, meaning in Settings.table()
    ]

    assert re.findall(r"^\| `AIOWORKER_.*$", README, re.MULTILINE) == rows


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_stands_in_the_readme(command: str, run: Run) -> None:
    done = run(*command.split(), "--help")

    assert done.returncode == 0
    assert done.stdout.startswith(f"Usage: aioworker {command} ")
    [documented] = re.findall(rf"^\| `aioworker {command}[` ].*$", README, re.MULTILINE)
    for option in re.findall(r"`(--[a-z-]+)", documented):
        assert option in done.stdout


def test_the_help_of_consume_ends_with_the_settings(run: Run) -> None:
    text = run("consume", "--help").stdout

    for name, _default, _meaning in Settings.table():
        assert name in text


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_to_a_file_leads_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", document.read_text())

    assert [link for link in links if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_test_that_is_named_is_there(document: Path) -> None:
    """A promise whose test was renamed or lost is one that nobody holds."""
    named = re.findall(r"\[`(test_\w+)`\]\(([^)#:]+)\)", document.read_text())

    assert [
        test for test, link in named if f"def {test}(" not in (document.parent / link).read_text()
    ] == []


def test_each_claim_of_what_is_not_trusted_names_its_test() -> None:
    section = (ROOT / "SECURITY.md").read_text().partition("## What is not trusted")[2]
    claims = re.findall(
        r"^- (.*?)(?=^- |^$)", section.partition("\n## ")[0], re.MULTILINE | re.DOTALL
    )

    assert len(claims) >= 6
    assert [claim for claim in claims if "](tests/" not in claim] == []


@pytest.mark.parametrize("arguments", [["--help"], ["consume", "--help"], []])
def test_help_imports_no_client_of_a_server(arguments: list[str]) -> None:
    """It answers at once."""
    code = (
        "import sys; from aioworker.cli.main import main; sys.argv[0] = 'aioworker'\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([name for name in ('aio_pika', 'aiomysql', 'rich') if name in sys.modules])"
    )

    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )

    assert done.stdout.splitlines()[-1] == "[]"
    assert "Usage: aioworker" in done.stdout


def test_the_statements_for_a_dba_run_as_written(shop: Connection[Cursor]) -> None:
    statements = [
        statement
        for block in re.findall(r"```sql\n(.*?)```", OPERATIONS, re.DOTALL)
        for statement in block.split(";\n")
        if statement.strip()
    ]
    assert len(statements) == 9

    execute(shop, *statements)

    found = rows(shop, "SELECT gap_us, paused, set_why, paused_why FROM aioworker_budget")
    assert found == [(None, 0, "night window", "backup")]


def test_the_audit_can_be_repeated_by_the_statement_in_the_docs() -> None:
    assert AUDIT % {"key": f"'{TASK}'", "seconds": 86_400} in OPERATIONS


@pytest.mark.parametrize("table", schema.NAMES)
def test_every_column_of_the_tables_is_documented(table: str, shop: Connection[Cursor]) -> None:
    section = OPERATIONS.partition(f"| `{table}` |")[2].partition("\n\n")[0]
    documented = [
        name
        for line in section.splitlines()[2:]
        for name in re.findall(r"`(\w+)`", line.split("|")[1])
    ]

    assert documented == [row[0] for row in rows(shop, f"SHOW COLUMNS FROM {table}")]
