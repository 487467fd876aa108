"""A delivery's life, without servers."""

from __future__ import annotations

import asyncio
import logging
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest

from aioworker.addresses import DatabaseAddress
from aioworker.consumer import Consumer, Link, Terms
from aioworker.errors import BrokerError, DatabaseError
from aioworker.limits import Budget, Wait, WorkerBudget
from aioworker.mysql.database import Database
from aioworker.rabbitmq.delivery import Delivery
from aioworker.reasons import Reason, ReasonKind
from aioworker.settling.outcome import Kind
from aioworker.tasks.task import Task
from tests.fakes import Settleable, settleable

LINK = Link(Mock(), AsyncMock())
PAUSED = Reason(ReasonKind.PAUSED, "paused")
ADDRESS = DatabaseAddress.parse("mysql://nobody@127.0.0.1:1/none")


class Told(WorkerBudget):
    """A budget that is asked, and notes which messages' deaths it forgets."""

    def __init__(self, refusal: Wait | None) -> None:
        super().__init__(None)
        self.forgotten: list[str] = []
        self._refusal = refusal

    async def charge(self, _message: str) -> Wait | None:
        """Refuse, or let it begin."""
        return self._refusal

    async def ended(self, message: str) -> None:
        """Note it."""
        self.forgotten.append(message)


def make(function: Any, *, budget: Budget | None = None, presence: Any = None) -> Consumer:
    """Make a consumer of a task that uses no database."""
    return Consumer(
        Task("shop", function),
        Database(ADDRESS, connect_timeout=1, timeout=1),
        budget or WorkerBudget(None),
        presence or Mock(keeps_row=False),
        Terms(5, 30, 10, ""),
        "test",
    )


def message() -> Settleable:
    """Return a delivery without arguments."""
    headers: Any = {"id": "one", "task": "shop"}
    return settleable(b"[[], {}, null]", headers=headers)


async def nothing() -> None:
    """Do nothing."""


async def fail() -> None:
    raise KeyError("shop")


async def test_runs_that_fail_at_once_share_one_look_at_a_database_that_is_away() -> None:
    """Each would wait for its answer as long as that may take, one after the other."""
    looks = 0

    async def prove(_database: object) -> None:
        nonlocal looks
        looks += 1
        await asyncio.sleep(0)
        raise TimeoutError

    consumer = make(nothing, presence=Mock(keeps_row=True, prove=prove))

    found = await asyncio.gather(
        *(consumer.see_database() for _ in range(5)), return_exceptions=True
    )

    assert [type(away) for away in found] == [DatabaseError] * 5
    assert looks == 2, "one for the first, and one for the four that failed while it was on"
    with pytest.raises(DatabaseError):
        await consumer.see_database()
    assert looks == 3


@pytest.mark.parametrize(
    ("refusal", "outcome", "forgotten"),
    [(None, Kind.ACK, ["one"]), (Wait(PAUSED, 1), Kind.RELEASED, [])],
    ids=["it ran", "it did not begin"],
)
async def test_the_deaths_of_a_message_are_forgotten_once_it_ran(
    refusal: Wait | None, outcome: Kind, forgotten: list[str]
) -> None:
    budget = Told(refusal)
    consumer = make(nothing, budget=budget)

    assert (await consumer.serve(Delivery.of(message()), LINK)).kind is outcome

    assert budget.forgotten == forgotten


async def test_a_failure_that_could_not_be_settled_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, "aioworker")
    consumer = make(fail)
    lost = message()
    lost.refusal = ConnectionError("connection lost")

    with pytest.raises(BrokerError):
        await consumer.serve(Delivery.of(lost), LINK)

    [told] = [vars(record)["fields"]["reason"] for record in caplog.records]
    assert "connection lost" in told
    assert told.endswith("it came to: KeyError: 'shop'")
