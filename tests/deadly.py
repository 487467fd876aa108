"""`aioworker`, with a main job that ends its process at add-on 13, as a broken library would."""

from __future__ import annotations

import os

from aioworker.addons import update_current_version
from aioworker.cli import main
from aioworker.tasks.context import Context

DEADLY_ADDON = 13
STATUS = 139
_refresh = update_current_version.function


async def _refresh_or_die(ctx: Context, ids: list[int]) -> None:
    if DEADLY_ADDON in ids:
        os._exit(STATUS)
    await _refresh(ctx, ids)


if __name__ == "__main__":
    update_current_version.function = _refresh_or_die
    main.main()
