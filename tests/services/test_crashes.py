"""Deaths are counted for what was running, and for nothing else."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from aioworker.addresses import DatabaseAddress
from aioworker.budget.deaths import MOST_DEATHS
from aioworker.budget.shared import SharedBudget
from aioworker.errors import DatabaseError, TurnLostError
from aioworker.limits import RateLimit
from aioworker.mysql.database import Database
from aioworker.mysql.session import SMALLEST_PACKET_BYTES
from aioworker.rabbitmq.delivery import KEY_LENGTH
from aioworker.settling.start import MOST_MESSAGES
from tests.conftest import TASK, database_name, execute, make_database, rows
from tests.services.test_budget import Fleet, make, row

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

    from support.servers import Servers

__all__ = ["make"]  # a fixture


def noted(shop: Connection[Cursor]) -> tuple[list[str], dict[str, int]]:
    """Return what is noted as running, and the deaths of what is not."""
    found = rows(shop, "SELECT message, worker, deaths FROM aioworker_run ORDER BY message")
    running = [message for message, worker, _deaths in found if worker is not None]
    return running, {message: deaths for message, worker, deaths in found if worker is None}


async def die(fleet: Fleet, shop: Connection[Cursor], *messages: str) -> None:
    """Charge a start for messages and vanish, as a killed process does."""
    execute(shop, "UPDATE aioworker_budget SET last_start = '2000-01-01'")
    budget = fleet()
    await budget.check()
    async with budget.turn() as wait:
        assert wait is None
        assert await budget.charge(messages) is None
        fleet.databases[-1].close()
        budget._deaths.void(messages)  # a dead process remembers nothing


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
    assert noted(shop) == ([], {"killer": 3, "other": 1})


async def test_a_message_that_ends_is_forgotten(make: Fleet, shop: Connection[Cursor]) -> None:
    """Whatever killed its workers before, it does not any more."""
    await die(make, shop, "killer")
    await die(make, shop, "other")
    survivor = make()
    await survivor.check()

    async with survivor.turn():
        await survivor.ended(["killer"])

    assert noted(shop) == ([], {"other": 1})


async def test_a_run_that_ends_leaves_no_note(make: Fleet, shop: Connection[Cursor]) -> None:
    budget = make()
    await budget.check()

    async with budget.turn():
        await budget.charge(["one"])
        during = noted(shop)
        await budget.ended(["one"])

    assert during == (["one"], {})
    assert noted(shop) == ([], {})


async def test_a_worker_that_loses_the_database_in_a_run_did_not_die(
    make: Fleet, shop: Connection[Cursor]
) -> None:
    budget = make()
    await budget.check()

    with pytest.raises(DatabaseError):
        async with budget.turn():
            await budget.charge(["one"])
            execute(shop, f"KILL {(await row(make.databases[0])).session}")
            await budget.ended(["one"])
            await budget.check()

    assert noted(shop) == ([], {})


async def test_the_smallest_packet_has_room_for_what_ran_in_the_fullest_start(
    make: Fleet, shop: Connection[Cursor]
) -> None:
    """Else the notes of a run that lost the database would stay, and hold each further start."""
    messages = [f"{number:0{KEY_LENGTH}}" for number in range(MOST_MESSAGES)]
    [[before]] = rows(shop, "SELECT @@GLOBAL.max_allowed_packet")
    execute(shop, f"SET GLOBAL max_allowed_packet = {SMALLEST_PACKET_BYTES}")
    try:
        budget = make()
        await budget.check()
        with pytest.raises(DatabaseError):
            async with budget.turn():
                await budget.charge(messages)
                execute(shop, f"KILL {(await row(make.databases[0])).session}")
                await budget.check()
    finally:
        execute(shop, f"SET GLOBAL max_allowed_packet = {before}")

    assert noted(shop) == ([], {})


async def test_a_death_that_was_none_is_taken_back(make: Fleet, shop: Connection[Cursor]) -> None:
    """Another worker had the turn before this one was back."""
    cut_off, other = make(), make()
    await cut_off.check()
    await other.check()

    with pytest.raises(DatabaseError):
        async with cut_off.turn():
            await cut_off.charge(["one"])
            execute(shop, f"KILL {(await row(make.databases[0])).session}")
            async with other.turn():
                counted = other.deaths("one")
            await cut_off.ended(["one"])
            await cut_off.check()
    assert (counted, noted(shop)) == (1, ([], {"one": 1}))
    async with cut_off.turn():
        counted = cut_off.deaths("one")

    assert (counted, noted(shop)) == (0, ([], {}))


async def test_what_ran_in_a_turn_that_was_lost_did_not_kill_its_worker(
    make: Fleet, shop: Connection[Cursor]
) -> None:
    budget = make()
    await budget.check()

    with pytest.raises(TurnLostError):
        async with budget.turn():
            await budget.charge(["one"])
            await make.databases[0].query("SELECT RELEASE_ALL_LOCKS()")
            await budget.ended(["one"])

    assert noted(shop) == ([], {})


async def test_a_worker_that_comes_back_first_finds_its_own_note(
    make: Fleet, shop: Connection[Cursor]
) -> None:
    """It could not take it back at once: the database was out of reach."""
    budget = make()
    await budget.check()
    async with budget.turn():
        await budget.charge(["one"])
        make.databases[0].close()
        execute(shop, "RENAME TABLE aioworker_run TO elsewhere")
    execute(shop, "RENAME TABLE elsewhere TO aioworker_run")
    assert noted(shop) == (["one"], {})

    async with budget.turn():
        assert budget.deaths("one") == 0

    assert noted(shop) == ([], {})


async def test_a_start_that_was_not_charged_notes_nothing(
    make: Fleet, shop: Connection[Cursor]
) -> None:
    budget = make()
    await budget.check()

    async with budget.turn() as wait:
        assert wait is None
        execute(shop, "UPDATE aioworker_budget SET paused = TRUE")
        refusal = await budget.charge(["one"])
        await budget.ended(["one"])

    assert refusal is not None
    assert noted(shop) == ([], {})


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


async def test_notes_of_messages_that_never_come_back_go(
    make: Fleet, shop: Connection[Cursor]
) -> None:
    """Purged ones leave their notes behind."""
    await die(make, shop, "purged")
    execute(shop, "UPDATE aioworker_run SET since = since - INTERVAL 8 DAY")
    await die(make, shop, "killer")
    survivor = make()
    await survivor.check()

    async with survivor.turn():
        assert survivor.deaths("killer") == 1

    assert noted(shop) == ([], {"killer": 1})


async def test_of_several_that_ran_none_is_counted_and_half_of_them_may_run_together(
    make: Fleet, shop: Connection[Cursor]
) -> None:
    """It is not known whose death it was."""
    await die(make, shop, *(str(number) for number in range(9)))
    survivor = make()
    await survivor.check()

    async with survivor.turn():
        told = [(survivor.deaths(str(one)), survivor.together(str(one))) for one in range(9)]
        assert survivor.together("another") is None
        await survivor.ended(["0", "1", "2"])

    assert told == [(0, 4)] * 9
    assert noted(shop) == ([], {str(number): 0 for number in range(3, 9)})


async def test_what_killed_its_worker_alone_runs_alone(
    make: Fleet, shop: Connection[Cursor]
) -> None:
    await die(make, shop, "one", "two")
    await die(make, shop, "one")
    survivor = make()
    await survivor.check()

    async with survivor.turn():
        assert (survivor.deaths("one"), survivor.together("one")) == (1, 1)
        assert (survivor.deaths("two"), survivor.together("two")) == (0, 1)


async def test_a_thousand_messages_are_noted_and_forgotten(
    make: Fleet, shop: Connection[Cursor]
) -> None:
    messages = [f"{number:064d}" for number in range(1000)]
    budget = make()
    await budget.check()

    async with budget.turn():
        await budget.charge(messages)
        during = noted(shop)
        await budget.ended(messages)

    assert during == (messages, {})
    assert noted(shop) == ([], {})


async def test_what_an_earlier_version_has_noted_counts_on(
    make: Fleet, shop: Connection[Cursor]
) -> None:
    """In the budget's row: it may work on beside this one."""
    old = {"running": ["ran"], "deaths": {"ran": 2, "waits": 1}}
    for column, value in old.items():
        execute(shop, f"UPDATE aioworker_budget SET {column} = '{json.dumps(value)}'")
    budget = make()
    await budget.check()

    async with budget.turn():
        assert (budget.deaths("ran"), budget.deaths("waits")) == (3, 1)

    assert noted(shop) == ([], {"ran": 3, "waits": 1})
    assert rows(shop, "SELECT running, deaths FROM aioworker_budget") == [(None, None)]


async def test_what_is_read_is_noted_so_long(make: Fleet, shop: Connection[Cursor]) -> None:
    """A pause, a stop or a lost host behind the read counts as no death."""
    budget = make()
    await budget.check()

    async with budget.turn():
        async with budget.reading("one"):
            during = noted(shop)
        behind = noted(shop)
        execute(shop, "UPDATE aioworker_budget SET paused = TRUE")
        assert await budget.charge(["one"]) is not None

    assert (during, behind, noted(shop)) == ((["one"], {}), ([], {}), ([], {}))


async def test_what_is_taken_back_keeps_the_deaths_before(
    make: Fleet, shop: Connection[Cursor]
) -> None:
    await die(make, shop, "killer")
    budget = make()
    await budget.check()

    async with budget.turn():
        async with budget.reading("killer"):
            during = noted(shop)
        assert budget.deaths("killer") == 1

    assert (during, noted(shop)) == ((["killer"], {}), ([], {"killer": 1}))


async def test_counts_that_no_version_wrote_are_bounded(
    make: Fleet, shop: Connection[Cursor]
) -> None:
    odd = json.dumps({"many": 70_000, "few": -1, "\u6ce8": 1, "x" * 65: 1})
    execute(shop, f"UPDATE aioworker_budget SET deaths = '{odd}'")
    budget = make()
    await budget.check()

    async with budget.turn():
        assert (budget.deaths("many"), budget.deaths("few")) == (MOST_DEATHS, 0)


@pytest.mark.parametrize("missing", ["INSERT", "UPDATE", "DELETE"])
async def test_who_may_not_note_what_runs_starts_nothing(
    make: Fleet, shop: Connection[Cursor], pair: Servers, missing: str
) -> None:
    """A charge that could not be noted would be one start after the other, for nothing."""
    rights = ", ".join({"SELECT", "INSERT", "UPDATE", "DELETE"} - {missing})
    database = database_name(pair)
    execute(
        shop,
        "DROP USER IF EXISTS noter@'127.0.0.1'",
        "CREATE USER noter@'127.0.0.1'",
        f"GRANT SELECT, UPDATE ON {database}.aioworker_budget TO noter@'127.0.0.1'",
        f"GRANT {rights} ON {database}.aioworker_run TO noter@'127.0.0.1'",
    )
    url = pair.mysql_url.replace("root@", "noter@")
    address = DatabaseAddress.parse(url)
    async with Database(address, connect_timeout=10, timeout=10) as mine:
        budget = SharedBudget(mine, TASK, RateLimit.parse("2/m"), "here:1")
        with pytest.raises(DatabaseError, match="denied"):
            await budget.check()

    assert rows(shop, "SELECT starts FROM aioworker_budget") == [(0,)]
