"""What the budget promises, held against whatever workers, servers and operators do."""

from __future__ import annotations

import asyncio
import inspect
import textwrap
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from aioworker.budget import first_write, run_time, schema, shared, tables
from aioworker.budget.first_write import FirstWrite
from aioworker.budget.pace import Pace
from aioworker.budget.shared import SharedBudget
from aioworker.mysql.database import Database
from support import servers
from tests.conftest import execute
from tests.services.budget_model import (
    HOUR,
    KEY,
    LEFT,
    MINUTE,
    NAME,
    RIGHT,
    SECOND,
    TABLES,
    TASKS,
    Step,
    ViolationError,
    World,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import ModuleType

    from pymysql.connections import Connection
    from pymysql.cursors import Cursor


@pytest.fixture(scope="module")
def model_site(pair: servers.Servers) -> Iterator[Connection[Cursor]]:
    """The budget's tables, kept over all examples."""
    connection = servers.connect(pair.mysql_url, create=True)
    execute(connection, *schema.STATEMENTS.values(), *TABLES)
    connection.autocommit(True)
    yield connection
    connection.close()


class Played(NamedTuple):
    """What became of a world.

    Args:
        violated: What was violated, in words; empty if nothing was.
        kept: Whether the rate was kept, by what the audit tells of each row.
    """

    violated: str
    kept: dict[str, bool]


def play(pair: servers.Servers, shop: Connection[Cursor], steps: Sequence[Step]) -> Played:
    """Take steps in a world of their own."""

    async def played() -> Played:
        violated = ""
        with pytest.MonkeyPatch.context() as patch:
            world = World(pair, shop, patch)
            try:
                await world.play(steps)
            except ViolationError as error:
                violated = str(error)
        return Played(violated, world.kept)

    return asyncio.run(played())


def steps(name: str, *arguments: st.SearchStrategy[object]) -> st.SearchStrategy[Step]:
    """Return a strategy for one kind of step."""
    return st.tuples(st.just(name), *arguments)


worker = st.sampled_from(list(TASKS))
row = st.sampled_from([LEFT, RIGHT, KEY])
lasts = st.sampled_from([None, 10 * MINUTE, 2 * HOUR])
going = steps("go", worker, st.integers(1, 3))
reaching = steps("reach", worker, st.sampled_from(["charge", "write", "commit", "look"]))
step = st.one_of(
    *[going] * 4,
    *[reaching] * 6,
    steps("nearly", row, st.sampled_from([-3 * SECOND, -SECOND // 10, 0, SECOND])),
    steps("elapse", st.sampled_from([SECOND, 10 * MINUTE, 29 * MINUTE, 31 * MINUTE, 61 * MINUTE])),
    steps("crash", worker),
    steps("crash_in_charge", worker, st.integers(0, 9)),
    steps("pause_in_charge", worker, st.integers(0, 9), row),
    steps("crash_in_commit", worker, st.booleans()),
    steps("cut", worker),
    steps("lose", worker, row),
    steps("step_clock", st.sampled_from([-2 * HOUR, -MINUTE, MINUTE, 2 * HOUR])),
    steps("pause", row, lasts),
    steps("resume", row),
    steps("rate", row, st.sampled_from([None, 0, MINUTE, 45 * MINUTE, 3 * HOUR]), lasts),
    steps("deploy", st.sampled_from(["a1", "a2"]), st.sampled_from([None, NAME])),
    steps("unseen", worker),
    steps("elsewhere", row),
)


OTHER_CLOCKS = {"step_clock", "elsewhere"}  # of which an audit knows nothing


@settings(
    max_examples=80,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(step, min_size=5, max_size=30))
def test_the_promises_hold_whatever_happens(
    pair: servers.Servers, model_site: Connection[Cursor], steps: list[Step]
) -> None:
    played = play(pair, model_site, steps)

    assert not played.violated
    if not {name for name, *_ in steps} & OTHER_CLOCKS:
        assert all(played.kept.values()), played


class Change(NamedTuple):
    """What is left out: a part of a constant of SQL, or of a method.

    Args:
        owner: The module or the class.
        name: The constant, or the method.
        old: The part; it has to be there.
        new: What stands there instead.
    """

    owner: ModuleType | type
    name: str
    old: str
    new: str = ""

    def make(self, patch: pytest.MonkeyPatch) -> None:
        """Leave it out, until the patch is undone."""
        found = getattr(self.owner, self.name)
        made: Any
        if isinstance(found, str):
            made = self._replaced(found)
        elif isinstance(found, tuple):
            self._replaced("".join(found))
            made = tuple(one.replace(self.old, self.new) for one in found)
        else:
            method = inspect.unwrap(found)
            source = self._replaced(textwrap.dedent(inspect.getsource(method)))
            made = {}
            exec(source, method.__globals__, made)  # inherits the future import of this module
            made = made[self.name]
        patch.setattr(self.owner, self.name, made)

    def _replaced(self, text: str) -> str:
        assert self.old in text, f"{self.name} has no {self.old!r} any more"
        return text.replace(self.old, self.new)


class Guard(NamedTuple):
    """A guard, and what goes wrong without it.

    Args:
        name: What it is.
        changes: What leaves it out.
        steps: What a world stands with it, and does not without it.
        breaks: What is violated then, or a part of it.
        audited: Whether the audit sees it, if it is about a rate. It goes by the rate that the row
            says, and by the starts that this server has noted.
    """

    name: str
    changes: list[Change]
    steps: list[Step]
    breaks: str
    audited: bool = True


def run(name: str) -> list[Step]:
    """Return the steps of a whole run that is due."""
    return [("to", name, "give back"), ("go", name)]


def unlocked(where: str, condition: str) -> Change:
    """Leave out in a statement that some of the locks are held."""
    owner = shared if where == "_CHARGING" else first_write
    return Change(owner, where, tables.MINE, f"({condition} OR {tables.MINE})")


def in_charge(old: str, new: str = "") -> Change:
    """Leave out a part of the charge."""
    return Change(shared, "_CHARGING", old, new)


GO = ("go", "a1")
SLOWER = [
    *(("to", "b", "write"), ("elapse", 10 * MINUTE), *run("b")),
    *(("nearly", KEY, -4 * MINUTE), ("to", "b", "charge"), ("rate", KEY, 35 * MINUTE)),
    *run("b"),
]
BESIDE_PAUSED = [("rate", KEY, 0), ("to", "a1", "charge"), ("pause", KEY), GO]
BESIDE_LIMITED = [("rate", KEY, 0), ("to", "a1", "charge"), ("rate", KEY, HOUR), GO]
ONE_MOMENT = (
    "last_charge = @aioworker_now",
    f"last_charge = @aioworker_now - INTERVAL IF({tables.IS_SHARED}, 5, 0) MICROSECOND",
)
IS_OWN, IS_SHARED = f"NOT ({tables.IS_SHARED})", tables.IS_SHARED
DUE = f"AND {shared._DUE} <= SYSDATE(6)"
BEFORE_CHARGE = len(shared._UNTIL_DUE) + shared._CHARGING.index(shared._CHARGE)
PAUSED = [("to", "a1", "charge"), ("pause", KEY), GO]
STAMPED = "last_write = @aioworker_now - INTERVAL %(passed_us)s MICROSECOND"
LATE_WRITE = [("to", "b", "write"), ("elapse", 29 * MINUTE), *run("b"), ("elapse", 2 * MINUTE)]
LATE_OWN_WRITE = [
    ("rate", KEY, MINUTE),
    ("to", "a1", "write"),
    ("elapse", 59 * MINUTE),
    *run("a1"),
    ("elapse", 2 * MINUTE),
]
SECOND_LOCK = Change(
    tables,
    "_TAKE_BOTH",
    "COALESCE(GET_LOCK(%(shared_lock)s, %(patience)s), 0)",
    "1",
)
SEEN = in_charge(f"AND {shared._GAP_US} <= IF({tables.IS_SHARED}, %(shared_seen)s, %(seen)s)")
NO_LIMIT_BESIDE = in_charge(f"OR COALESCE({tables.GAP_US}, %(shared_gap)s, 0) > 0")
GUARDS = [
    Guard(
        "all rows have to let a start begin",
        [in_charge("%(rows)s = (SELECT COUNT(*)", "0 < (SELECT COUNT(*)")],
        PAUSED,
        "is paused",
    ),
    Guard("no pause", [in_charge("AND NOT paused")], PAUSED, "is paused"),
    Guard(
        "the rows are of this server",
        [in_charge(f"AND server = {tables.SERVER}")],
        [*run("a1"), ("elapse", 2 * HOUR), ("to", "a1", "charge"), ("elsewhere", KEY), GO],
        f"charges of {KEY}",
        audited=False,
    ),
    Guard(
        "the task's lock is held",
        [unlocked("_CHARGING", IS_OWN)],
        [("to", "a1", "charge"), ("lose", "a1", LEFT), GO],
        "lost its turn starts nothing",
    ),
    Guard(
        "the budget's lock is held",
        [unlocked("_CHARGING", IS_SHARED)],
        [("to", "a1", "charge"), ("lose", "a1", KEY), GO],
        "lost its turn starts nothing",
    ),
    Guard(
        "the row shares what the code says",
        [in_charge(f"AND ({tables.IS_SHARED} OR shares <=> %(shares)s)")],
        [("to", "a1", "charge"), ("deploy", "a2", None), ("unseen", "a1"), ("go", "a2"), GO],
        "goes by what its row shares",
    ),
    Guard(
        "an interval that is longer by now is looked at again",
        [SEEN],
        SLOWER,
        f"first writes of {KEY}",
    ),
    Guard(
        "no pause of a budget whose turn is not needed",
        [in_charge("paused OR COALESCE", "COALESCE")],
        BESIDE_PAUSED,
        "is paused",
    ),
    Guard(
        "no limit of a budget whose turn is not needed",
        [NO_LIMIT_BESIDE],
        BESIDE_LIMITED,
        "all rows are charged",
    ),
    Guard(
        "all rows are charged at one moment",
        [Change(shared, "_CHARGE", *ONE_MOMENT), in_charge(*ONE_MOMENT)],
        run("a1"),
        "at one moment",
    ),
    Guard(
        "the charge is one transaction",
        [in_charge("START TRANSACTION", "DO 0"), in_charge("COMMIT", "DO 0")],
        [("to", "a1", "charge"), ("crash_in_charge", "a1", BEFORE_CHARGE + 1)],
        "each charge has its row",
    ),
    Guard(
        "only who may is charged",
        [
            Change(shared, "_CHARGE", " AND @aioworker_charged"),
            in_charge(f"{tables.ROWS} AND @aioworker_charged", tables.ROWS),
        ],
        PAUSED,
        "is paused",
    ),
    Guard(
        "only who was charged is noted",
        [in_charge("WHERE task = %(task)s AND @aioworker_charged", "WHERE task = %(task)s")],
        [*run("a1"), ("elapse", 2 * HOUR), *PAUSED],
        "each charge has its row",
    ),
    Guard(
        "who was not charged does not run",
        [
            Change(
                SharedBudget,
                "charge",
                "if not answers[len(_UNTIL_DUE) + _CHARGING.index(_CHARGE)].matched:",
                "if False:",
            )
        ],
        PAUSED,
        "who runs was charged",
    ),
    Guard("the second lock is taken", [SECOND_LOCK], [], "can start"),
    Guard(
        "the second lock is taken, and held",
        [SECOND_LOCK, unlocked("_CHARGING", IS_SHARED)],
        [("to", "a1", "write"), ("nearly", KEY, 0), *[("go", "b")] * 3],
        "no run beside",
    ),
    Guard(
        "the first lock is given back without the second",
        [
            Change(
                tables,
                "_TAKE_BOTH",
                "RELEASE_LOCK(%(lock)s)",
                "0",
            )
        ],
        [("to", "b", "write"), ("elapse", HOUR), GO, GO],
        "a2 can start",
    ),
    Guard(
        "a first write is noted",
        [Change(first_write, "_STAMP", STAMPED, "last_write = last_write")],
        [*LATE_WRITE, *[GO] * 5],
        f"first writes of {KEY}",
    ),
    Guard(
        "a first write is noted in the budget's row",
        [
            Change(
                first_write,
                "_STAMP",
                STAMPED,
                f"last_write = IF({IS_SHARED}, last_write, {STAMPED.partition(' = ')[2]})",
            )
        ],
        [*LATE_WRITE, *[GO] * 5],
        f"first writes of {KEY}",
    ),
    Guard(
        "a first write is noted in the task's row",
        [
            Change(
                first_write,
                "_STAMP",
                STAMPED,
                f"last_write = IF({IS_OWN}, last_write, {STAMPED.partition(' = ')[2]})",
            )
        ],
        [*LATE_OWN_WRITE, *[("go", "a2")] * 5],
        f"first writes of {LEFT}",
    ),
    Guard(
        "a first write waits for its moment",
        [Change(FirstWrite, "_wait_until", "if seconds <= 0:", "if True:")],
        [
            *(("to", "b", "write"), ("elapse", 10 * MINUTE), *run("b"), ("elapse", 21 * MINUTE)),
            *run("b"),
        ],
        f"first writes of {KEY}",
    ),
    Guard(
        "a first write needs the task's lock",
        [unlocked("_STAMP", IS_OWN)],
        [("to", "a1", "commit"), ("lose", "a1", LEFT), GO],
        "lost its turn commits no first write",
    ),
    Guard(
        "a first write needs the budget's lock",
        [unlocked("_STAMP", IS_SHARED)],
        [("to", "a1", "commit"), ("lose", "a1", KEY), GO],
        "lost its turn commits no first write",
    ),
    Guard(
        "a first write that cannot be noted is rolled back",
        [Change(FirstWrite, "before_commit", 'if mine != self._arguments["rows"]:', "if False:")],
        [("to", "a1", "commit"), ("lose", "a1", KEY), GO],
        "lost its turn commits no first write",
    ),
    Guard(
        "a connection is not replaced in a turn",
        [Change(Database, "_lend", "if self._no_reconnect:", "if False:")],
        [("to", "a1", "commit"), GO, ("cut", "a1"), *[GO] * 3],
        "lost its connection commits nothing",
    ),
    Guard(
        "new code waits for the old",
        [Change(SharedBudget, "_share", "if why is not None:", "if False:")],
        [("deploy", "a2", None), ("go", "a2")],
        "nobody alive goes by the old code",
    ),
    Guard(
        "a row that another server wrote counts from now",
        [Change(shared, "_ADOPT", "last_start = SYSDATE(6), ")],
        [("elsewhere", KEY), *[GO] * 4],
        f"charges of {KEY}",
        audited=False,
    ),
    Guard(
        "what has ended is cleared",
        [Change(SharedBudget, "_settled", "if any(row.over for row in found.rows):", "if False:")],
        [("pause", KEY, 10 * MINUTE), ("elapse", 11 * MINUTE)],
        "can start",
    ),
    Guard(
        "only a pause that has ended is cleared",
        [Change(run_time, "_END_PAUSE", f"AND {tables.PAUSE_OVER}")],
        [
            *(("pause", LEFT, 10 * MINUTE), ("pause", KEY, 2 * HOUR), ("elapse", 11 * MINUTE)),
            *[GO] * 3,
        ],
        f"{KEY} is paused",
    ),
    Guard(
        "a pause is not replaced by a shorter one",
        [Change(run_time, "_PAUSE", "AND (NOT paused", "AND (TRUE")],
        [("pause", KEY), ("pause", KEY, 10 * MINUTE), ("elapse", 11 * MINUTE), *[GO] * 3],
        f"{KEY} is paused",
    ),
    Guard(
        "only a rate that has ended is cleared",
        [Change(run_time, "_END_RATE", f"AND {tables.RATE_OVER}")],
        [
            *(("rate", LEFT, MINUTE, 10 * MINUTE), ("rate", KEY, 45 * MINUTE, 2 * HOUR)),
            *(*run("b"), ("elapse", 31 * MINUTE), *[GO] * 3),
        ],
        f"charges of {KEY}",
        audited=False,
    ),
    Guard(
        "what was set before counts again",
        [Change(run_time, "_END_RATE", "gap_us = gap_after_us", "gap_us = NULL")],
        [
            *(("rate", KEY, 3 * HOUR), ("rate", KEY, MINUTE, 10 * MINUTE), *run("b")),
            *(("elapse", HOUR), *[GO] * 3),
        ],
        f"charges of {KEY}",
        audited=False,
    ),
    Guard(
        "a rate ends at its moment, whoever looked before",
        [in_charge(tables.GAP_US, "gap_us")],
        [
            *(("rate", KEY, MINUTE, 10 * MINUTE), *run("b"), ("elapse", 9 * MINUTE)),
            *(("to", "a1", "charge"), ("elapse", 2 * MINUTE), GO),
        ],
        f"charges of {KEY}",
        audited=False,
    ),
]


@pytest.mark.parametrize("guard", GUARDS, ids=[guard.name for guard in GUARDS])
def test_without_a_guard_a_promise_is_broken(
    pair: servers.Servers, model_site: Connection[Cursor], guard: Guard
) -> None:
    """Each is needed, and the model sees it; so does the audit, if it is the rate's."""
    assert play(pair, model_site, guard.steps).violated == ""

    assert_broken(pair, model_site, guard)


def assert_broken(pair: servers.Servers, site: Connection[Cursor], guard: Guard) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for change in guard.changes:
            change.make(patch)
        broken = play(pair, site, guard.steps)

    assert guard.breaks in broken.violated
    what, _, key = guard.breaks.rpartition(" of ")
    if what in ("charges", "first writes"):
        assert broken.kept[key] is not guard.audited, broken


# Nobody notices one of those that do the same; without all of them a promise is broken.
#
# What is left out nowhere here: `last_start <= SYSDATE(6)` of the charge. It refuses a start whose
# row was in the past at the look in its turn, and is in the future at its charge: the clock was set
# back between the two. That start was due all the same.
COVERED = [
    Guard(
        "the task's row is due",
        [SEEN, in_charge(DUE, f"AND ({IS_OWN} OR {DUE[4:]})")],
        [*run("a1"), ("nearly", LEFT, 0), ("to", "a1", "charge"), ("rate", LEFT, 2 * HOUR), GO],
        f"charges of {LEFT}",
    ),
    Guard(
        "the budget's row is due",
        [SEEN, in_charge(DUE, f"AND ({IS_SHARED} OR {DUE[4:]})")],
        [*run("b"), ("nearly", KEY, 0), ("to", "b", "charge"), ("rate", KEY, HOUR), ("go", "b")],
        f"charges of {KEY}",
    ),
    Guard(
        "due by the last charge",
        [SEEN, in_charge(f"{tables.CHARGED} + {shared._GAP}", tables.CHARGED)],
        [
            *(("to", "b", "write"), ("crash", "b"), ("nearly", KEY, 0)),
            *(("to", "b", "charge"), ("rate", KEY, HOUR), ("go", "b")),
        ],
        f"charges of {KEY}",
    ),
    Guard(
        "due by the last first write",
        [
            SEEN,
            in_charge(
                f"{tables.WROTE} + {shared._GAP} - INTERVAL %(usual_us)s MICROSECOND",
                tables.WROTE,
            ),
        ],
        [
            *(("to", "b", "write"), ("elapse", 20 * MINUTE), *run("b"), ("crash", "b")),
            *(("nearly", KEY, 0), ("to", "b", "charge"), ("rate", KEY, 45 * MINUTE)),
            *(("go", "b"), ("go", "b"), ("go", "b")),
        ],
        f"first writes of {KEY}",
    ),
    Guard(
        "the turn is the one that a start needs",
        [
            NO_LIMIT_BESIDE,
            Change(
                SharedBudget,
                "_judge",
                "(self._keys_held.number > 1) is not self.shares",
                "False",
            ),
        ],
        [("rate", KEY, 0), GO, ("rate", KEY, HOUR), GO, GO],
        "all rows are charged",
    ),
    Guard(
        "the rows are locked, and looked at by a read that locks",
        [
            in_charge(
                shared._MAY,
                shared._MAY.replace("SET @aioworker_charged = ", "SELECT ").replace(
                    "@aioworker_now = SYSDATE(6)",
                    "SYSDATE(6) INTO @aioworker_charged, @aioworker_now",
                ),
            ),
            in_charge(" FOR UPDATE"),
        ],
        [("to", "a1", "charge"), ("pause_in_charge", "a1", BEFORE_CHARGE, KEY)],
        "is paused",
    ),
    Guard(
        "who is alone waits by the rows, and by a limiter of its own",
        [
            Change(SharedBudget, "charge", "await pace.limiter.charge(began_at)", "pass"),
            Change(
                Pace,
                "look",
                "due_in_us = max(self.gap_us - row.charge_age_us, write_in_us - usual_us)",
                "due_in_us = 0",
            ),
            in_charge(DUE),
        ],
        [*run("a1"), *[GO] * 4],
        f"charges of {KEY}",
    ),
]


@pytest.mark.parametrize("guard", COVERED, ids=[guard.name for guard in COVERED])
def test_without_all_guards_that_do_the_same_a_promise_is_broken(
    pair: servers.Servers, model_site: Connection[Cursor], guard: Guard
) -> None:
    for change in guard.changes:
        with pytest.MonkeyPatch.context() as patch:
            change.make(patch)
            assert play(pair, model_site, guard.steps).violated == ""

    assert_broken(pair, model_site, guard)
