"""The app, as Django loads it."""

from django.apps import AppConfig


class Reviews(AppConfig):
    """Its signals are connected once its models are there."""

    name = "reviews"

    def ready(self) -> None:
        """Connect them."""
        from reviews import signals  # noqa: F401 - importing connects
