"""`aioworker`, with a main job that ends its process at add-on 13, as a broken library would.

DEADLY=read lets it do so when it is asked what is needed, DEADLY=raise has its run fail instead.
"""

from __future__ import annotations

import os

from aioworker.addons import stale_ids, update_current_version
from aioworker.cli import main
from aioworker.tasks.context import Context

DEADLY_ADDON = 13
STATUS = 139
_DEADLY = os.environ.get("DEADLY", "run")
_refresh = update_current_version.function


async def _refresh_or_die(ctx: Context, ids: list[int]) -> None:
    if DEADLY_ADDON in ids and _DEADLY == "run":
        os._exit(STATUS)
    if DEADLY_ADDON in ids and _DEADLY == "raise":
        raise KeyError(DEADLY_ADDON)
    await _refresh(ctx, ids)


async def _read_or_die(ctx: Context, ids: list[int]) -> list[int]:
    if DEADLY_ADDON in ids and _DEADLY == "read":
        os._exit(STATUS)
    return await stale_ids(ctx, ids)


if __name__ == "__main__":
    update_current_version.function = _refresh_or_die
    update_current_version.needed(_read_or_die)
    main.main()
