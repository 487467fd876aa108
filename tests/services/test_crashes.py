"""Deaths are counted for what was running, and for nothing else."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from aioworker.errors import DatabaseError
from tests.conftest import TASK, execute, make_database, rows
from tests.services.test_budget import Fleet, make, row

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

    from support.servers import Servers

__all__ = ["make"]  # a fixture


def noted(shop: Connection[Cursor]) -> tuple[str | None, str | None]:
    """Return what the row notes as running, and the deaths it counted."""
    [found] = rows(shop, "SELECT running, deaths FROM aioworker_budget")
    return found[0], found[1]


async def die(fleet: Fleet, shop: Connection[Cursor], message: str) -> None:
    """Charge a start for a message and vanish, as a killed process does."""
    execute(shop, "UPDATE aioworker_budget SET last_start = '2000-01-01'")
    budget = fleet()
    await budget.check()
    async with budget.turn() as wait:
        assert wait is None
        assert await budget.charge(message) is None
        fleet.databases[-1].close()
        budget._deaths.void()  # a dead process remembers nothing


async def test_what_ran_when_its_worker_died_is_counted_by_the_next(
    make: Fleet, shop: Connection[Cursor]
) -> None:
    for _ in range(3):
        await die(make, shop, "killer")
    await die(make, shop, "other")
    survivor = make()
    await survivor.check()

    async with survivor.turn():
        counted = {key: survivor.deaths(key) for key in ("killer", "other", "held")}

    assert counted == {"killer": 3, "other": 1, "held": 0}
    assert noted(shop)[0] is None


async def test_a_message_that_ends_is_forgotten(make: Fleet, shop: Connection[Cursor]) -> None:
    """Whatever killed its workers before, it does not any more."""
    await die(make, shop, "killer")
    await die(make, shop, "other")
    survivor = make()
    await survivor.check()

    async with survivor.turn():
        await survivor.ended("killer")

    assert noted(shop) == (None, json.dumps({"other": 1}))


async def test_a_run_that_ends_leaves_no_note(make: Fleet, shop: Connection[Cursor]) -> None:
    budget = make()
    await budget.check()

    async with budget.turn():
        await budget.charge("one")
        during = noted(shop)
        await budget.ended("one")

    assert during == (json.dumps(["one"]), None)
    assert noted(shop) == (None, None)


async def test_a_worker_that_loses_the_database_in_a_run_did_not_die(
    make: Fleet, shop: Connection[Cursor]
) -> None:
    budget = make()
    await budget.check()

    with pytest.raises(DatabaseError):
        async with budget.turn():
            await budget.charge("one")
            execute(shop, f"KILL {(await row(make.databases[0])).session}")
            await budget.ended("one")
            await budget.check()

    assert noted(shop) == (None, None)


async def test_a_death_that_was_none_is_taken_back(make: Fleet, shop: Connection[Cursor]) -> None:
    """Another worker had the turn before this one was back."""
    cut_off, other = make(), make()
    await cut_off.check()
    await other.check()

    with pytest.raises(DatabaseError):
        async with cut_off.turn():
            await cut_off.charge("one")
            execute(shop, f"KILL {(await row(make.databases[0])).session}")
            async with other.turn():
                counted = other.deaths("one")
            await cut_off.ended("one")
            await cut_off.check()
    assert (counted, noted(shop)) == (1, (None, json.dumps({"one": 1})))
    async with cut_off.turn():
        counted = cut_off.deaths("one")

    assert (counted, noted(shop)) == (0, (None, None))


async def test_a_worker_that_comes_back_first_finds_its_own_note(
    make: Fleet, shop: Connection[Cursor]
) -> None:
    """It could not take it back at once: the database was out of reach."""
    budget = make()
    await budget.check()
    async with budget.turn():
        await budget.charge("one")
        make.databases[0].close()
        execute(shop, "RENAME TABLE aioworker_budget TO elsewhere")
    execute(shop, "RENAME TABLE elsewhere TO aioworker_budget")
    assert noted(shop) == (json.dumps(["one"]), None)

    async with budget.turn():
        assert budget.deaths("one") == 0

    assert noted(shop) == (None, None)


async def test_a_start_that_was_not_charged_notes_nothing(
    make: Fleet, shop: Connection[Cursor]
) -> None:
    budget = make()
    await budget.check()

    async with budget.turn() as wait:
        assert wait is None
        execute(shop, "UPDATE aioworker_budget SET paused = TRUE")
        refusal = await budget.charge("one")
        await budget.ended("one")

    assert refusal is not None
    assert noted(shop) == (None, None)


async def test_notes_that_somebody_wrote_over_are_no_deaths(
    make: Fleet, shop: Connection[Cursor], pair: Servers
) -> None:
    for text in ("nonsense", '{"a": 1}', '[1, "two"]', "[]", '{"one": "x"}'):
        execute(shop, f"UPDATE aioworker_budget SET running = '{text}', deaths = '{text}'")
        database = make_database(pair)
        found = await row(database)
        database.close()
        assert set(found.running) <= {"two"}
        assert set(found.deaths) <= {"a"}
    budget = make()
    await budget.check()

    async with budget.turn():
        assert budget.deaths("one") == 0


async def test_the_row_stays_small(make: Fleet, shop: Connection[Cursor]) -> None:
    """Messages that never come back, purged ones, leave their counts behind."""
    old = json.dumps({f"message {number}": 1 for number in range(1000)})
    execute(shop, f"UPDATE aioworker_budget SET deaths = '{old}' WHERE task = '{TASK}'")
    await die(make, shop, "killer")
    survivor = make()
    await survivor.check()

    async with survivor.turn():
        assert survivor.deaths("killer") == 1

    assert len(json.loads(noted(shop)[1] or "")) == 100
    assert "killer" in str(noted(shop)[1])
