"""Writes `addons.average_daily_users` from rows that the sweep has computed, 15 times a minute.

Run it in this folder, with RabbitMQ and MariaDB where the settings say:

    mariadb --host 127.0.0.1 --user root aioworker <daily_users.sql
    aioworker init --app daily_users
    aioworker publish-all update_daily_users --app daily_users
    aioworker consume --app daily_users --burst

The answer travels in the message, so a sweep has to be done before the next one begins:
`publish-all` sees to that. Where single changes come in between, send ids, as shop.py does.
"""

from __future__ import annotations

from collections.abc import Iterator

from aioworker import Context, task

# Whole numbers: AVG() alone is a Decimal, which JSON does not have.
AVERAGES = """SELECT addon_id, CAST(ROUND(AVG(count)) AS UNSIGNED) FROM update_counts
WHERE addon_id > %s GROUP BY addon_id ORDER BY addon_id LIMIT 1000"""
WRITE = "UPDATE addons SET average_daily_users = %s WHERE id = %s AND average_daily_users <> %s"


def averages(ctx: Context, after: int) -> Iterator[list[tuple[int, int]]]:
    """Yield `(id, average)` of every add-on that has users, in pages."""
    while True:
        with ctx.transaction() as cursor:
            cursor.execute(AVERAGES, (after,))
            page = [(addon, average) for addon, average in cursor.fetchall()]
        if not page:
            return
        yield page
        after = page[-1][0]


@task(rate_limit="15/m", keys=averages)
def update_daily_users(ctx: Context, rows: list[tuple[int, int]]) -> None:
    """Write the averages that differ, at most 100 in a transaction."""
    for start in range(0, len(rows), 100):
        values = [(average, addon, average) for addon, average in rows[start : start + 100]]
        with ctx.transaction() as cursor:
            ctx.counts["changed"] += cursor.executemany(WRITE, values)
