"""The main job: `addons.current_version`, kept fresh at two writes a minute."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

from aioworker import repo
from aioworker.errors import RowsRefusedError
from aioworker.tasks.context import Context
from aioworker.tasks.registry import task


def swept_ids(ctx: Context, after: int) -> AsyncIterator[list[int]]:
    """Yield the add-ons that a sweep refreshes."""
    return repo.swept_ids(ctx.database, after)


@task(rate_limit="2/m", keys=swept_ids)
async def update_current_version(ctx: Context, ids: list[int]) -> None:
    """Write the right current version into the add-ons that need it."""
    with counting(ctx) as result:
        await repo.refresh(ctx.database, ids, result)


@update_current_version.needed
async def stale_ids(ctx: Context, ids: list[int]) -> list[int]:
    """Return the add-ons whose current version is not the right one."""
    stale, missing = await repo.read_stale(ctx.database, ids)
    ctx.counts["changed"] += 0
    count_missing(ctx, missing)
    return [row.addon_id for row in stale]


async def can_work(ctx: Context) -> None:
    """See that the tables can be read and written: both statements, on nothing."""
    await repo.refresh(ctx.database, [])


async def sweep_size(ctx: Context, after: int) -> int:
    """Count the add-ons of a sweep."""
    return await repo.count_swept(ctx.database, after)


update_current_version.check = can_work
update_current_version.size = sweep_size
update_current_version.largest_id = repo.LARGEST_ID


@contextmanager
def counting(ctx: Context) -> Iterator[repo.Refresh]:
    """Count what a refresh did, also where it was cut short.

    Raises:
        RowsRefusedError: The data refused some of its rows.
    """
    result = repo.Refresh()
    try:
        yield result
    finally:
        ctx.changed(result.changed)
        count_missing(ctx, result.missing)
    if result.refused:
        raise RowsRefusedError(result.refused, len(result.changed))


def count_missing(ctx: Context, missing: list[int]) -> None:
    """Count ids of which there is no add-on, and name each."""
    ctx.counts["missing"] += len(missing)
    for addon_id in missing:
        ctx.log.debug("Missing addon: %d", addon_id)
