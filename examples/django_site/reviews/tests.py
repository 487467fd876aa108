"""Tests that need the database and no RabbitMQ: `python manage.py test`."""

import asyncio

from django.db import connection
from django.test import TestCase, TransactionTestCase

from aioworker import testing
from reviews.models import Shop


class Publishing(TestCase):
    """What a saved review sets off."""

    def test_a_review_publishes_its_shop_after_the_commit(self) -> None:
        shop = Shop.objects.create(name="Tea")

        with testing.published() as messages, self.captureOnCommitCallbacks(execute=True):
            shop.review_set.create(stars=5)
            assert messages == []

        assert messages == [testing.Message("update_review_count", ([shop.pk],), urgent=True)]


class Running(TransactionTestCase):
    """What the task writes, over a connection of its own, which sees nothing of a `TestCase`."""

    def test_a_shop_is_counted(self) -> None:
        with testing.published() as messages:
            Shop.objects.create(name="Tea").review_set.create(stars=5)

        at = connection.settings_dict  # of the database that Django made for the tests
        login = f"{at['USER']}:{at['PASSWORD']}@" if at["PASSWORD"] else f"{at['USER']}@"
        database = f"mysql://{login}{at['HOST']}:{at['PORT']}/{at['NAME']}"
        for one in messages:
            asyncio.run(testing.run(one.task, *one.args, **one.kwargs, database=database))

        assert Shop.objects.get().review_count == 1
