"""A worker process: serves each of its tasks over connections of its own, until it is stopped."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections import Counter
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from aioworker.budget.shared import Shared, SharedBudget
from aioworker.errors import AioworkerError, DatabaseError, UsageError, WorkerCutOffError
from aioworker.limits import NoLimit, RateLimit, WorkerBudget, in_force
from aioworker.logs import fields
from aioworker.rabbitmq.queues import Queues
from aioworker.settling.outcome import Kind
from aioworker.status.presence import Presence
from aioworker.tasks.loop_monitor import LoopMonitor
from aioworker.worker import signals
from aioworker.worker.reload import Reload
from aioworker.worker.session import Worker
from aioworker.worker.supervisor import Supervisor
from aioworker.worker.systemd import Notifier

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from aioworker.settings import Settings
    from aioworker.tasks.task import AnyTask
    from aioworker.worker.reload import Origin

log = logging.getLogger(__name__)

CUT_OFF_SECONDS = 5.0  # for what is cut off to say goodbye
MOST_NAMED = 10  # messages, if the worker is cut off
_CANCELLED = "something in this process cancelled the worker's own asyncio tasks"
_STOPPED = "something in this process stopped the worker's event loop"


def refuse_shared_budgets(settings: Settings, tasks: Sequence[AnyTask]) -> None:
    """See that no task shares a budget where each worker keeps its own.

    Raises:
        UsageError: One does.
    """
    for task in tasks:
        budget = task.options.budget
        if settings.budget != "shared" and budget is not None:
            raise UsageError(
                f"task {task.name!r} shares budget {budget.name!r} with others, and"
                " AIOWORKER_BUDGET=worker keeps each worker's own: unset it"
            )


class Done(NamedTuple):
    """What a process did.

    Args:
        complete: Whether what ran ended in time, and in a burst whether all that was taken is done.
        starts: How many runs were begun.
        settled: How many messages came to each kind of outcome.
    """

    complete: bool
    starts: int
    settled: Counter[Kind]


class Process:
    """Runs tasks' messages, in one event loop for all of them.

    Args:
        settings: The settings.
        tasks: The tasks.
        burst: Whether to end once the lanes are empty.
        origin: What the process was started with: SIGHUP has it go on with the same.
        raise_early: Raises the signals again that came before anything could hear them.
        report: Called with what a burst did, also where a reload goes on behind it.
    """

    def __init__(
        self,
        settings: Settings,
        tasks: Sequence[AnyTask],
        *,
        burst: bool,
        origin: Origin,
        raise_early: Callable[[], None],
        report: Callable[[Done], None],
    ) -> None:
        self._settings = settings
        self._tasks = tasks
        self._burst = burst
        self._origin = origin
        self._raise_early = raise_early
        self._report_done = report
        self._notifier = Notifier(os.environ)
        self._stop = asyncio.Event()
        self._workers: list[Worker] = []
        self._running = False
        self._doing: dict[str, str] = {}  # of each task, in words

    @contextmanager
    def naming_what_ran(self) -> Iterator[None]:
        """Name what ran if something else in this process ends the event loop's work.

        Raises:
            WorkerCutOffError: It did: it cancelled all asyncio tasks, or stopped the loop.
        """
        try:
            yield
        except asyncio.CancelledError:
            raise WorkerCutOffError(f"{_CANCELLED}{self._under_way()}") from None
        except RuntimeError as error:
            if not self._running:
                raise  # its own
            raise WorkerCutOffError(f"{_STOPPED}{self._under_way()}") from error

    def _under_way(self) -> str:
        """Return the tasks and the messages that are not settled, in words."""
        names = [
            f"{one.ctx.task} {one.delivery.id}"
            for worker in self._workers
            for start in worker.consumer.under_way
            for one in start.held
        ]
        if not names:
            return ""
        rest = len(names) - MOST_NAMED
        more = f" and {rest} more" if rest > 0 else ""
        return f"; running then: {', '.join(names[:MOST_NAMED])}{more}"

    async def run(self) -> Done:
        """Run until a signal, or in a burst until the lanes are empty.

        At SIGHUP the process goes on by new code, if that loads.

        Raises:
            AioworkerError: In a burst: RabbitMQ or the database cannot be used, or a task is
                paused.
        """
        self._running = True
        reloading = Reload(self._stop, self._notifier, self._origin)

        def end(_signal: object) -> None:
            self._notifier.send(STOPPING="1", STATUS="finishing the running chunk")
            reloading.forget()
            self._stop.set()

        signals.on_stop(end)
        reloading.listen()
        self._raise_early()
        try:
            while True:
                monitor = LoopMonitor()
                supervisors = self._make(monitor)
                self._notifier.send(READY="1", STATUS="starting")
                serving = [
                    asyncio.create_task(one.run(self._stop), name=one.worker.task.name)
                    for one in supervisors
                ]
                try:
                    with monitor:
                        complete = await self._until_stopped(serving)
                finally:
                    await self._end(serving)
                done = self._done(complete)
                if self._burst:
                    self._report_done(done)
                if await reloading.may_end():
                    break
        finally:
            await reloading.end()
            self._running = False
        await reloading.replace()
        return done

    def _make(self, monitor: LoopMonitor) -> list[Supervisor]:
        """Make what serves each task."""
        self._doing.clear()
        if self._settings.budget != "shared":
            log.warning(
                "the rate limit counts this process's starts alone: AIOWORKER_BUDGET=worker"
            )
        made = [self._supervisor(task, monitor) for task in self._tasks]
        self._workers = [one.worker for one in made]
        return made

    def _supervisor(self, task: AnyTask, monitor: LoopMonitor) -> Supervisor:
        """Make what serves a task."""
        settings, options = self._settings, task.options
        own = in_force(options.rate_limit or NoLimit.NONE, settings.rate_limit)
        rate = own.limit if isinstance(own.limit, RateLimit) else None
        timeout = settings.task_timeout if options.timeout is None else options.timeout
        host, pid = socket.gethostname(), os.getpid()
        name = f"{host}:{pid}"
        database = settings.database(timeout, check=False)  # files may come back
        shared = settings.budget == "shared"
        presence = Presence(
            task.name,
            host,
            pid,
            None if rate is None else str(rate),
            partial(self._report, task.name),
            database if shared else None,
            timeout,
            None if options.budget is None else options.budget.name,
        )
        gather_seconds = settings.gather_seconds if task.gathers else 0.0
        both = options.budget
        shared_with_others = None if both is None else Shared(both.name, both.rate_limit)
        budget = (
            SharedBudget(
                database,
                task.name,
                rate,
                name,
                gather_seconds=gather_seconds,
                shared=shared_with_others,
            )
            if shared
            else WorkerBudget(rate, gather_seconds)
        )
        log.info(
            "worker started",
            extra=fields(
                task=task.name, rate_limit=own.rate, budget=settings.budget, burst=self._burst
            ),
        )
        worker = Worker.of(
            name,
            task,
            database,
            budget,
            presence,
            timeout=settings.connect_timeout,
            task_timeout=timeout,
            max_retries=settings.max_retries
            if options.max_retries is None
            else options.max_retries,
            nodes=len(settings.amqp_url),
            stood_still=monitor.recent,
            needs_database=shared or task.needs_database,
            burst=self._burst,
            gather_seconds=gather_seconds,
            chunk_size=options.chunk_size or settings.chunk_size,
        )
        queues = Queues.of(task.name, settings.queue_prefix)
        return Supervisor(
            worker, settings.amqp_url, queues, settings.connect_timeout, f"{name} {task.name}"
        )

    def _result(self, served: asyncio.Task[bool]) -> bool:
        """Return what serving a task came to; what it failed for names it, if it is one of several.

        Raises:
            AioworkerError: It failed.
        """
        try:
            return served.result()
        except AioworkerError as error:
            if len(self._tasks) > 1:
                error.add_note(f"that was {served.get_name()}")
            raise

    def _report(self, task: str, doing: str) -> None:
        """Show by the service manager what the worker does, all its tasks together."""
        self._doing[task] = doing if len(self._tasks) == 1 else f"{task} {doing}"
        self._notifier.send(STATUS="; ".join(self._doing.values()))

    async def _until_stopped(self, serving: Sequence[asyncio.Task[bool]]) -> bool:
        """Wait until all have ended, by themselves or after a stop.

        Returns:
            Whether all is done: all ended in time, and in a burst all that was taken is done.

        Raises:
            AioworkerError: One failed: the others are not left to run without it.
        """
        stopping = asyncio.create_task(self._stop.wait())
        left = set(serving)
        try:
            while left and not self._stop.is_set():
                done = await self._notifier.wait({*left, stopping}, self._progresses)
                left -= done
                for one in serving:
                    if one in done:
                        self._result(one)
        finally:
            stopping.cancel()
        if left:
            seconds = self._settings.shutdown_timeout
            log.info("draining", extra=fields(shutdown_timeout=seconds))
            ends_at = asyncio.get_running_loop().time() + seconds
            while left and (done := await self._notifier.wait(left, self._progresses, ends_at)):
                left -= done
        if left:
            log.error("not done in time", extra=fields(seconds=self._settings.shutdown_timeout))
            return False
        # Of each: one that failed is not passed over.
        results = [self._result(one) for one in serving]
        return all(results) or not self._burst

    def _progresses(self) -> bool:
        return all(worker.progresses for worker in self._workers)

    async def _end(self, serving: Sequence[asyncio.Task[bool]]) -> None:
        """Cut off what still runs; take the workers' rows away, and close the connections."""
        for one in serving:
            one.cancel()
        # A thread that never returns is left behind: its connection is closed already.
        ended, _left = await asyncio.wait(serving, timeout=CUT_OFF_SECONDS)
        for one in ended:
            if not one.cancelled():
                one.exception()  # another's is told already: asyncio would log this one
        for worker in self._workers:
            try:
                await worker.presence.leave()
            except DatabaseError as error:
                log.warning("worker's row not removed", extra=fields(reason=str(error)))
            worker.database.close()

    def _done(self, complete: bool) -> Done:
        settled: Counter[Kind] = Counter()
        for worker in self._workers:
            settled += worker.consumer.settled
        starts = sum(worker.consumer.starts for worker in self._workers)
        log.info("worker stopped", extra=fields(starts=starts, done=settled[Kind.ACK]))
        return Done(complete, starts, settled)
