"""The starts of the last week, a row each, and what operators changed meanwhile.

From the starts anybody can tell whether the rate was kept.

The charge's transaction inserts the row, under the number that the budget's row counts it by. The
run's first write is noted in its own transaction, the end when the turn is given back: a row
without an end is of a worker that died, or lost its database. A number without a row is of a worker
of an earlier version. Without a rate limit nothing is charged, and nothing is noted.
"""

from __future__ import annotations

from aioworker.budget.tables import GAP_US

KEPT_DAYS = 7
MOST_ROWS = 100_000  # of all tasks together
CLEAN_EVERY = 100  # starts of a worker
PORTION = 500  # rows that go at once

# Of a start that was charged in the same transaction. One of that number may be there: of a budget
# whose row was deleted, and made again by `init`.
CHARGED = f"""REPLACE INTO aioworker_start
    (task, number, charged, gap_us, shared, shared_gap_us, worker, messages, ids)
SELECT task, starts, last_charge, COALESCE({GAP_US}, %(gap)s), %(shared)s, (
    SELECT COALESCE({GAP_US}, %(shared_gap)s) FROM aioworker_budget WHERE task = %(shared)s
), %(worker)s, %(together)s, %(ids)s
FROM aioworker_budget WHERE task = %(task)s AND @aioworker_charged"""
# The turn is held: nobody else counts a start.
_NUMBER = "(SELECT starts FROM aioworker_budget WHERE task = %(task)s)"
WROTE = f"""UPDATE aioworker_start
SET first_write = @aioworker_now - INTERVAL %(passed_us)s MICROSECOND
WHERE task = %(task)s AND number = {_NUMBER}"""
ENDED = f"""UPDATE aioworker_start
SET ended = SYSDATE(6), changed = %(changed)s, outcome = %(outcome)s
WHERE task = %(task)s AND ended IS NULL AND number = {_NUMBER}
AND IS_USED_LOCK(%(lock)s) = CONNECTION_ID()"""
# The interval of a budget's last start, unless a rate was set at run time, or reset, since then.
LAST_GAP = """SELECT shared_gap_us FROM aioworker_start
WHERE shared = %(key)s AND charged > COALESCE(%(set_at)s, '2000-01-01')
ORDER BY charged DESC LIMIT 1"""
CLEAN = (
    f"""DELETE FROM aioworker_start
WHERE charged < SYSDATE(6) - INTERVAL {KEPT_DAYS} DAY ORDER BY charged LIMIT {PORTION}""",
    f"""DELETE FROM aioworker_start
WHERE charged <= (SELECT charged FROM (
    SELECT charged FROM aioworker_start ORDER BY charged DESC LIMIT 1 OFFSET {MOST_ROWS}
) AS beyond) ORDER BY charged LIMIT {PORTION}""",
)
# On no row: that each privilege is there is seen before a start is charged, and not behind it.
CAN_NOTE = (
    "INSERT INTO aioworker_start (task, number, charged, gap_us, worker, messages)"
    " SELECT task, number, charged, gap_us, worker, messages FROM aioworker_start WHERE FALSE",
    "UPDATE aioworker_start SET ended = NULL WHERE FALSE",
    "DELETE FROM aioworker_start WHERE FALSE",
    "INSERT INTO aioworker_change (task, changed, who, what)"
    " SELECT task, changed, who, what FROM aioworker_change WHERE FALSE",
    "DELETE FROM aioworker_change WHERE FALSE",
)

# What somebody has changed in the budget's row, in the same transaction.
CHANGED = (
    """INSERT INTO aioworker_change (task, changed, who, what, why)
VALUES (%(task)s, SYSDATE(6), %(who)s, %(what)s, %(why)s)""",
    f"""DELETE FROM aioworker_change
WHERE id <= CAST(LAST_INSERT_ID() AS SIGNED) - {MOST_ROWS} ORDER BY id LIMIT {PORTION}""",
    f"""DELETE FROM aioworker_change
WHERE task = %(task)s AND changed < SYSDATE(6) - INTERVAL {KEPT_DAYS} DAY
ORDER BY changed LIMIT {PORTION}""",
)
