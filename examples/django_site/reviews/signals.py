"""What a change of a review sets off."""

from django.db import transaction
from django.db.models.signals import post_delete, post_save
from django.dispatch import receiver

from aioworker import publish_sync
from reviews.models import Review
from reviews.tasks import update_review_count


@receiver([post_save, post_delete], sender=Review)
def publish_shop(instance: Review, **_more: object) -> None:
    """Have the shop counted anew, after the commit: before, the worker would not see the change.

    Robust: with RabbitMQ away Django logs the error, the review is saved all the same, and
    the next sweep counts it.
    """
    shop = instance.shop_id
    transaction.on_commit(
        lambda: publish_sync(update_review_count, [shop], urgent=True), robust=True
    )
