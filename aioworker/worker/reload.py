"""SIGHUP: the same process goes on with new code and settings, if those load.

They are loaded in a child process first. Only then is what runs finished and the process
replaced by itself, under the same id. Signals are blocked over the exchange: one that
arrives meanwhile waits for the new code.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from contextlib import suppress
from tempfile import TemporaryFile
from typing import IO, NamedTuple, NoReturn

from aioworker.logs import fields
from aioworker.worker import signals
from aioworker.worker.systemd import Notifier

log = logging.getLogger(__name__)

OURS = "aioworker: "  # how the command line begins to say what is wrong
LOADED = f"{OURS}loaded "  # how a check says that all is loaded: modules may end it with status 0
COMMAND, CHECK = "consume", "--check"
CHECK_SECONDS = 120.0
FRESH_SECONDS = 1.0  # a check that is no older holds for the exchange


class Origin(NamedTuple):
    """What the process was started with: its new code begins with the same.

    Attributes:
        environment: The environment.
        folder: The current folder by the name that it was entered by, which may be a link.
    """

    environment: dict[str, str]
    folder: str

    @classmethod
    def of_this_process(cls) -> Origin:
        """Return it, as long as no module of the app has changed it."""
        environment = dict(os.environ)
        folder = environment.get("PWD", "")
        # os.getcwd() is where a link leads to now: the old release once it leads to the next.
        entered = os.path.isabs(folder) and os.path.isdir(folder) and os.path.samefile(folder, ".")
        return cls(environment, folder if entered else os.getcwd())

    async def problem(self) -> str | None:
        """Load code and settings in a child; return why they do not load, None if they do."""
        command = sys.orig_argv[1:]
        command.insert(command.index(COMMAND) + 1, CHECK)
        try:
            # Files: a process that a module starts would keep pipes open.
            out, err = _file(), _file()
        except OSError as error:
            return f"no file for what the check says: {error}"
        with out, err:
            try:
                child = await asyncio.create_subprocess_exec(
                    sys.executable,
                    *command,
                    env=self.environment,
                    cwd=self.folder,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    start_new_session=True,
                )
            except OSError as error:
                if error.filename == self.folder:
                    return f"cannot enter {self.folder}, where it was started: {error.strerror}"
                return f"cannot start {sys.executable}: {error}"
            try:
                async with asyncio.timeout(CHECK_SECONDS):
                    await child.wait()
            except TimeoutError:
                return f"not loaded within {CHECK_SECONDS:g} s"
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)  # what its modules started, too
                await child.wait()
            if any(line.startswith(LOADED) for line in _lines(out)):
                return None
            lines = _lines(err)
        if child.returncode == 0:
            return "a module ended the process, with status 0"
        ours = [line for line in lines if line.startswith(OURS)]  # others may speak at their exit
        return (ours or lines or [f"exit status {child.returncode}"])[-1].removeprefix(OURS)

    def replace(self) -> NoReturn:
        """Go on as the same command by the code that is there now; the process keeps its id."""
        sys.stdout.flush()
        sys.stderr.flush()
        os.chdir(self.folder)
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], self.environment)


def _file() -> IO[bytes]:
    """Return a file without a name: in memory, since a container may have no folder to write to."""
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("aioworker-check"), "w+b")
    return TemporaryFile()


def _lines(file: IO[bytes]) -> list[str]:
    file.seek(0)
    return file.read().decode(errors="replace").strip().splitlines()


def end_check(tasks: list[str]) -> NoReturn:
    """Say that all is loaded, and end, whatever threads and exit handlers the modules have."""
    print(f"{LOADED}{', '.join(tasks)}", file=sys.__stdout__, flush=True)
    os._exit(0)


class Reload:
    """Answers SIGHUP.

    Args:
        stop: Set when the process is to be replaced: what runs is finished then.
        notifier: Told that a reload begins, and that it came to nothing.
        origin: What the process was started with.

    Attributes:
        wanted: Whether the process is to be replaced once it has stopped.
    """

    def __init__(self, stop: asyncio.Event, notifier: Notifier, origin: Origin) -> None:
        self.wanted = False
        self._stop = stop
        self._notifier = notifier
        self._origin = origin
        self._checking: asyncio.Task[None] | asyncio.Task[str | None] | None = None
        self._checked_at = 0.0
        self._again = False

    def listen(self) -> None:
        """Take SIGHUP from now on."""
        signals.on_signal(signal.SIGHUP, self._begin)

    def forget(self) -> None:
        """The process ends for good."""
        self.wanted = False
        if self._checking is not None:
            self._checking.cancel()

    async def may_end(self) -> bool:
        """Whether the process, which has stopped, is to end; if not, it goes on as it was.

        The code may have changed while what ran was finished: if that took a while, it is
        loaded once more.
        """
        if not self.wanted or time.monotonic() - self._checked_at < FRESH_SECONDS:
            return True
        checking = self._checking = asyncio.create_task(self._origin.problem())
        await self._notifier.wait({checking}, lambda: True)
        if not self._is_wanted() or (problem := checking.result()) is None:
            return True
        self.wanted = False
        self._stop.clear()
        self._tell(problem)
        return False

    async def end(self) -> None:
        """Leave no child behind."""
        if self._checking is not None:
            self._checking.cancel()
            await asyncio.gather(self._checking, return_exceptions=True)

    async def replace(self) -> None:
        """Go on by the new code; return where that is not wanted, or no longer."""
        if not self.wanted:
            return
        self._notifier.send(WATCHDOG="1")  # nobody else will until the new code listens
        await _end_asyncio_tasks()
        signals.block()
        for _ in range(2):
            await asyncio.sleep(0)  # one that came just before is heard
        if self._is_wanted():
            self._origin.replace()
        signals.unblock()

    def _is_wanted(self) -> bool:
        return self.wanted

    def _begin(self) -> None:
        if self._stop.is_set():
            self._checked_at = 0.0  # the code may have changed since
            return
        if self._checking is None or self._checking.done():
            self._checking = asyncio.create_task(self._check())
        else:
            self._again = True  # the code may have changed after it was read

    async def _check(self) -> None:
        while True:
            self._again = False
            self._notifier.send(RELOADING="1", MONOTONIC_USEC=str(time.monotonic_ns() // 1000))
            problem = await self._origin.problem()
            if not self._again:
                break
        if problem is not None:
            self._tell(problem)
            return
        log.info("reload: finishing what runs, then the new code begins")
        self._notifier.send(STATUS="reload: finishing what runs")
        self.wanted = True
        self._checked_at = time.monotonic()
        self._stop.set()

    def _tell(self, problem: str) -> None:
        log.error("reload failed, the old code goes on", extra=fields(reason=problem))
        self._notifier.send(READY="1", STATUS=f"reload failed, the old code goes on: {problem}")


async def _end_asyncio_tasks() -> None:
    """Do what `asyncio.run` does at its end, but close the loop.

    That would let go of the signals, which a thread of a module may still receive.
    """
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for one in left:
        one.cancel()
    await asyncio.gather(*left, return_exceptions=True)
    loop = asyncio.get_running_loop()
    await loop.shutdown_asyncgens()
    await loop.shutdown_default_executor()
