"""Which of the tasks that share a budget starts next.

Each task's row says what its workers have found in its lanes. Urgent messages of any task go before
bulk ones of any; of the same kind, the task goes first whose last start is the oldest. So that a
stream of urgent messages stops no sweep, a bulk one begins after as many urgent starts as there are
tasks. A worker leaves the turn to those before it by taking it a little later, one place after the
other: so a task whose workers have died keeps nobody waiting.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

FRESH_SECONDS = 5  # for so long what a row says of its lanes counts
# More than the jitter by which workers of one task come apart, a tenth of the interval.
PLACE_SHARE = 1 / 8
LONGEST_PLACE_SECONDS = 1.1


class Want(NamedTuple):
    """What a task that shares a budget has waiting.

    Args:
        task: The task's name.
        urgent: Whether something waits in its urgent lane.
        bulk: Whether something waits in its bulk lane.
        age_us: Microseconds since its last start.
    """

    task: str
    urgent: bool
    bulk: bool
    age_us: int


class Order(NamedTuple):
    """In which order tasks start.

    Args:
        tasks: Those that want to, the first one first.
        bulk: Whether the next start begins with the bulk lane.
    """

    tasks: list[str]
    bulk: bool

    @classmethod
    def of(cls, wants: Sequence[Want], urgent_starts: int) -> Order:
        """Return the order.

        Args:
            wants: What each task that shares the budget wants.
            urgent_starts: How many starts in a row held nothing of a bulk lane.
        """
        bulk = urgent_starts >= len(wants) and any(one.bulk for one in wants)
        waiting = [one for one in wants if one.urgent or one.bulk]
        waiting.sort(
            key=lambda one: (not (one.bulk if bulk else one.urgent), -one.age_us, one.task)
        )
        return cls([one.task for one in waiting], bulk)

    def before(self, task: str) -> list[str]:
        """Return the tasks that go before one; all, if it is not known to want anything."""
        place = self.tasks.index(task) if task in self.tasks else len(self.tasks)
        return self.tasks[:place]


def place_seconds(interval: float) -> float:
    """Return how much later the turn is taken for each task that goes before."""
    return min(PLACE_SHARE * interval, LONGEST_PLACE_SECONDS)
