"""What goes wrong with RabbitMQ: every failed step is one `BrokerError`, in one line."""

from __future__ import annotations

import asyncio
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING

from aio_pika.exceptions import (
    CONNECTION_EXCEPTIONS,
    ChannelClosed,
    ChannelInvalidStateError,
    ChannelNotFoundEntity,
    ConnectionClosed,
    DeliveryError,
    PublishError,
)
from aiormq.exceptions import ChannelAccessRefused, ConnectionNotAllowed

from aioworker.errors import BrokerError, ConnectionLostError, NotTakenError, QueueMissingError
from aioworker.words import command

if TYPE_CHECKING:
    from collections.abc import Iterator

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


@contextmanager
def explaining(queue: str) -> Iterator[None]:
    """Turn what goes wrong inside, about *queue*, into one `BrokerError`."""
    try:
        yield
    except FAILURES as error:
        raise explain(error, queue) from error


def explain(error: Exception, queue: str) -> BrokerError:
    """Say in one line why a step about *queue* failed, and what to do."""
    match error:
        case ChannelNotFoundEntity() if not is_missing(error):  # its node is down
            return BrokerError(f"queue {queue} is away: {describe(error)}", unreachable=True)
        case PublishError() | ChannelNotFoundEntity():
            return queue_missing(queue)
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


def is_missing(error: ChannelNotFoundEntity) -> bool:
    """Whether there is no such queue; RabbitMQ says "not found" of one whose node is down, too."""
    return "no queue" in str(error)


def forbids(error: BrokerError) -> bool:
    """Whether an error is that this user lacks a right."""
    cause = error.__cause__
    return isinstance(cause, ChannelAccessRefused) and _IN_USE not in str(cause)


def uncounted(queue: str) -> BrokerError:
    """Return the error for a queue that holds messages, though RabbitMQ counts none."""
    return BrokerError(f"RabbitMQ did not count the messages in queue {queue}", unreachable=True)


def queue_missing(queue: str) -> QueueMissingError:
    """Return the error for a queue that is not declared."""
    return QueueMissingError(f"queue {queue} does not exist: run `{command('init')}`")
