"""What the messages of a start ask for together, and what of it is to be written.

`Ids` has each id once. `Rows` has of two rows of one id the later one.
"""

from __future__ import annotations

from itertools import chain, count
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime

    from aioworker.settling.start import Held

MOST_RANKS = 50_000  # some 7 MB

_first = itemgetter(0)


class Ids:
    """Ids, each once.

    Attributes:
        full: Whether it has no memory for more.
    """

    full = False  # of ids that need no write nothing is kept

    def __init__(self) -> None:
        self._needed: dict[Any, None] = {}
        self._asked: dict[Any, None] = {}

    def __len__(self) -> int:
        """Return how many ids are to be written."""
        return len(self._needed)

    @property
    def chunk(self) -> list[Any]:
        """What is to be written, in the order in which it was asked for."""
        return list(self._needed)

    def ask(self, came: Sequence[Held]) -> list[Any]:
        """Return what of these messages may have to be written, and is not known to be yet."""
        # What was right, or wrong, when it was read may have changed since: all are asked for.
        self._asked = dict.fromkeys(chain.from_iterable(one.args[0] for one in came))
        return list(self._asked)

    def need(self, needed: Iterable[Any]) -> None:
        """Note what of that which `ask` returned is to be written."""
        for known in self._needed.keys() & self._asked.keys():
            del self._needed[known]
        self._needed.update(dict.fromkeys(needed))

    def part_of(self, one: Held) -> list[Any]:
        """Return what of a message is to be written: nothing else of it is asked any more."""
        return [known for known in one.args[0] if known in self._needed]

    def wants(self, one: Held) -> bool:
        """Whether an id is to be written that a message names."""
        return not self._needed.keys().isdisjoint(one.args[0])

    def own(self, one: Held) -> list[Any]:
        """Return the ids of which a message's own rows are written."""
        return self.part_of(one)

    def drop(self, gone: Sequence[Held], left: Sequence[Held]) -> None:
        """Forget what messages asked for, but for what those that are left ask for, too."""
        named = set().union(*(one.args[0] for one in left))
        for known in set().union(*(one.args[0] for one in gone)) - named:
            self._needed.pop(known, None)


class Rank(NamedTuple):
    """When a message's rows were meant: those of the later one replace the others'.

    Args:
        published: When it was published; None if that is not known.
        lane: `urgent` or `bulk`.
    """

    published: datetime | None
    lane: str

    @classmethod
    def of(cls, one: Held) -> Rank:
        """Return a message's rank."""
        return cls(one.delivery.published, one.delivery.lane)

    def follows(self, other: Rank) -> bool:
        """Whether it is later than another one, which was taken before it."""
        if self.published and other.published and self.published != other.published:
            return self.published > other.published
        return self.lane == other.lane or self.lane == "urgent"


class Rows:
    """Rows, which begin with an id: of those of one id the later message's; as `Ids` otherwise."""

    def __init__(self) -> None:
        # By id; each row with its place, as there may be several of one id in a message.
        self._needed: dict[Any, list[tuple[int, Any]]] = {}
        self._place = count()
        self._asked: dict[Any, tuple[Rank, Held]] = {}
        self._ranks: dict[Any, Rank] = {}  # of what was asked last, needed or not

    @property
    def full(self) -> bool:
        """Whether it has no memory for more."""
        return len(self._ranks) >= MOST_RANKS

    def __len__(self) -> int:
        """Return how many ids are to be written."""
        return len(self._needed)

    @property
    def chunk(self) -> list[Any]:
        """What is to be written, in the order in which it was asked for."""
        return [row for _, row in sorted(chain.from_iterable(self._needed.values()), key=_first)]

    def ask(self, came: Sequence[Held]) -> list[Any]:
        """Return what of these messages may have to be written, and is not known to be yet."""
        self._asked = {}
        for one in came:
            rank = Rank.of(one)
            for row in one.args[0]:
                before, _by = self._asked.get(row[0], (self._ranks.get(row[0]), None))
                if before is None or rank.follows(before):
                    self._asked[row[0]] = rank, one
        asks = {known: one for known, (_, one) in self._asked.items()}
        return [row for one in came for row in one.args[0] if asks.get(row[0]) is one]

    def need(self, needed: Iterable[Any]) -> None:
        """Note what of that which `ask` returned is to be written."""
        for known, (rank, _one) in self._asked.items():
            self._ranks[known] = rank
            self._needed.pop(known, None)
        for row in needed:
            self._needed.setdefault(row[0], []).append((next(self._place), row))
        self._asked = {}  # it holds the messages, with their text

    def part_of(self, one: Held) -> list[Any]:
        """Return the rows of a message whose ids are to be written, by it or by a later one."""
        return [row for row in one.args[0] if row[0] in self._needed]

    def wants(self, one: Held) -> bool:
        """Whether an id is to be written that a message names."""
        return any(row[0] in self._needed for row in one.args[0])

    def own(self, one: Held) -> list[Any]:
        """Return the ids of which a message's own rows are written."""
        return [
            row[0]
            for row in one.args[0]
            if any(row == needed for _, needed in self._needed.get(row[0], ()))
        ]

    def drop(self, gone: Sequence[Held], left: Sequence[Held]) -> None:
        """Forget what messages asked for, but for what those that are left ask for, too."""
        dropped = {row[0] for one in gone for row in one.args[0]} & self._needed.keys()
        latest: dict[Any, Held] = {}
        for one in left:
            for known in dropped.intersection(row[0] for row in one.args[0]):
                if known not in latest or Rank.of(one).follows(Rank.of(latest[known])):
                    latest[known] = one
        for known in dropped:
            del self._needed[known]
        for known, one in latest.items():
            rows = [row for row in one.args[0] if row[0] == known]
            self._needed[known] = [(next(self._place), row) for row in rows]
