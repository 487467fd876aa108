"""Publishing from code without an event loop: a web view, a signal handler, a script."""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from contextlib import suppress
from typing import Any

from aioworker.producer import Producer, outgoing_message, taking
from aioworker.tasks.registry import check_publishable
from aioworker.tasks.task import AnyTask

CLOSE_SECONDS = 3.0


class _Background:
    """An event loop in a thread of its own, and the producer that lives there."""

    def __init__(self) -> None:
        self._producer = Producer()
        self._loop = asyncio.new_event_loop()
        # A daemon: what is published is confirmed, so the process may end at any time.
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="aioworker publish", daemon=True
        )
        self._thread.start()

    def publish(
        self, task: AnyTask | str, args: tuple[Any, ...], urgent: bool, kwargs: dict[str, Any]
    ) -> str:
        """Publish one message, and wait for its confirm."""
        publishing = self._producer.publish(task, *args, urgent=urgent, **kwargs)
        return asyncio.run_coroutine_threadsafe(publishing, self._loop).result()

    def close(self) -> None:
        """Say goodbye to RabbitMQ and end the thread."""
        closing = self._producer.__aexit__(None, None, None)
        with suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(closing, self._loop).result(CLOSE_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_SECONDS)
        if not self._loop.is_running():
            self._loop.close()


_lock = threading.Lock()
_background: _Background | None = None


def publish_sync(task: AnyTask | str, /, *args: Any, urgent: bool = False, **kwargs: Any) -> str:
    """Publish one message and return its id once RabbitMQ has confirmed it.

    It blocks the thread meanwhile, some milliseconds, and at most the connect timeout for each
    step with RabbitMQ. All threads of a process share one connection, opened at the first call
    and anew after it was lost; a forked process opens its own. What the loss of a connection
    cuts off, as after a suspend, is published once more, with the same id: it may arrive twice
    then. The settings are read at the first call.

    Args:
        task: As in `Producer.publish`.
        args: Likewise.
        urgent: Likewise.
        kwargs: Likewise.

    Raises:
        UsageError: The task cannot be called with these arguments, or a setting is wrong;
            nothing was published.
        BrokerError: RabbitMQ did not confirm it; it may have been published all the same.
    """
    global _background
    if (taker := taking()) is not None:
        outgoing = outgoing_message(*check_publishable(task, args, kwargs))
        taker(outgoing, urgent)
        return outgoing.message_id or ""
    with _lock:
        if _background is None:
            _background = _Background()
        background = _background
    return background.publish(task, args, urgent, kwargs)


def _close() -> None:
    global _background
    with _lock:
        background, _background = _background, None
    if background is not None:
        background.close()


def _forget() -> None:
    """Forget the parent's thread and connection: a forked process has neither."""
    global _background, _lock
    _background, _lock = None, threading.Lock()


atexit.register(_close)
if hasattr(os, "register_at_fork"):
    # Not in the middle of a first call: its imports would stay half done in the child.
    os.register_at_fork(
        before=lambda: _lock.acquire(),
        after_in_parent=lambda: _lock.release(),
        after_in_child=_forget,
    )
