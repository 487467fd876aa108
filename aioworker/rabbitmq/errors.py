"""What goes wrong with RabbitMQ: every failed step is one `BrokerError`, in one line."""

from __future__ import annotations

import asyncio
import re
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aio_pika.exceptions import (
    CONNECTION_EXCEPTIONS,
    ChannelClosed,
    ChannelInvalidStateError,
    ChannelNotFoundEntity,
    ChannelPreconditionFailed,
    ConnectionClosed,
    DeliveryError,
    PublishError,
)
from aiormq.exceptions import ChannelAccessRefused, ConnectionNotAllowed

from aioworker.errors import (
    BrokerError,
    ConnectionLostError,
    NotTakenError,
    QueueDiffersError,
    QueueMissingError,
)
from aioworker.words import command

_IN_USE = "in exclusive use"
# What a peer that speaks something else makes a decoder raise.
GARBAGE = (ValueError, LookupError, struct.error)
# What aio-pika and the network raise when a connection cannot be used any more.
FAILURES: tuple[type[Exception], ...] = (*CONNECTION_EXCEPTIONS, asyncio.InvalidStateError)
CONNECT_FAILURES: tuple[type[Exception], ...] = (*FAILURES, *GARBAGE)


def describe(error: BaseException) -> str:
    """Return an exception's words in one line, or its kind where it has none."""
    coded = isinstance(error, ChannelClosed | ConnectionClosed) and len(error.args) > 1
    words = error.args[1] if coded else error
    return " ".join(str(words).split()) or type(error).__name__


@asynccontextmanager
async def in_time(queue: str, seconds: float) -> AsyncIterator[None]:
    """Bound a step about *queue* in time.

    Raises:
        QueueMissingError: There is no such queue.
        QueueDiffersError: The queue is there with another argument.
        BrokerError: RabbitMQ refuses, does not answer, or the connection is lost.
    """
    try:
        async with asyncio.timeout(seconds):
            yield
    except FAILURES as error:
        raise explain(error, queue) from error


def explain(error: Exception, queue: str) -> BrokerError:
    """Say in one line why a step about *queue* failed, and what to do."""
    match error:
        # RabbitMQ says "not found" of a queue whose node is down, too.
        case ChannelNotFoundEntity() if "no queue" not in str(error):
            return BrokerError(f"queue {queue} is away: {describe(error)}", unreachable=True)
        case PublishError() | ChannelNotFoundEntity():
            return QueueMissingError.of(queue)
        case DeliveryError():  # a nack, which says nothing else
            return NotTakenError(
                f"RabbitMQ did not take the message for queue {queue}: it is full, or most of its"
                " nodes are down"
            )
        case ChannelAccessRefused() if _IN_USE not in str(error):
            return BrokerError(
                f"no permission for queue {queue}: {describe(error)};"
                f" `{command('init --print')}` shows what the user needs"
            )
        case ChannelPreconditionFailed() if "inequivalent arg" in str(error):
            return QueueDiffersError(_explain_difference(queue, str(error)))
        case ChannelClosed():
            return BrokerError(f"RabbitMQ refuses a step about queue {queue}: {describe(error)}")
        case ConnectionNotAllowed():  # a limit
            return BrokerError(f"RabbitMQ ended the connection: {describe(error)}")
        case ChannelInvalidStateError():  # whose words are an object's address
            return ConnectionLostError("connection or channel to RabbitMQ closed")
        case TimeoutError():
            return BrokerError(
                f"RabbitMQ did not answer in time about queue {queue}, out of memory or disk"
                " perhaps; a message that was under way may still arrive",
                unreachable=True,
            )
        case _:
            return ConnectionLostError(f"connection to RabbitMQ lost: {describe(error)}")


def _explain_difference(queue: str, refusal: str) -> str:
    """Name both values of an argument that differs, out of RabbitMQ's own sentence."""
    found = re.search(
        r"inequivalent arg '(?P<name>[^']+)'.*received (?P<ours>.+?)(?: of type '\w+')?"
        r" but current is (?P<theirs>.+?)(?: of type '\w+')?$",
        " ".join(refusal.split()),
    )
    difference = refusal
    if found is not None:
        ours = found["ours"].removeprefix("the value ")
        theirs = found["theirs"].removeprefix("the value ")
        difference = f"expected {found['name']} {ours}, got: {theirs}"
    return (
        f"queue {queue} differs: {difference}; nothing was changed. Empty and delete the queue,"
        f" then run `{command('init')}` again"
    )


def forbids(error: BrokerError) -> bool:
    """Whether an error is that this user lacks a right."""
    cause = error.__cause__
    return isinstance(cause, ChannelAccessRefused) and _IN_USE not in str(cause)


def beyond_limit(error: BaseException | None) -> bool:
    """Whether RabbitMQ ended a connection for a limit of its user, such as of channels."""
    return isinstance(error, ConnectionNotAllowed)


def uncounted(queue: str) -> BrokerError:
    """Return the error for a queue that holds messages, though RabbitMQ counts none."""
    return BrokerError(f"RabbitMQ did not count the messages in queue {queue}", unreachable=True)
