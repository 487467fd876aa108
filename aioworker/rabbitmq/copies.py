"""Copies of a message: to run again later, to lie with the dead letters, to be brought back."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import Any

import aio_pika
from aio_pika.abc import AbstractIncomingMessage

from aioworker.rabbitmq.delivery import Delivery, message_id
from aioworker.rabbitmq.headers import LEFT_OUT, add_if_it_fits, fitting, line, portable
from aioworker.rabbitmq.message import (
    LOOK,
    PROPERTIES,
    PUBLISHED,
    REASON,
    SWEEP,
    TOGETHER,
    UNREADABLE,
    milliseconds,
)

_COUNTS = frozenset({"x-delivery-count", "x-acquired-count"})
# Whoever publishes these has RabbitMQ send the message to other queues too.
_ROUTES = frozenset({"CC", "BCC"})
# What of ours tells of the message as it was published.
_STAYING = frozenset({UNREADABLE, PROPERTIES, LEFT_OUT, PUBLISHED, SWEEP})
# When a message is to run: somebody who brings it back says now.
_TIMES = frozenset({"eta", "expires"})
_BROKERS = (
    _COUNTS
    | _ROUTES
    | {
        "x-death",
        *("x-first-death-exchange", "x-first-death-queue", "x-first-death-reason"),
        *("x-last-death-exchange", "x-last-death-queue", "x-last-death-reason"),
    }
)


def retry(
    delivery: Delivery, reason: str, failed_at: datetime | None, *, counts: bool, lost: bool
) -> aio_pika.Message:
    """Copy a delivery for the retry queue.

    Args:
        delivery: What is to run again.
        reason: Why, in words.
        failed_at: When it failed, if something did.
        counts: Whether this attempt counts.
        lost: Whether it lost its connection.
    """
    headers: dict[str, Any] = {
        "retries": delivery.attempt if counts else delivery.attempt - 1,
        REASON: line(reason),
    }
    if failed_at is not None:
        headers["x-aioworker-first-failed-at"] = milliseconds(delivery.first_failed or failed_at)
    if lost:
        headers["x-aioworker-lost"] = delivery.losses + 1
    return _copy(delivery.message, headers)


def moved(delivery: Delivery, together: int | None = None) -> aio_pika.Message:
    """Copy a delivery for the end of its own lane, as it came.

    Args:
        delivery: What goes behind the others.
        together: With how many it may run from now on; None leaves that as it is.
    """
    return _copy(delivery.message, {} if together is None else {TOGETHER: together})


def dead_letter(
    delivery: Delivery, reason: str, error: str, traceback: str, worker: str, now: datetime
) -> aio_pika.Message:
    """Copy a delivery for the dead letters, and add why, where and when it failed.

    Args:
        delivery: What is set aside.
        reason: Why, in words.
        error: The error's class; empty if none was raised.
        traceback: The last lines of its traceback; empty likewise.
        worker: Who sets it aside.
        now: When, by the budget's clock.
    """
    return _copy(
        delivery.message,
        {
            REASON: line(reason),
            "x-aioworker-error": error,
            "x-aioworker-traceback": traceback,
            "x-aioworker-attempts": delivery.attempt,
            "x-aioworker-lane": delivery.lane,
            "x-aioworker-first-failed-at": milliseconds(delivery.first_failed or now),
            "x-aioworker-failed-at": milliseconds(now),
            "x-aioworker-worker": worker,
        },
    )


def revived(letter: AbstractIncomingMessage) -> aio_pika.Message:
    """Copy a dead letter for its lane: as it was published first, to be run whatever the time."""
    ours = {name for name in letter.headers if name.startswith("x-aioworker-")}
    return _copy(letter, {"retries": 0}, without=_TIMES | (ours - _STAYING))


def kept(
    letter: AbstractIncomingMessage, users: Collection[str], look: str | None = None
) -> aio_pika.Message:
    """Copy a dead letter to lie where it lay: all that RabbitMQ will not act on stays as it is.

    What finds no room in a frame, beside what RabbitMQ added, is left out.

    Args:
        letter: The letter.
        users: Who publishes the copy, by any of its connections' names.
        look: The look that has seen it, noted if there is room; None leaves that as it is.
    """
    headers: dict[str, Any] = {}
    for name, value in letter.headers.items():
        if name not in _COUNTS:
            headers[f"x-aioworker-{name}" if name in _ROUTES else name] = portable(value)
    if look is not None:
        headers.pop(LOOK, None)
    user = letter.user_id
    # RabbitMQ takes a message in its publisher's own name only.
    if user is not None and set(users) != {user}:
        headers["x-aioworker-user-id"], user = user, None
    copy = aio_pika.Message(
        letter.body,
        headers=headers,
        content_type=letter.content_type,
        content_encoding=letter.content_encoding,
        priority=letter.priority,
        correlation_id=letter.correlation_id,
        reply_to=letter.reply_to,
        message_id=letter.message_id or message_id(letter),
        timestamp=letter.timestamp,
        type=letter.type,
        user_id=user,
        app_id=letter.app_id,
    )
    fitting(copy)
    if look is not None:
        add_if_it_fits(copy, LOOK, look)
    return copy


def _copy(
    message: AbstractIncomingMessage,
    headers: dict[str, Any],
    without: Collection[str] = frozenset(),
) -> aio_pika.Message:
    """Copy a message's body and headers; RabbitMQ's own headers begin from nothing."""
    copied = {
        name: portable(value)
        for name, value in message.headers.items()
        if name not in _BROKERS and name not in without
    }
    copy = aio_pika.Message(
        message.body,
        headers=copied | headers,
        content_type=portable(message.content_type),
        content_encoding=portable(message.content_encoding),
        correlation_id=portable(message.correlation_id),
        message_id=portable(message.message_id) or message_id(message),
        timestamp=message.timestamp,
    )
    return fitting(copy, headers)
