"""What `consume` does: one worker process, a supervisor for each of its tasks."""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import socket
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aioworker.budget.shared import SharedBudget
from aioworker.console import say
from aioworker.consumer import Consumer, Terms
from aioworker.errors import DatabaseError, WorkerCutOffError
from aioworker.limits import NoLimit, RateLimit, WorkerBudget, in_force
from aioworker.logs import fields
from aioworker.settling.outcome import Kind, Outcome
from aioworker.status.presence import Presence
from aioworker.tasks.standstill import Lookout
from aioworker.words import count
from aioworker.worker.supervisor import Options, Supervisor

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from aioworker.consumer import Link
    from aioworker.mysql.database import Database
    from aioworker.rabbitmq.delivery import Delivery
    from aioworker.settings import Settings
    from aioworker.tasks.task import AnyTask
    from aioworker.worker.systemd import Notifier

log = logging.getLogger(__name__)

CUT_OFF_SECONDS = 5.0  # for what is cut off to say goodbye
MOST_TOLD = 10  # messages that are named where the worker is cut off
_CANCELLED = "something in this process cancelled the worker's own asyncio tasks"
_STOPPED = "something in this process stopped the worker's event loop"
_under_way: list[str] = []  # this process's runs, by task and message; outlives the event loop


@dataclass(frozen=True, slots=True)
class _Served:
    """A task of this worker, and what serves it: a connection and a budget of its own."""

    task: AnyTask
    database: Database
    presence: Presence
    supervisor: Supervisor

    async def end(self) -> None:
        """Take the worker's row away, and close the connection."""
        try:
            await self.presence.leave()
        except DatabaseError as error:
            log.warning("worker's row not removed", extra=fields(reason=str(error)))
        self.database.close()


class _Consumer(Consumer):
    """Notes what it serves, for when the worker is cut off."""

    async def serve(self, delivery: Delivery, link: Link) -> Outcome:
        """Take a delivery as far as it goes."""
        name = f"{self._task.name} {delivery.id}"
        _under_way.append(name)
        try:
            return await super().serve(delivery, link)
        finally:
            _under_way.remove(name)


class _Stopping(asyncio.Task[bool]):
    """Waits for a stop; notes what ran when somebody else cancelled it, along with all others."""

    cut_off: str | None = None

    def cancel(self, msg: object = None) -> bool:
        """Cancel it, as any asyncio task may; whoever does is no part of the worker."""
        if self.cut_off is None and self.get_loop().is_running():
            self.cut_off = f"{_CANCELLED}{_serving()}"
        return super().cancel(msg)

    def end(self) -> None:
        """Cancel it; it is no longer needed."""
        super().cancel()


class _Doing:
    """What the worker does, all its tasks together, as the service manager is told."""

    def __init__(self, notifier: Notifier, alone: bool) -> None:
        self._notifier = notifier
        self._alone = alone
        self._of: dict[str, str] = {}

    def teller(self, task: str) -> Callable[[str], None]:
        """Return what to call with a task's words."""

        def tell(doing: str) -> None:
            self._of[task] = doing if self._alone else f"{task} {doing}"
            self._notifier.send(STATUS="; ".join(self._of.values()))

        return tell


def run(work: Coroutine[None, None, int]) -> int:
    """Run the worker in an event loop of its own.

    Raises:
        WorkerCutOffError: Something else in this process cancelled it, or stopped that loop.
    """
    with asyncio.Runner() as runner:
        try:
            return runner.run(work)
        except asyncio.CancelledError:
            raise WorkerCutOffError(f"{_CANCELLED}{_serving()}") from None
        except RuntimeError as error:
            if inspect.getcoroutinestate(work) == inspect.CORO_CLOSED:
                raise  # its own
            raise WorkerCutOffError(f"{_STOPPED}{_serving()}") from error


def _serving() -> str:
    """Return the tasks that run now, and their messages."""
    if not _under_way:
        return ""
    rest = len(_under_way) - MOST_TOLD
    more = f" and {rest} more" if rest > 0 else ""
    return f"; running then: {', '.join(_under_way[:MOST_TOLD])}{more}"


async def consume(
    settings: Settings,
    tasks: Sequence[AnyTask],
    *,
    burst: bool,
    stop: asyncio.Event,
    notifier: Notifier,
) -> int:
    """Run the tasks' messages until *stop*, or in a burst until the lanes are empty.

    Returns:
        The exit status: 0, or 1 when not all was done in a burst, or when what ran did not
        end in time after a stop.

    Raises:
        WorkerCutOffError: Something else in this process cancelled it.
    """
    doing = _Doing(notifier, alone=len(tasks) == 1)
    lookout = Lookout()
    served = [_serve(settings, task, burst, doing, lookout) for task in tasks]
    if settings.budget != "shared":
        log.warning("the rate limit counts this process's starts alone: AIOWORKER_BUDGET=worker")
    notifier.send(READY="1", STATUS="starting")
    running = [asyncio.create_task(one.supervisor.run(stop)) for one in served]
    try:
        with lookout:
            in_time = await _until_stopped(running, stop, settings.shutdown_timeout)
        if not in_time:
            log.error("not done in time", extra=fields(seconds=settings.shutdown_timeout))
            return 1
        complete = all(one.result() for one in running)
    finally:
        for one in running:
            one.cancel()
        # A thread that never returns is left behind: its connection is closed already.
        await asyncio.wait(running, timeout=CUT_OFF_SECONDS)
        for ended in served:
            await ended.end()
    _tell(served, burst)
    return 0 if complete or not burst else 1


def _serve(
    settings: Settings, task: AnyTask, burst: bool, doing: _Doing, lookout: Lookout
) -> _Served:
    """Make what serves a task."""
    options = task.options
    own = in_force(options.rate_limit or NoLimit.NONE, settings.rate_limit)
    rate = own.limit if isinstance(own.limit, RateLimit) else None
    timeout = settings.task_timeout if options.timeout is None else options.timeout
    retries = settings.max_retries if options.max_retries is None else options.max_retries
    host, pid = socket.gethostname(), os.getpid()
    worker = f"{host}:{pid}"
    database = settings.database(timeout, check=False)  # files may come back
    shared = settings.budget == "shared"
    presence = Presence(
        task.name,
        host,
        pid,
        None if rate is None else str(rate),
        doing.teller(task.name),
        database if shared else None,
        timeout,
    )
    budget = SharedBudget(database, task.name, rate, worker) if shared else WorkerBudget(rate)
    terms = Terms(retries, timeout, settings.connect_timeout, settings.queue_prefix)
    consumer = _Consumer(task, database, budget, presence, terms, worker)
    needs_database = shared or task.needs_database
    supervising = Options(
        settings.amqp_url,
        burst,
        settings.connect_timeout,
        worker,
        needs_database,
        lookout.lately,
    )
    log.info(
        "worker started",
        extra=fields(task=task.name, rate_limit=own.rate, budget=settings.budget, burst=burst),
    )
    supervisor = Supervisor(task, database, budget, consumer, presence, supervising)
    return _Served(task, database, presence, supervisor)


async def _until_stopped(
    running: list[asyncio.Task[bool]], stop: asyncio.Event, timeout: float
) -> bool:
    """Wait until all have ended, by themselves or after a stop; return whether they did in time.

    Raises:
        AioworkerError: One failed: the others are not left to run without it.
        WorkerCutOffError: Something else in this process cancelled what the worker runs on.
    """
    stopping = _Stopping(stop.wait())
    try:
        left: set[asyncio.Task[bool]] = set(running)
        while left and not stop.is_set():
            done, _waiting = await asyncio.wait(
                {*left, stopping}, return_when=asyncio.FIRST_COMPLETED
            )
            left -= done
            for one in done - {stopping}:
                one.result()
        if left:
            log.info("draining", extra=fields(shutdown_timeout=timeout))
            _done, left = await asyncio.wait(left, timeout=timeout)
    except asyncio.CancelledError:
        if stopping.cut_off is None:
            raise
        raise WorkerCutOffError(stopping.cut_off) from None
    else:
        return not left
    finally:
        stopping.end()
        await asyncio.gather(stopping, return_exceptions=True)


def _tell(served: Sequence[_Served], burst: bool) -> None:
    """Say what was done."""
    settled: Counter[Kind] = Counter()
    starts = 0
    for one in served:
        settled += one.supervisor.consumer.settled
        starts += one.supervisor.consumer.starts
    done, dead, retried, released, postponed = (settled[kind] for kind in Kind)
    log.info("worker stopped", extra=fields(starts=starts, done=done))
    if burst:
        say(
            f"done {count(done, 'message')} in {count(starts, 'start')};"
            f" dead letters {dead}, to retry {retried + postponed}, given back {released}"
        )
