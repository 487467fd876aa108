"""Tests of shop.py: they need MariaDB, where the settings say, and no RabbitMQ.

Run them in this folder, with pytest:

    mariadb --host 127.0.0.1 --user root aioworker <shop.sql
    python -m pytest test_shop.py

What they write is rolled back.
"""

from __future__ import annotations

import asyncio
import os
from decimal import Decimal
from typing import Any

from shop import review_added, update_rating

from aioworker import testing

DATABASE = os.environ.get("AIOWORKER_MYSQL_URL", "mysql://root@127.0.0.1:3306/aioworker")


def test_a_review_has_its_shop_rated_before_a_sweep() -> None:
    with testing.published() as messages:
        review_added(2)

    assert messages == [testing.Message("update_rating", ([2],), urgent=True)]


def test_shops_whose_rating_is_wrong_get_their_average() -> None:
    async def rate() -> tuple[testing.Run, list[tuple[Any, ...]]]:
        async with testing.rolled_back(DATABASE) as database:
            await database.execute("UPDATE shops SET rating = 3.5 WHERE id = 2")
            await database.execute("INSERT INTO reviews (shop_id, stars) VALUES (2, 5)")
            done = await testing.run(update_rating, [1, 2, 3], database=database)
            return done, await database.query("SELECT id, rating FROM shops ORDER BY id")

    done, ratings = asyncio.run(rate())

    assert done.counts == {"ids": 3, "changed": 3}
    assert ratings == [(1, Decimal("4.33")), (2, Decimal("4.00")), (3, None)]


def test_a_shop_whose_rating_is_right_costs_nothing_of_the_rate() -> None:
    async def rate_twice() -> testing.Run:
        async with testing.rolled_back(DATABASE) as database:
            await testing.run(update_rating, [2], database=database)
            return await testing.run(update_rating, [2], database=database)

    assert asyncio.run(rate_twice()).needed == []
