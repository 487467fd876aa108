"""Keeps `shops.rating`, the average of a shop's reviews, at two writes a minute.

Run it in this folder, with RabbitMQ and MariaDB where the settings say:

    mariadb --host 127.0.0.1 --user root aioworker <shop.sql
    aioworker init --app shop
    aioworker publish-all update_rating --app shop
    aioworker consume --app shop --burst

One shop now: `aioworker publish update_rating 2 --app shop`. test_shop.py tests it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from aioworker import Context, Retry, task

PAGE = "SELECT id FROM shops WHERE id > %s ORDER BY id LIMIT 1000"

# One row for each shop whose rating is not the right one: the right one, its id, what it has.
STALE = """SELECT answer, id, rating FROM (
    SELECT id, rating,
        (SELECT ROUND(AVG(stars), 2) FROM reviews WHERE shop_id = shops.id) AS answer
    FROM shops WHERE id IN %s) AS answers
WHERE NOT (rating <=> answer) ORDER BY id"""

# Only where it still has that: an answer from older rows never overwrites a newer one.
WRITE = "UPDATE shops SET rating = %s WHERE id = %s AND rating <=> %s"


async def every_shop(ctx: Context, after: int) -> AsyncIterator[list[int]]:
    """Yield what a sweep refreshes: all ids behind one, in pages."""
    while page := [shop for (shop,) in await ctx.database.query(PAGE, (after,))]:
        yield page
        after = page[-1]


@task(rate_limit="2/m", keys=every_shop)
async def update_rating(ctx: Context, ids: list[int]) -> None:
    """Write the right rating into the shops that need it, at most 100 in a transaction."""
    stale = await ctx.database.query(STALE, (ids,))
    for start in range(0, len(stale), 100):
        async with ctx.transaction() as cursor:
            ctx.counts["changed"] += await cursor.executemany(WRITE, stale[start : start + 100])
    if ctx.counts["changed"] < len(stale):
        raise Retry("ratings changed between read and write")


@update_rating.needed
async def stale_shops(ctx: Context, ids: list[int]) -> list[int]:
    """Return the shops that need it: where none does, the message costs nothing of the rate."""
    return [row[1] for row in await ctx.database.query(STALE, (ids,))]


def review_added(shop: int) -> None:
    """Have a shop rated before what a sweep has queued: for the page that takes its reviews."""
    update_rating.publish_sync([shop], urgent=True)
