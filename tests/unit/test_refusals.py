"""What RabbitMQ says, as its nodes said it, and what becomes of it in one line."""

from __future__ import annotations

import pytest
from aio_pika.exceptions import (
    ChannelClosed,
    ChannelNotFoundEntity,
    ChannelPreconditionFailed,
    ConnectionClosed,
    DeliveryError,
)
from aiormq.exceptions import (
    ChannelAccessRefused,
    ChannelLockedResource,
    ConnectionFrameError,
    ConnectionInternalError,
    ConnectionNotAllowed,
)
from pamqp.commands import Basic

from aioworker.errors import QueueMissingError
from aioworker.rabbitmq.errors import explain

QUEUE = "aioworker.shop"
MISSING = f"NOT_FOUND - no queue '{QUEUE}' in vhost '/'"
DOWN = f"NOT_FOUND - home node 'rabbit@b' of durable queue '{QUEUE}' in vhost '/' is down or"


@pytest.mark.parametrize(
    ("error", "words", "unreachable"),
    [
        (ChannelNotFoundEntity(f"{DOWN} inaccessible"), DOWN, True),
        (ChannelAccessRefused(f"ACCESS_REFUSED - queue '{QUEUE}' in vhost '/' in exclusive use"),
         "in exclusive use", False),
        (ChannelAccessRefused(f"ACCESS_REFUSED - access to queue '{QUEUE}' refused for user 'u'"),
         "no permission for queue", False),
        (ChannelLockedResource(f"RESOURCE_LOCKED - cannot obtain exclusive access to '{QUEUE}'"),
         "RESOURCE_LOCKED", False),
        (ChannelPreconditionFailed("PRECONDITION_FAILED - queue limit in vhost 'v' (2) is reached"),
         "queue limit", False),
        (ChannelClosed(541, "INTERNAL_ERROR - timed out"), "INTERNAL_ERROR - timed out", False),
        (ConnectionClosed(320, "CONNECTION_FORCED - by operator"), ": CONNECTION_FORCED", True),
        (ConnectionInternalError("INTERNAL_ERROR"), "lost: INTERNAL_ERROR", True),
        (ConnectionFrameError("FRAME_ERROR - frame too large"), "frame too large", True),
        (ConnectionNotAllowed("NOT_ALLOWED - number of channels"), "NOT_ALLOWED", False),
        (DeliveryError(None, Basic.Nack()), "it is full, or most of its nodes are down", False),
    ],
)  # fmt: skip
def test_a_refusal_is_told_by_its_own_words(
    error: Exception, words: str, unreachable: bool
) -> None:
    """None of them is a queue that does not exist, or one to delete."""
    told = explain(error, QUEUE)

    assert words in str(told)
    assert told.unreachable == unreachable
    assert not isinstance(told, QueueMissingError)
    assert "does not exist" not in str(told)
    assert "delete" not in str(told)


def test_only_no_queue_is_a_missing_one() -> None:
    assert isinstance(explain(ChannelNotFoundEntity(MISSING), QUEUE), QueueMissingError)
