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
from typing import TYPE_CHECKING, NoReturn

from aioworker.logs import fields
from aioworker.signals import on_signal

if TYPE_CHECKING:
    from aioworker.notify import Notifier

log = logging.getLogger(__name__)

OURS = "aioworker: "  # how the command line begins to say what is wrong
COMMAND, CHECK = "consume", "--check"
CHECK_SECONDS = 30.0
SIGNALS = (signal.SIGHUP, signal.SIGTERM, signal.SIGINT)


class Reload:
    """Answers SIGHUP.

    Args:
        stop: Set when the process is to be replaced: what runs is finished then.
        notifier: Told that a reload begins, and that it came to nothing.
        environment: What the process was started with: its new code begins with the same.

    Attributes:
        wanted: Whether the process is to be replaced once it has stopped.
    """

    def __init__(
        self, stop: asyncio.Event, notifier: Notifier, environment: dict[str, str]
    ) -> None:
        self.wanted = False
        self._stop = stop
        self._notifier = notifier
        self._environment = environment
        self._checking: asyncio.Task[None] | None = None
        self._again = False

    def listen(self) -> None:
        """Take SIGHUP from now on, one that came during the exchange too."""
        on_signal(signal.SIGHUP, self._begin)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def forget(self) -> None:
        """The process ends for good."""
        self.wanted = False
        if self._checking is not None:
            self._checking.cancel()

    async def may_end(self) -> bool:
        """Whether the process, which has stopped, is to end; if not, it goes on as it was.

        The code may have changed while what ran was finished: it is loaded once more.
        """
        if not self.wanted:
            return True
        problem = await _problem(self._environment)
        if problem is None or not self.wanted:
            return True
        self.wanted = False
        self._stop.clear()
        self._tell(problem)
        return False

    async def end(self) -> None:
        """Leave no child behind; block signals where the process is to be replaced."""
        if self._checking is not None:
            self._checking.cancel()
            await asyncio.gather(self._checking, return_exceptions=True)
        if not self.wanted:
            return
        self._notifier.send(WATCHDOG="1")  # nobody else will until the new code listens
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        for _ in range(2):
            await asyncio.sleep(0)  # one that came just before is heard
        if not self._is_wanted():
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _is_wanted(self) -> bool:
        return self.wanted

    def _begin(self) -> None:
        if self._stop.is_set():
            return
        if self._checking is None or self._checking.done():
            self._checking = asyncio.create_task(self._check())
        else:
            self._again = True  # the code may have changed after it was read

    async def _check(self) -> None:
        while True:
            self._again = False
            self._notifier.send(RELOADING="1", MONOTONIC_USEC=str(time.monotonic_ns() // 1000))
            problem = await _problem(self._environment)
            if not self._again:
                break
        if problem is not None:
            self._tell(problem)
            return
        log.info("reload: finishing what runs, then the new code begins")
        self._notifier.send(STATUS="reload: finishing what runs")
        self.wanted = True
        self._stop.set()

    def _tell(self, problem: str) -> None:
        log.error("reload failed, the old code goes on", extra=fields(reason=problem))
        self._notifier.send(READY="1", STATUS=f"reload failed, the old code goes on: {problem}")


async def _problem(environment: dict[str, str]) -> str | None:
    """Load code and settings in a child process; return why they do not load, None if they do."""
    command = sys.orig_argv[1:]
    command.insert(command.index(COMMAND) + 1, CHECK)
    try:
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            *command,
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        return f"cannot start {sys.executable}: {error}"
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            _out, said = await child.communicate()
    except TimeoutError:
        return f"not loaded within {CHECK_SECONDS:g} s"
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    if child.returncode == 0:
        return None
    lines = said.decode(errors="replace").strip().splitlines()
    ours = [line for line in lines if line.startswith(OURS)]  # others may speak at their exit
    return (ours or lines or [f"exit status {child.returncode}"])[-1].removeprefix(OURS)


def replace(environment: dict[str, str]) -> NoReturn:
    """Go on as the same command by the code that is there now; the process keeps its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
