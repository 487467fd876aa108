"""A start: the messages that it holds, what of them is to be written, and what that came to."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from itertools import chain, count
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from aioworker.settling.outcome import UNDECIDED, Kind, Outcome
from aioworker.tasks.chunk import id_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime

    from aioworker.rabbitmq.delivery import Delivery
    from aioworker.settling.failure import Failure
    from aioworker.tasks.context import Context

MOST_MESSAGES = 1000
MOST_BODY_BYTES = 16 * 1024 * 1024  # of all messages together


_order = itemgetter(0)


class Rank(NamedTuple):
    """When a message's rows were meant: those of the later one replace the others'.

    Args:
        published: When it was published; None if that is not known.
        lane: `urgent` or `bulk`.
    """

    published: datetime | None
    lane: str

    def follows(self, other: Rank) -> bool:
        """Whether it is later than another one, which was taken before it."""
        if self.published and other.published and self.published != other.published:
            return self.published > other.published
        return self.lane == other.lane or self.lane == "urgent"


@dataclass(slots=True, eq=False)
class Held:
    """A message in hand.

    Args:
        delivery: The delivery.
        ctx: What a run of it alone gets; its log line counts what that counts.
        args: The positional arguments as the task's function gets them, once they are checked.
        kwargs: Its keyword arguments, likewise.
        ids: How many ids or rows it names.
        constants: What is passed behind them, as JSON has it.
        seconds: How long its publisher lets it run; None leaves that to the worker.
        most: With how many it may run at most, itself among them.
        expires: When it is too late to begin; None for never.
        read: Seconds that were spent in asking what of it, and of nothing else, needs writing.
        taken: When it was taken, by the monotonic clock.
        again: Whether its run had ended before, and could not be settled then.
        failure: What went wrong, if something did.
        outcome: What it comes to.
        settled: Whether RabbitMQ knows that.
    """

    delivery: Delivery
    ctx: Context
    args: list[Any] = field(default_factory=list)
    kwargs: dict[str, Any] = field(default_factory=dict)
    ids: int = 0
    constants: tuple[list[Any], dict[str, Any]] = field(default_factory=lambda: ([], {}))
    seconds: float | None = None
    most: int = MOST_MESSAGES
    expires: datetime | None = None
    read: float = 0.0
    taken: float = field(default_factory=time.monotonic)
    again: bool = False
    failure: Failure | None = None
    outcome: Outcome = UNDECIDED
    settled: bool = False

    @property
    def gone(self) -> bool:
        """Whether it is settled, and does not come again as it was."""
        return self.settled and self.outcome.kind not in (Kind.RELEASED, Kind.MOVED)

    @property
    def rank(self) -> Rank:
        """When its rows were meant."""
        return Rank(self.delivery.published, self.delivery.lane)


@dataclass(slots=True, eq=False)
class Start:
    """What every step of a start takes.

    Times are the monotonic clock's; 0 is for what has not happened.

    Args:
        most: How many messages it may hold, at most.
        size: How many ids or rows are to be written, before it takes no more messages.
        held: Its messages that are not settled.
        closed: Whether it takes no more messages, whatever room it has.
        runs: Those that run together.
        ctx: What their run gets.
        limit: Ends the step that is on when its time is up.
        seconds: How long that may take.
        began: When its run began.
        ended: When its last step ended.
        cut_off: Whether that ended because its time was up.
    """

    most: int = 1
    size: int = 1
    held: list[Held] = field(default_factory=list)
    closed: bool = False
    runs: list[Held] = field(default_factory=list)
    ctx: Context | None = None
    limit: asyncio.Timeout = field(default_factory=lambda: asyncio.Timeout(None))
    seconds: float = 0.0
    began: float = 0.0
    ended: float = 0.0
    cut_off: bool = False
    _body_bytes: int = 0
    # By their ids: the rows to be written, in the order in which they were asked for; of an id
    # there may be several in one message. Who names them. And the rank of what was asked last.
    _rows: dict[Any, list[tuple[int, Any]]] = field(default_factory=dict)
    _names: dict[Any, list[Held]] = field(default_factory=dict)
    _ranks: dict[Any, Rank] = field(default_factory=dict)
    _asked: dict[Any, tuple[Rank, Held]] = field(default_factory=dict)
    _order: count[int] = field(default_factory=count)

    def may_take(self, seconds: float, spent: float = 0.0) -> asyncio.Timeout:
        """Let the next step take so long, less what was spent before."""
        self.seconds, self.limit, self.cut_off = seconds, asyncio.timeout(seconds - spent), False
        return self.limit

    def add(self, one: Held) -> None:
        """Hold a message."""
        self.held.append(one)
        self._body_bytes += len(one.delivery.message.body)

    def let_go(self) -> None:
        """Hold those messages no longer whose outcome is decided."""
        self.held = [one for one in self.held if one.outcome is UNDECIDED]
        self._body_bytes = sum(len(one.delivery.message.body) for one in self.held)

    # Which messages go together.

    def has_room(self, unread: int = 0) -> bool:
        """Whether it may take one more message.

        Args:
            unread: Ids or rows of which it is not known yet whether they are to be written.
        """
        return (
            not self.closed
            and len(self.held) < self.most
            and len(self._rows) + unread < self.size
            and self._body_bytes < MOST_BODY_BYTES
        )

    def fits(self, one: Held) -> bool:
        """Whether a message that it took last may run with the others."""
        first = self.held[0]
        # As text: to Python 1, 1.0 and True are equal.
        alike = repr(one.constants) == repr(first.constants)
        return one is first or (len(self.held) <= one.most and alike)

    # What is to be written: of two rows of one id the later wins.

    @property
    def chunk(self) -> list[Any]:
        """What is to be written, of all its messages together."""
        return [row for _, row in sorted(chain.from_iterable(self._rows.values()), key=_order)]

    def ask(self, came: Sequence[Held]) -> list[Any]:
        """Return what of these messages may have to be written, and is not known to be yet."""
        self._asked = {}
        for one in came:
            rank = one.rank
            for entry in one.args[0]:
                key = id_of(entry)
                if key is entry:  # what is right for an id alone may have changed since it was read
                    self._asked.setdefault(key, (rank, one))
                    continue
                rank_before, owner = self._asked.get(key, (self._ranks.get(key), None))
                if owner is not one and (rank_before is None or rank.follows(rank_before)):
                    self._asked[key] = rank, one
        return [
            entry
            for one in came
            for entry in one.args[0]
            if (found := self._asked.get(id_of(entry))) is not None and found[1] is one
        ]

    def need(self, came: Sequence[Held], needed: Iterable[Any]) -> list[Held]:
        """Note what of the messages is to be written; return those that need nothing, any more.

        Args:
            came: The messages, as `ask` had them.
            needed: The part of what that returned that is to be written.
        """
        perhaps = list(came)
        named: dict[Any, list[Held]] = {}
        for key, (rank, _one) in self._asked.items():
            self._ranks[key] = rank
            if self._rows.pop(key, None) is not None:
                named[key] = self._names.pop(key)
                perhaps += named[key]
        for row in needed:
            self._rows.setdefault(id_of(row), []).append((next(self._order), row))
        self._names |= {key: names for key, names in named.items() if key in self._rows}
        for one in came:
            for key in map(id_of, one.args[0]):
                if key in self._rows:
                    self._names.setdefault(key, []).append(one)
        return [one for one in dict.fromkeys(perhaps) if not self._wanted(one)]

    def _wanted(self, one: Held) -> bool:
        return any(id_of(entry) in self._rows for entry in one.args[0])

    def drop(self, gone: Sequence[Held]) -> None:
        """Forget the rows of messages that it holds no more; another message's take their place."""
        for key in {id_of(entry) for one in gone for entry in one.args[0]} & self._rows.keys():
            del self._rows[key]
            self._names[key] = names = [one for one in self._names[key] if one not in gone]
            latest: Held | None = None
            for one in names:
                if latest is None or one.rank.follows(latest.rank):
                    latest = one
            if latest is not None:
                rows = [entry for entry in latest.args[0] if id_of(entry) == key]
                self._rows[key] = [(next(self._order), row) for row in rows]

    def own(self, one: Held) -> list[Any]:
        """Return the ids of which a message's own rows are written."""
        return [
            id_of(entry)
            for entry in one.args[0]
            if any(row == entry for _, row in self._rows.get(id_of(entry), ()))
        ]
