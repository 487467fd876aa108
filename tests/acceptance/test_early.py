"""The first moments of a command: what it imports from where, and signals that come meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import packages_distributions
from typing import TYPE_CHECKING

import pytest

from tests.conftest import AIOWORKER, COMMAND_SECONDS, ModuleWorker, Worker, eventually, importable

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from support import servers

SCRIPT, MODULE = (str(AIOWORKER),), (sys.executable, "-m", "aioworker")
COMMANDS = (
    ("init", "--print"),
    ("consume", "--burst"),
    ("publish-all", "--dry-run"),
    ("status",),
    ("dead", "list"),
    ("rate-limit", "none"),
)
# What libraries import if it is there, and what Python does.
PERHAPS = {
    "org",
    "nt",
    "yaml",
    "tomli",
    "attr",
    "uvloop",
    "cryptography",
    "nacl",
    "IPython",
    "email_validator",
}
APP = """
    from aioworker import task

    @task(name="trapped", keys=lambda: [[1]])
    def trapped(ids: list[int]) -> None: ...
"""


@pytest.fixture(scope="module")
def traps(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], Path]:
    """Folders with a module of every name that is installed; each notes that it is executed."""
    installed = {name for name in packages_distributions() if name.isidentifier()}
    names = ({*sys.stdlib_module_names, *installed} | PERHAPS) - {"aioworker", "__main__"}
    # What `python -m` itself looks for in the current folder is beyond us.
    listing = [sys.executable, "-I", "-c", "import runpy, sys; print(*sys.modules)"]
    pythons = subprocess.run(listing, capture_output=True, text=True, check=True).stdout.split()
    return {
        SCRIPT: trapped(tmp_path_factory.mktemp("traps"), names),
        MODULE: trapped(tmp_path_factory.mktemp("traps"), names - set(pythons)),
    }


def trapped(folder: Path, names: set[str]) -> Path:
    """Fill a folder with traps, a package among them, and with a task."""
    for name in names:
        file = folder / f"{name}.py"
        if name == "aio_pika":
            (folder / name).mkdir()
            file = folder / name / "__init__.py"
        file.write_text(f"open({str(folder / 'executed')!r}, 'a').write({name!r} + '\\n')\n")
    (folder / "trapped_tasks.py").write_text(textwrap.dedent(APP))
    return folder


@pytest.mark.parametrize("kind", [SCRIPT, MODULE], ids=["script", "module"])
@pytest.mark.parametrize("app", ["trapped_tasks", ""], ids=["app", "no app"])
def test_nothing_that_lies_in_the_current_folder_is_executed_in_place_of_what_is_installed(
    pair: servers.Servers,
    traps: dict[tuple[str, ...], Path],
    kind: tuple[str, ...],
    app: str,
) -> None:
    """`aioworker status` in a folder of somebody else's executed their aiomysql.py, as root."""

    def give(command: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*kind, *command],
            env=pair.environment | {"AIOWORKER_APP": app},
            cwd=traps[kind],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = dict(zip(COMMANDS, pool.map(give, COMMANDS), strict=True))

    note = traps[kind] / "executed"
    executed = note.read_text().split() if note.exists() else []
    note.unlink(missing_ok=True)
    assert executed == []
    shown = done["init", "--print"]
    assert shown.returncode == 0, shown.stderr
    assert f"{'trapped' if app else 'update_current_version'}.urgent " in shown.stdout
    assert [one.stderr for one in done.values() if "unexpected" in one.stderr] == []


def test_a_module_that_does_not_register_is_named_with_its_file(
    pair: servers.Servers, tmp_path: Path
) -> None:
    """What is installed under the same name comes first: a user's calendar.py is another one."""
    (tmp_path / "calendar.py").write_text(textwrap.dedent(APP))

    done = subprocess.run(
        [*SCRIPT, "consume", "--app", "calendar"],
        env=pair.environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS,
        check=False,
    )

    import calendar

    assert (done.returncode, done.stderr) == (
        2,
        f"aioworker: expected calendar ({calendar.__file__}) to register a task with @task\n",
    )


# Python executes it before anything of ours, and it hears of each module before that is looked for.
HOOK = """
    import os, signal, sys

    ours = []

    def hear(event, details):
        if event != "import":
            return
        if ours or details[0] == "aioworker.early":
            ours.append(details[0])
        if "typing" not in ours:
            return
        if os.environ["ONCE_AT"] in (details[0], "") and not os.path.exists("sent"):
            with open("sent" if os.environ["ONCE_AT"] else "all", "a") as file:
                print(details[0], file=file)
            os.kill(os.getpid(), signal.SIGHUP)

    sys.addaudithook(hear)
"""


@pytest.fixture
def hook(tmp_path: Path) -> dict[str, str]:
    """Have a command get a SIGHUP at imports of its start; `ONCE_AT` names one, else all."""
    folder = tmp_path / "hook"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(textwrap.dedent(HOOK))
    return {"PYTHONPATH": importable(folder), "ONCE_AT": ""}


@pytest.mark.parametrize("kind", [SCRIPT, MODULE], ids=["script", "module"])
def test_a_worker_keeps_every_sighup_of_its_start(
    pair: servers.Servers,
    shop: object,
    tmp_path: Path,
    hook: dict[str, str],
    kind: tuple[str, ...],
) -> None:
    """`systemctl reload` in the first seconds ended it; what it loads by then is new anyway."""
    done = subprocess.run(
        [*kind, "consume", "--check"],
        env=pair.environment | hook,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS,
        check=False,
    )

    found = done.returncode, done.stdout, done.stderr
    assert found == (0, "aioworker: loaded update_current_version\n", "")
    modules = (tmp_path / "all").read_text().splitlines()
    assert {"typer", "pydantic", "aioworker.tasks.task", "aioworker.addons"} <= set(modules)
    assert len(modules) > 200


def test_another_command_ends_with_its_terminal(
    pair: servers.Servers, tmp_path: Path, hook: dict[str, str]
) -> None:
    done = subprocess.run(
        [*SCRIPT, "status"],
        env=pair.environment | hook,
        cwd=tmp_path,
        capture_output=True,
        timeout=COMMAND_SECONDS,
        check=False,
    )

    assert (done.returncode, done.stderr) == (-signal.SIGHUP, b"")


@pytest.mark.parametrize("kind", [Worker, ModuleWorker])
@pytest.mark.parametrize("moment", ["typing", "typer", "aioworker.addons"])
def test_a_sighup_that_comes_early_is_a_reload(
    start: Callable[..., Worker],
    shop: object,
    lanes: object,
    hook: dict[str, str],
    kind: type[Worker],
    moment: str,
) -> None:
    worker = start("consume", kind=kind, **hook | {"ONCE_AT": moment})

    eventually(lambda: worker.log.count("worker started") == 2, "the new code begins")

    assert worker.process.poll() is None
    assert worker.log.count("reload: finishing what runs") == 1
    worker.process.send_signal(signal.SIGTERM)
    assert worker.process.wait(30) == 0


def test_ctrl_c_in_the_first_moments_prints_nothing(
    pair: servers.Servers, tmp_path: Path, hook: dict[str, str]
) -> None:
    """Python would print where it was."""
    # Whoever is started in the background, as these tests may be, ignores it.
    heeding = "\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    (tmp_path / "hook" / "sitecustomize.py").write_text(
        textwrap.dedent(HOOK).replace("SIGHUP", "SIGINT") + heeding
    )

    done = subprocess.run(
        [*SCRIPT, "consume"],
        env=pair.environment | hook,
        cwd=tmp_path,
        capture_output=True,
        timeout=COMMAND_SECONDS,
        check=False,
    )

    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")
