"""Keeps `Shop.review_count`: read by Django's models, written on aioworker's connection."""

from collections.abc import Iterator
from contextlib import closing

from django.db import connection
from django.db.models import Count, F

from aioworker import Context, Retry, task
from reviews.models import Shop

# Only where it still holds what was read: an older count never overwrites a newer one.
WRITE = f"""UPDATE {Shop._meta.db_table} SET review_count = %s
WHERE id = %s AND review_count = %s"""


def shops(after: int) -> Iterator[list[int]]:
    """Yield what a sweep refreshes: all ids behind one, in pages."""
    ids = Shop.objects.order_by("id").values_list("id", flat=True)
    while page := list(ids.filter(id__gt=after)[:1000]):
        yield page
        after = page[-1]


def stale(ids: list[int]) -> list[tuple[int, int, int]]:
    """Return the right count, the id and the count it has, of each shop where they differ."""
    counted = Shop.objects.filter(id__in=ids).annotate(right=Count("review"))
    differ = counted.exclude(review_count=F("right")).order_by("id")
    # Each run has a thread of its own, and each thread a connection that Django leaves open.
    with closing(connection):
        return list(differ.values_list("right", "id", "review_count"))


@task(rate_limit="10/s", keys=shops)
def update_review_count(ctx: Context, ids: list[int]) -> None:
    """Write the right count into the shops that need it, at most 100 in a transaction."""
    rows = stale(ids)
    for start in range(0, len(rows), 100):
        with ctx.transaction() as cursor:
            ctx.counts["changed"] += cursor.executemany(WRITE, rows[start : start + 100])
    if ctx.counts["changed"] < len(rows):
        raise Retry("counts changed between read and write")


@update_review_count.needed
def stale_shops(ids: list[int]) -> list[int]:
    """Return the shops that need it: where none does, the message costs nothing of the rate."""
    return [shop for _right, shop, _count in stale(ids)]
