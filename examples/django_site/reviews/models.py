"""A shop that knows how many reviews it has, and the reviews."""

from django.db import models


class Shop(models.Model):
    """`review_count` is what counting would give, kept fresh by `tasks.py`."""

    name = models.CharField(max_length=100)
    review_count = models.PositiveIntegerField(default=0)


class Review(models.Model):
    """What one person says."""

    shop = models.ForeignKey(Shop, models.CASCADE)
    stars = models.PositiveSmallIntegerField()
