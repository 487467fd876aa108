"""How messages are settled: copied if their outcome asks for it, then acknowledged; or given back.

Each is settled once. A copy is confirmed before its original is acknowledged.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from aioworker.errors import BrokerError, let_go
from aioworker.limits import End
from aioworker.rabbitmq import copies
from aioworker.settling.outcome import Kind, Outcome

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aioworker.limits import TaskBudget
    from aioworker.rabbitmq.delivery import Delivery
    from aioworker.rabbitmq.lanes import Lanes
    from aioworker.settling.ended_runs import EndedRuns
    from aioworker.settling.report import Report
    from aioworker.settling.start import Held, Start
    from aioworker.settling.taken import Taken

MOST_CHANGED = 2**32 - 1  # rows, as the start's row can tell
MOST_RETURNS = 10  # to its lane, before a message is moved: RabbitMQ sets it aside at a hundred


class Settler:
    """Settles the messages of one task's starts.

    Args:
        budget: Notes what ended.
        report: Logs each.
        ends: Remembers what could not be acknowledged.
        worker: This worker's name, in dead letters.
        taken: Knows how far the lanes are emptied.

    Attributes:
        settled: How many messages came to each kind of outcome.
        failures: How many were not done since something went wrong.
    """

    def __init__(
        self, budget: TaskBudget, report: Report, ends: EndedRuns, worker: str, taken: Taken
    ) -> None:
        self.settled: Counter[Kind] = Counter()
        self.failures = 0
        self._budget = budget
        self._report = report
        self._ends = ends
        self._worker = worker
        self._taken = taken

    async def settle(self, start: Start, held: Sequence[Held], lanes: Lanes) -> Outcome | None:
        """Settle messages, whose outcomes are decided.

        Returns:
            What the last of them came to; one that asks somebody to look why goes before the
            others. None without any.

        Raises:
            BrokerError: The connection is lost; RabbitMQ will deliver the message again.
        """
        if not held:
            return None
        try:
            lost = await self._each(start, held, lanes)
        finally:
            # The deaths of one that did not even run are not forgotten before it is settled.
            if over := [one.delivery.key for one in held if start.began or one.gone]:
                await self._budget.ended(over, _end(start) if start.began else None)
        settled = [one for one in held if one.settled]
        self._report.settled(start, settled)
        start.let_go()
        self._taken.settled(start, held, self._budget.now())
        for one in settled:
            let_go(one.outcome.away)  # its frames hold the message
            self.settled[one.outcome.kind] += 1
            self.failures += one.outcome.failed
        if lost is not None:
            raise lost
        outcomes = [one.outcome for one in reversed(settled)]
        return next((one for one in outcomes if one.uncounted), outcomes[0])

    async def _each(self, start: Start, held: Sequence[Held], lanes: Lanes) -> BrokerError | None:
        """Settle in steps, in their order; return why one could not be settled, None if all are.

        Behind one that could not be, nothing is asked of RabbitMQ: it delivers all of them again.
        """
        refusal: BrokerError | None = None
        lost: BrokerError | None = None
        for several in _steps(held):
            one = several[-1]
            if lost is not None:
                self._leave(start, several, lost, over=one.outcome.kind is Kind.ACK)
                continue
            if len(held) > 1:  # the watchdog hears of each step; for one it has patience
                start.may_take(one.delivery.timeout)
            refusal = await self._copy(one, lanes, refusal)
            # RabbitMQ delivers first what was given back first.
            lost = await self._answer(start, several)
        return lost

    async def _copy(
        self, one: Held, lanes: Lanes, refusal: BrokerError | None
    ) -> BrokerError | None:
        """Publish the copy that an outcome asks for, and wait until it is confirmed.

        If it is not, the original goes back to where it was, and so do those behind it: no other
        copy is tried.

        Args:
            one: The message.
            lanes: Where its copy goes.
            refusal: Why a copy was not confirmed before; None if none was refused.

        Returns:
            That, or why this one was not.
        """
        delivery, outcome = one.delivery, one.outcome
        if outcome.kind is Kind.RELEASED and delivery.returns >= MOST_RETURNS:
            outcome = one.outcome = replace(outcome, kind=Kind.MOVED)
        # What ran before was copied then.
        if one.again or outcome.kind in (Kind.ACK, Kind.RELEASED):
            return refusal
        if refusal is None:
            try:
                await self._publish_copy(delivery, outcome, lanes)
            except BrokerError as error:
                refusal = error
            else:
                return None
        reason = f"copy not confirmed: {refusal}; it is to be copied because of: {outcome.reason}"
        one.outcome = Outcome(Kind.RELEASED, reason, outcome.failure, refusal)
        return refusal

    async def _publish_copy(self, delivery: Delivery, outcome: Outcome, lanes: Lanes) -> None:
        now, failure = self._budget.now(), outcome.failure
        if outcome.kind is Kind.DEAD_LETTER:
            name, lines = ("", "") if failure is None else (failure.name, failure.traceback)
            await lanes.set_aside(
                copies.dead_letter(delivery, outcome.reason, name, lines, self._worker, now)
            )
        elif outcome.kind is Kind.MOVED:
            await lanes.put_behind(delivery.lane, copies.moved(delivery, outcome.together))
        else:
            await lanes.put_off(
                copies.retry(
                    delivery,
                    outcome.reason,
                    now if outcome.failed else None,
                    counts=outcome.kind is Kind.RETRY,
                    lost=failure is not None and failure.lost,
                )
            )

    async def _answer(self, start: Start, several: Sequence[Held]) -> BrokerError | None:
        """Give a message back, or acknowledge it, or several; return why that could not be done."""
        last = several[-1]
        try:
            if last.outcome.kind is Kind.RELEASED:
                await last.delivery.give_back()
            else:
                await last.delivery.acknowledge(with_earlier=len(several) > 1)
        except BrokerError as error:
            self._leave(start, several, error, over=True)
            return error
        for one in several:
            one.settled = True
        return None

    def _leave(
        self, start: Start, several: Sequence[Held], error: BrokerError, *, over: bool
    ) -> None:
        """Leave messages to RabbitMQ; what is over but for its answer is remembered."""
        for one in several:
            if over:
                self._ends.remember(one.delivery, one.outcome)
            self._report.unsettled(start, one, error)


def _end(start: Start) -> End:
    """Return what a start came to that ran."""
    kinds = {one.outcome.kind for one in start.runs}
    changed = start.ctx.counts.get("changed") if start.ctx is not None else None
    counted = type(changed) is int and 0 <= changed <= MOST_CHANGED  # by a user's code
    return End(kinds.pop() if len(kinds) == 1 else "mixed", changed if counted else None)


def _steps(held: Sequence[Held]) -> list[list[Held]]:
    """Return which messages RabbitMQ is answered about in one step each.

    If all are done, one acknowledgement is for all that came over a channel, unless RabbitMQ waits
    for an answer to another message that came before the last of them.
    """
    if len(held) == 1 or any(one.outcome.kind is not Kind.ACK for one in held):
        return [[one] for one in held]
    channels: dict[int, list[Held]] = {}
    for one in held:
        channels.setdefault(id(one.delivery.answers), []).append(one)
    steps: list[list[Held]] = []
    for several in channels.values():
        several.sort(key=lambda one: one.delivery.tag)
        reach = several[0].delivery.answers.reach({one.delivery.tag for one in several})
        alone = reach >= several[-1].delivery.tag
        steps += [several] if alone else [[one] for one in several]
    return steps
