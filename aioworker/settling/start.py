"""A delivery on its way to a start, and what that came to."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aioworker.settling.outcome import UNDECIDED, Outcome
from aioworker.tasks.context import Context

if TYPE_CHECKING:
    from aioworker.rabbitmq.delivery import Delivery
    from aioworker.settling.failure import Failure


@dataclass(slots=True)
class Start:
    """What every step of a delivery's life takes and returns.

    Times are the monotonic clock's; 0 is for what has not happened.

    Args:
        delivery: The delivery.
        ctx: What its run gets.
        args: The positional arguments as the task's function gets them, once they are checked.
        kwargs: Its keyword arguments, likewise.
        limit: Ends the run when its time is up. It counts from when the message is decoded.
        seconds: How long the run may take.
        taken: When the delivery was taken.
        began: When its run began.
        ended: When that ended.
        cut_off: Whether it ended because its time was up.
        again: Whether the run had ended before, and could not be settled then.
        failure: What went wrong, if something did.
        outcome: What the delivery comes to.
    """

    delivery: Delivery
    ctx: Context
    args: list[Any] = field(default_factory=list)
    kwargs: dict[str, Any] = field(default_factory=dict)
    limit: asyncio.Timeout = field(default_factory=lambda: asyncio.Timeout(None))
    seconds: float = 0.0
    taken: float = field(default_factory=time.monotonic)
    began: float = 0.0
    ended: float = 0.0
    cut_off: bool = False
    again: bool = False
    failure: Failure | None = None
    outcome: Outcome = UNDECIDED

    def may_take(self, seconds: float) -> None:
        """Let the run take so long from now on."""
        self.seconds = seconds
        self.limit.reschedule(asyncio.get_running_loop().time() + seconds)
