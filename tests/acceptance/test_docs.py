"""What is written is true: help, README, settings, and what the help costs to print."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from aioworker.settings import Settings
from tests.conftest import Run

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "docs/architecture.md"]
COMMANDS = ("init", "consume", "publish-all", "publish")


def test_the_table_of_settings_is_the_codes() -> None:
    rows = [
        f"| `{name}` | {default if default == 'unset' else f'`{default}`'} | {meaning} |"
        for name, default, meaning in Settings.table()
    ]

    assert re.findall(r"^\| `AIOWORKER_.*$", README, re.MULTILINE) == rows


def test_the_readmes_task_is_the_main_job() -> None:
    """Verbatim, so that it cannot grow stale."""
    [block] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)

    assert block in (ROOT / "aioworker/addons.py").read_text()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_stands_in_the_readme(command: str, run: Run) -> None:
    done = run(command, "--help")

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


@pytest.mark.parametrize("arguments", [["--help"], ["consume", "--help"], []])
def test_help_imports_no_client_of_a_server(arguments: list[str]) -> None:
    """It answers at once."""
    code = (
        "import sys; from aioworker.cli import main; sys.argv[0] = 'aioworker'\n"
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
