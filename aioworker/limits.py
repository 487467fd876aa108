"""Rate limits: how often a task may start, and the wait that keeps to it in one process.

A limit is written as in Celery: ``"2/m"`` is one start every 30 seconds. What all workers
may do together is the `budget`.
"""

from __future__ import annotations

import asyncio
import math
import re
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from enum import Enum, StrEnum
from typing import TYPE_CHECKING, NamedTuple, Protocol

from aioworker.clock import own_time
from aioworker.errors import RateLimitError
from aioworker.reasons import Reason, ReasonKind

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Sequence
    from contextlib import AbstractAsyncContextManager

    from aiolimiter import AsyncLimiter

POLL_SECONDS = 2.0  # how soon a change of what is set at run time is followed, at the latest
# The turn and a message are taken this much before a start is due, so that taking and reading
# cost nothing of the budget; where starts are nearer than that, they are taken at once.
LEAD_SECONDS = 0.25
TIMER_SECONDS = 0.002  # a timer's lateness, and more
PERIODS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_NO_LIMIT_WORDS = {"none", "nolimit", "unlimited", "null", "off"}
_UNITS = {"": "s", "sec": "s", "second": "s", "min": "m", "minute": "m", "hr": "h", "hour": "h"}


class RateLimit(NamedTuple):
    """How often a task may start: *starts* times in every period of *unit*.

    Starts are evenly spaced and idle time is not saved up: a sweep that begins after a
    quiet hour does not begin with a burst of writes.

    Args:
        starts: Starts allowed in one period; 0 pauses the task.
        unit: `s`, `m` or `h`: a second, a minute, an hour.
    """

    starts: int
    unit: str

    @classmethod
    def parse(cls, text: str) -> RateLimit:
        """Read COUNT/UNIT, such as ``"2/m"``; ``"0/m"`` is paused, never unlimited.

        Raises:
            RateLimitError: The text is anything else, what Celery takes for it included
                (`"2"`, `"2/min"`, `"nan/m"`); it says what to write instead.
        """
        match = re.fullmatch(r"([0-9]{1,9})/([smh])", text)
        if match is None:
            raise RateLimitError(
                "expected rate limit as COUNT/UNIT, such as '2/m', or none, got:"
                f" {text!r}{_instead(text)}"
            )
        return cls(int(match[1]), match[2])

    @property
    def paused(self) -> bool:
        """Whether nothing may start at all."""
        return self.starts == 0

    @property
    def interval(self) -> float:
        """Seconds from one start to the next at least; infinite when paused."""
        return PERIODS[self.unit] / self.starts if self.starts else math.inf

    @property
    def gap_us(self) -> int:
        """The interval in whole microseconds, rounded up: never a start too many.

        Raises:
            RateLimitError: The limit is a pause.
        """
        if self.paused:
            raise RateLimitError(f"expected a rate that starts anything, got: '{self}'")
        return -(-int(PERIODS[self.unit] * 1_000_000) // self.starts)

    def __str__(self) -> str:
        return f"{self.starts}/{self.unit}"


class NoLimit(Enum):
    """That starts are not limited, said on purpose; None is where nothing is said."""

    NONE = "none"

    def __str__(self) -> str:
        return self.value


def parse_limit(text: str) -> RateLimit | NoLimit:
    """Read COUNT/UNIT, or ``"none"``, in any case and with spaces around it, which is no limit.

    Raises:
        RateLimitError: The text is anything else; see `RateLimit.parse`.
    """
    return NoLimit.NONE if text.strip().lower() == NoLimit.NONE.value else RateLimit.parse(text)


class Interval(NamedTuple):
    """The interval between starts that somebody has set at run time.

    Args:
        gap_us: In microseconds, more than 0.
    """

    gap_us: int

    @property
    def interval(self) -> float:
        """Seconds from one start to the next at least."""
        return self.gap_us / 1e6

    def __str__(self) -> str:
        """Return it as the rate limit it is; in seconds where it is none."""
        for unit, least in (("s", 2), ("m", 1), ("h", 1)):
            rate = RateLimit(round(PERIODS[unit] * 1_000_000 / self.gap_us), unit)
            if rate.starts >= least and rate.gap_us == self.gap_us:
                return str(rate)
        return f"1 in {self.interval:g} s"


class Source(StrEnum):
    """Where the rate in force comes from."""

    RUN_TIME = "run time"
    SETTING = "setting"
    TASK = "task"
    WORKERS = "workers"
    UNKNOWN = "unknown"


class AtRunTime(Protocol):
    """What is set at run time, in the budget's row."""

    @property
    def gap_us(self) -> int | None:
        """The interval in microseconds: 0 is no limit, None leaves it to others."""

    @property
    def pause(self) -> str:
        """Who paused the task, when and why; empty if nobody did."""


class InForce(NamedTuple):
    """The rate limit in force.

    Args:
        limit: How far starts are apart; None is unknown.
        source: Who says so.
        pause: Why no start may begin at all, in one line; empty if one may.
    """

    limit: RateLimit | Interval | NoLimit | None
    source: Source
    pause: str

    @property
    def rate(self) -> str:
        """The limit as a person writes it: `none` is no limit; or `unknown`."""
        return "unknown" if self.limit is None else str(self.limit)

    @property
    def paused(self) -> bool:
        """Whether no start may begin."""
        return self.pause != ""

    @property
    def gap_us(self) -> int | None:
        """The interval between starts in microseconds; None without one."""
        return None if self._pace is None else self._pace.gap_us

    @property
    def interval(self) -> float | None:
        """The interval between starts in seconds; None without one."""
        return None if self._pace is None else self._pace.interval

    @property
    def _pace(self) -> RateLimit | Interval | None:
        if self.limit is None or self.limit is NoLimit.NONE or _is_pause(self.limit):
            return None
        return self.limit


def in_force(
    own: RateLimit | NoLimit | None,
    setting: RateLimit | NoLimit | None = None,
    row: AtRunTime | None = None,
    workers: Collection[str] = (),
) -> InForce:
    """Return the rate limit that holds, whoever asks.

    What is set at run time wins, then the setting (the option, or else its variable), then the
    task's own. Where workers run and agree, theirs is known better than here: they may have
    another setting, or another version of the task.

    Args:
        own: The task's own; None where it is not known.
        setting: What this process's setting says; None if it says nothing.
        row: What is set at run time; None without a row.
        workers: The rates that the task's workers have of their own, as texts.
    """
    limit: RateLimit | Interval | NoLimit | None
    if row is not None and row.gap_us is not None:
        limit, source = Interval(row.gap_us) if row.gap_us else NoLimit.NONE, Source.RUN_TIME
    elif setting is not None:
        limit, source = setting, Source.SETTING
    else:
        limit, source = own, Source.UNKNOWN if own is None else Source.TASK
    if source is not Source.RUN_TIME and len(workers) == 1 and str(limit) not in workers:
        [theirs] = workers
        limit, source = parse_limit(theirs), Source.WORKERS
    pause = "" if row is None else row.pause
    if not pause and _is_pause(limit):
        pause = f"paused: rate limit {limit}"
    return InForce(limit, source, pause)


def _is_pause(limit: object) -> bool:
    return isinstance(limit, RateLimit) and limit.paused


def _instead(text: str) -> str:
    """Return what to write for what Celery takes and means something else by."""
    if _squeezed(text) in _NO_LIMIT_WORDS:
        return "; write 'none' for no limit"
    found = re.fullmatch(r"([0-9.e+]+|[+-]?(?:nan|inf)|-.*?)(?:/([a-z]*?)s?)?", _squeezed(text))
    if found is None:
        return ""
    try:
        count = float(found[1])
    except ValueError:
        return ""
    if not math.isfinite(count) or count < 0:
        return "; write '0/m' to pause, or 'none' for no limit"
    word = found[2] or ""
    unit = word if word in PERIODS else _UNITS.get(word)
    if unit is None:
        return ""
    for longer, period in PERIODS.items():
        starts = count * period / PERIODS[unit]
        if period >= PERIODS[unit] and starts == int(starts) < 10**9:
            return f"; write '{int(starts)}/{longer}'"
    return ""


def _squeezed(text: str) -> str:
    return "".join(text.split()).lower()


class Limiter:
    """The wait for an interval, inside one process and one event loop.

    It forgets everything when the process ends. Nothing is held while waiting: look at
    `due_in`, sleep, look again, and `charge` at the moment the start begins.

    Args:
        interval: Seconds from one start to the next, more than 0.
    """

    def __init__(self, interval: float) -> None:
        self.interval = interval
        self._limiter = _limiter(interval)
        self._last = -math.inf

    def due_in(self) -> float:
        """Return the seconds until a start is due: 0 when one is."""
        if self._limiter.has_capacity():
            return 0.0
        # The limiter's arithmetic may lag behind ours by a rounding error: never 0 here.
        return max(self._last + self.interval - asyncio.get_running_loop().time(), 0.001)

    async def due(self) -> None:
        """Wait until a start is due, to the microsecond."""
        # A timer of the event loop is late by a millisecond or more.
        await asyncio.sleep(self.due_in() - TIMER_SECONDS)
        while self.due_in():  # noqa: ASYNC110 - time is waited for
            await asyncio.sleep(0)

    async def charge(self, at: float | None = None) -> None:
        """Take one start; returns at once when one is due.

        Args:
            at: When it began, by the event loop's clock; None is now.
        """
        now = asyncio.get_running_loop().time
        passed = 0.0 if at is None else (now() - at) / self.interval
        await self._limiter.acquire(min(max(1 - passed, 0), 1))
        self._last = now() if at is None else at

    async def change(self, interval: float) -> None:
        """Go on with another interval, counted from the last start."""
        self.interval = interval
        self._limiter = _limiter(interval)
        passed = (asyncio.get_running_loop().time() - self._last) / interval
        if passed < 1:
            await self._limiter.acquire(1 - passed)


def _limiter(interval: float) -> AsyncLimiter:
    """Return what lets one start through in each *interval*, of seconds."""
    # It takes 10 ms to import: who publishes, or reads a help, waits by no limiter.
    from aiolimiter import AsyncLimiter

    # One start at a time: AsyncLimiter(starts, period) would let nearly twice the limit through
    # in the first period.
    return AsyncLimiter(1, interval)


class Wait(NamedTuple):
    """Why no start may begin now, and the seconds after which to look again.

    Args:
        reason: Why.
        seconds: Until the next look is worth it.
    """

    reason: Reason
    seconds: float


class End(NamedTuple):
    """What a start came to.

    Args:
        outcome: The kind of its messages' outcome, `mixed` if they have several.
        changed: Rows that it has changed, as far as it counts them; None if it does not.
    """

    outcome: str
    changed: int | None = None


class TaskBudget(Protocol):
    """What a consumer asks before each start."""

    @property
    def limited(self) -> bool:
        """Whether starts are counted at all, as of the last look."""

    @property
    def interval(self) -> float:
        """Seconds between two starts, as of the last look; 0 without a limit."""

    def now(self) -> datetime:
        """Return the time of day, UTC, as all workers should have it."""

    async def check(self, contenders: int = 0) -> Wait | None:
        """Return why no start may begin now; None where one is due, or nearly.

        Args:
            contenders: How many other workers wait for the same.
        """

    @property
    def shares(self) -> bool:
        """Whether other tasks share it, so that what waits in the lanes decides who is next."""

    async def want(self, *, urgent: bool, bulk: bool) -> None:
        """Say what waits in the lanes, where other tasks share the budget."""

    def turn(self) -> AbstractAsyncContextManager[Wait | None]:
        """Hold the turn inside an `async with`; its value is why not, None where it is held."""

    @property
    def due_at(self) -> float:
        """When the next start is due, by the event loop's clock, as of the last look."""

    @property
    def bulk_next(self) -> bool:
        """Whether the next start begins with the bulk lane, as of the last look."""

    def deaths(self, message: str) -> int:
        """Return how often a worker died while a message ran, as far as it is counted."""

    def together(self, message: str) -> int | None:
        """Return with how many a message may run, since more of them died; None for any number."""

    async def rest(self, *, resting: bool) -> None:
        """Only wait from now on, in the turn, or no longer: who is lost in a wait loses it soon."""

    def reading(self, message: str) -> AbstractAsyncContextManager[None]:
        """Inside, in the turn, a message is read that may kill its worker: it is noted so long."""

    async def charge(
        self, messages: Sequence[str], *, ids: int | None = None, bulk_next: bool = False
    ) -> Wait | None:
        """Begin a start, at the moment it is due; return why not, None where it began.

        Args:
            messages: What runs, by their keys.
            ids: How many ids or rows they are to write; None of a task without chunks.
            bulk_next: Whether the next start begins with the bulk lane, since this one has nothing
                of it; where no start begins, that stays as it was.
        """

    async def stops_run(self) -> Reason | None:
        """Return why the run that is on may begin no further transaction; None if it may."""

    async def ended(self, messages: Sequence[str], end: End | None = None) -> None:
        """Note that messages are settled, or given back, and their worker lives.

        Args:
            messages: Their keys.
            end: What their start came to; None if they were not charged.
        """


class WorkerBudget:
    """The budget of one process alone, for those who may not create a table.

    A new process cannot know when the last one started something: it waits one interval
    before its first start.

    Args:
        rate: How often the task may start; None is no limit.
        gather_seconds: How long before a start is due messages are gathered for it, at most.

    Attributes:
        bulk_next: As for `TaskBudget`.
    """

    def __init__(self, rate: RateLimit | None, gather_seconds: float = 0.0) -> None:
        self._rate = rate
        self._lead = lead_seconds(gather_seconds, math.inf if rate is None else rate.interval)
        self._pause = in_force(rate or NoLimit.NONE).pause
        self._limiter: Limiter | None = None
        self.bulk_next = False

    @property
    def limited(self) -> bool:
        """Whether starts are counted at all."""
        return self._rate is not None

    @property
    def interval(self) -> float:
        """Seconds between two starts; 0 without a limit."""
        return 0.0 if self._rate is None else self._rate.interval

    def now(self) -> datetime:
        """Return this machine's time of day, UTC: no other is asked."""
        return own_time()

    async def check(self, contenders: int = 0) -> Wait | None:
        """Return why no start may begin now."""
        if self._rate is None:
            return None
        if self._pause:
            return Wait(Reason(ReasonKind.PAUSED, self._pause), POLL_SECONDS)
        if self._limiter is None:
            self._limiter = Limiter(self._rate.interval)
            await self._limiter.charge()
        seconds = self._limiter.due_in()
        if seconds <= self._lead:
            return None
        reason = next_start(self.now() + timedelta(seconds=seconds))
        return Wait(reason, min(seconds - self._lead, POLL_SECONDS))

    @property
    def shares(self) -> bool:
        """Whether other tasks share it: none does."""
        return False

    async def want(self, *, urgent: bool, bulk: bool) -> None:
        """Nobody else is asked."""

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[Wait | None]:
        """Nobody else is asked: the turn is always ours."""
        yield await self.check()

    @property
    def due_at(self) -> float:
        """When the next start is due, by the event loop's clock."""
        seconds = 0.0 if self._limiter is None else self._limiter.due_in()
        return asyncio.get_running_loop().time() + seconds

    def deaths(self, message: str) -> int:
        """Return 0: who died before is nowhere noted."""
        return 0

    def together(self, message: str) -> int | None:
        """Return None: who died before is nowhere noted."""
        return None

    async def rest(self, *, resting: bool) -> None:
        """Nobody else waits for this turn."""

    @asynccontextmanager
    async def reading(self, message: str) -> AsyncIterator[None]:
        """Nothing is noted."""
        yield

    async def charge(
        self, messages: Sequence[str], *, ids: int | None = None, bulk_next: bool = False
    ) -> Wait | None:
        """Begin a start, at the moment it is due."""
        if (wait := await self.check()) is not None:
            return wait
        if self._limiter is not None:
            await self._limiter.due()
            await self._limiter.charge()
        self.bulk_next = bulk_next
        return None

    async def stops_run(self) -> Reason | None:
        """Return None: nobody pauses a process alone."""

    async def ended(self, messages: Sequence[str], end: End | None = None) -> None:
        """Nothing was noted."""


def lead_seconds(gather_seconds: float, interval: float) -> float:
    """Return how long before a start is due its turn is taken, and its messages are.

    Args:
        gather_seconds: How long they are gathered at most.
        interval: Seconds between two starts; for a third of it the turn is free for others.
    """
    return max(LEAD_SECONDS, min(gather_seconds, interval * 2 / 3))


def next_start(moment: datetime, name: str | None = None) -> Reason:
    """Return the reason to wait for a start that is due at a moment, UTC.

    Args:
        moment: The moment.
        name: The budget's that tasks share; None of the task's own.
    """
    budget = "budget" if name is None else f"budget {name}"
    return Reason(ReasonKind.BUDGET, f"{budget}: next start at {moment:%H:%M:%S} UTC")
