"""Connections to RabbitMQ: plain ones, every step bounded in time, every refusal explained.

A plain connection never heals by itself: what goes wrong on it is seen at the next step,
as one `BrokerError`, and whoever holds the connection opens another.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import struct
import traceback
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import aio_pika
from aio_pika.exceptions import (
    CONNECTION_EXCEPTIONS,
    AuthenticationError,
    ChannelClosed,
    ChannelInvalidStateError,
    ChannelNotFoundEntity,
    ConnectionClosed,
    DeliveryError,
    ProbableAuthenticationError,
    PublishError,
)
from aiormq.exceptions import ChannelAccessRefused, ConnectionNotAllowed, InvalidFrameError
from pamqp.commands import Connection

from aioworker import tls
from aioworker.addresses import Nodes
from aioworker.console import command
from aioworker.errors import (
    BrokerError,
    ConnectionLostError,
    NotTakenError,
    QueueMissingError,
    TlsFileError,
    let_go,
)
from aioworker.rabbitmq.frames import CarefulConnection, ForeignError, PlainConnection

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from aio_pika.abc import AbstractChannel, AbstractConnection

    from aioworker.addresses import BrokerAddress

HEARTBEAT_SECONDS = 15
_CANNOT = "cannot connect to RabbitMQ "
_WRONGLY = "what answers there speaks RabbitMQ's protocol wrongly"
_CURE = re.compile(r"[,;]? check AIOWORKER_AMQP_URL$")
# RabbitMQ's words, whole: behind them it tells of a limit, or of a virtual host that is down.
_NO_VHOST = re.compile(r"NOT_ALLOWED - vhost .+ not found")
_CLOSED_VHOST = re.compile(r"NOT_ALLOWED - access to vhost .+ refused for user '[^']*'")
_IN_USE = "in exclusive use"
CLOSE_SECONDS = 2.0
LEAVE_SECONDS = 0.1  # where another connection is wanted at once
# What a peer that speaks something else makes a decoder raise.
GARBAGE = (ValueError, LookupError, struct.error)
# What aio-pika and the network raise when a connection cannot be used any more.
FAILURES: tuple[type[Exception], ...] = (*CONNECTION_EXCEPTIONS, asyncio.InvalidStateError)
CONNECT_FAILURES: tuple[type[Exception], ...] = (*FAILURES, *GARBAGE)
# What goes wrong on a connection is raised; a program that sets up no logging prints nothing of it.
for _library in ("aio_pika", "aiormq"):
    logging.getLogger(_library).addHandler(logging.NullHandler())


async def connect(
    nodes: Nodes, timeout: float, name: str, *, careful: bool = False
) -> AbstractConnection:
    """Connect to the first node that answers.

    Args:
        nodes: The nodes of one cluster, tried in their order; the one that answers is first
            among them afterwards.
        timeout: Seconds for all of them together.
        name: What RabbitMQ lists the connection as.
        careful: Whether a message that cannot be decoded may arrive without ending it.

    Raises:
        BrokerError: None of them could be used; the text has the reason of each.
    """
    opened, _failures = await _connect(nodes, timeout, name, careful=careful)
    return opened


async def _connect(
    nodes: Nodes, timeout: float, name: str, *, careful: bool
) -> tuple[AbstractConnection, list[BrokerError]]:
    """Do what `connect` does; return why the nodes tried before could not be used, too."""
    failures: list[BrokerError] = []
    for address in tuple(nodes):
        try:
            share = timeout / len(nodes)
            async with asyncio.timeout(min(share, address.timeout or share)):
                opened = await aio_pika.connect(
                    address.url.get_secret_value(),
                    ssl_context=None if address.tls is None else address.tls.context(),
                    heartbeat=address.heartbeat or HEARTBEAT_SECONDS,
                    client_properties={"connection_name": address.name or name},
                    connection_class=CarefulConnection if careful else PlainConnection,
                )
                return await _confirming(opened), failures
        except CONNECT_FAILURES as error:
            nodes.rotate(-1)
            failures.append(await _refused(error, address))
            failures[-1].__cause__ = error
            let_go(error)
    raise _of_all(failures)


async def _confirming(opened: AbstractConnection) -> AbstractConnection:
    """Return a connection, and close one whose server confirms nothing: no channel opens there."""
    named = opened.transport and opened.transport.connection.server_properties.get("capabilities")
    if not isinstance(named, dict) or not named.get("publisher_confirms"):
        await close(opened)
        raise ForeignError("what answers there confirms no message, as RabbitMQ does")
    return opened


def _of_all(failures: Sequence[BrokerError]) -> BrokerError:
    """Return one error that names every node that was tried, each with its own reason."""
    if not failures:
        return BrokerError("expected at least one address of RabbitMQ, got none")
    *others, last = failures
    if not others:
        return last
    texts = [_CURE.sub("", str(one)) for one in others] + [str(last)]
    rest = [text.removeprefix(_CANNOT) for text in texts[1:]]
    error = BrokerError(
        "; ".join([texts[0], *rest]), unreachable=any(one.unreachable for one in failures)
    )
    error.__cause__ = last.__cause__
    return error


async def _refused(error: Exception, address: BrokerAddress) -> BrokerError:
    asked = address.tls
    reason = None if asked is None else asked.explain(error)
    if asked is not None and reason is not None:
        reason += await tls.cure_of_host(error, lambda: _certificate(address, asked.of_any_host()))
        text = f"{_CANNOT}at {address.shown}: {reason}; check AIOWORKER_AMQP_URL"
        return BrokerError(text, unreachable=tls.cut_off(error))
    # What answers and refuses is not away.
    away = not isinstance(error, AuthenticationError | InvalidFrameError | TlsFileError)
    return BrokerError(_explain_connect(error, address), unreachable=away)


async def _certificate(address: BrokerAddress, asked: tls.Tls) -> tls.Certificate:
    """Shake hands with a node, and say no more."""
    at = urlsplit(address.url.get_secret_value())
    _reader, writer = await asyncio.open_connection(at.hostname, at.port, ssl=asked.context())
    writer.close()
    found: tls.Certificate = writer.get_extra_info("peercert")
    return found


def _explain_connect(error: Exception, address: BrokerAddress) -> str:
    at = f"{_CANNOT}at {address.shown}"
    match error:
        case ProbableAuthenticationError() if "Login was refused" in str(error):
            return f"{at}: user or password refused, check AIOWORKER_AMQP_URL"
        case InvalidFrameError() if not _words_of_close(error):
            return f"{at}: {_WRONGLY}; check AIOWORKER_AMQP_URL"
        case ProbableAuthenticationError() | InvalidFrameError():
            return f"{at}: {_refusal(error, address)}, check AIOWORKER_AMQP_URL"
        case TimeoutError():
            return f"{at}: no answer in time, check AIOWORKER_AMQP_URL"
        case TlsFileError() | ForeignError():
            return f"{at}: {error}; check AIOWORKER_AMQP_URL"
        case AuthenticationError():
            ways = f"it logs in by {error.args[0]} alone" if error.args[0] else "it lets nobody in"
            return f"{at}: {ways}, check auth in AIOWORKER_AMQP_URL"
        case _ if tls.cut_off(error) or isinstance(error, ValueError):
            # A port of TLS may close at plain text without a word.
            return (
                f"{at}: {describe(error)}; is it running, and without TLS? check AIOWORKER_AMQP_URL"
            )
        case _:
            return f"{at}: {describe(error)}; is it running? check AIOWORKER_AMQP_URL"


def _refusal(error: Exception, address: BrokerAddress) -> str:
    """Return why RabbitMQ lets nobody in, by its own words if they are not known ones."""
    words = _words_of_close(error) or describe(error)
    if _NO_VHOST.fullmatch(words):
        return f"virtual host {address.vhost!r} does not exist"
    if _CLOSED_VHOST.fullmatch(words):
        return f"virtual host {address.vhost!r} is not open to user {address.user!r}"
    return f"RabbitMQ refuses: {words}"


def _words_of_close(error: Exception) -> str:
    """Return RabbitMQ's words when it closed a connection that was being opened.

    aiormq expected another frame then; its error tells where that one lies, not what it says.
    """
    for step, _line in traceback.walk_tb(error.__traceback__):
        frame = step.f_locals.get("frame")
        if isinstance(frame, Connection.Close):
            return frame.reply_text
    return ""


def describe(error: BaseException) -> str:
    """Return an exception's words in one line, or its kind where it has none."""
    coded = isinstance(error, ChannelClosed | ConnectionClosed) and len(error.args) > 1
    words = error.args[1] if coded else error
    return " ".join(str(words).split()) or type(error).__name__


@asynccontextmanager
async def connection(
    nodes: Nodes, timeout: float, name: str, *, careful: bool = False
) -> AsyncIterator[AbstractConnection]:
    """Connect, and close at the end without waiting long for a peer that is gone.

    After a failure inside the node is the last of *nodes*. Of several, an error that it is away
    names it and those that were tried before it.

    Args:
        nodes: As for `connect`.
        timeout: Likewise.
        name: Likewise.
        careful: Likewise.
    """
    opened, failures = await _connect(nodes, timeout, name, careful=careful)
    address, seconds = nodes[0], CLOSE_SECONDS
    try:
        yield opened
    except BaseException as error:
        nodes.rotate(-1)
        if isinstance(error, BrokerError) and error.unreachable and len(nodes) > 1:
            seconds = LEAVE_SECONDS
            here = BrokerError(f"at {address.shown}: {error}", unreachable=True)
            raise _of_all([*failures, here]) from error
        raise
    finally:
        await close(opened, seconds)


async def close(opened: AbstractConnection, seconds: float = CLOSE_SECONDS) -> None:
    """Close a connection; a peer that does not say goodbye is not waited for long."""
    with contextlib.suppress(*FAILURES):
        async with asyncio.timeout(seconds):
            await opened.close()


class Publisher:
    """Publishes persistent messages and waits for RabbitMQ's confirm of each.

    Its connection is its own, opened at the first publish: RabbitMQ blocks a connection
    that publishes while it is short of memory or disk, and taking must go on meanwhile.
    Use as `async with Publisher(…) as publisher`.
    """

    def __init__(self, nodes: Sequence[BrokerAddress], timeout: float, name: str) -> None:
        self._nodes = Nodes(nodes)
        self._timeout = timeout
        self._name = name
        self._connection: AbstractConnection | None = None
        self._channel: AbstractChannel | None = None
        self._opening: asyncio.Task[AbstractChannel] | None = None

    async def __aenter__(self) -> Publisher:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; the next publish opens another."""
        if self._opening is not None:
            self._opening.cancel()
        await self._close()

    async def _close(self, seconds: float = CLOSE_SECONDS) -> None:
        opened, self._connection, self._channel = self._connection, None, None
        if opened is not None:
            await close(opened, seconds)

    async def connection(self) -> AbstractConnection:
        """Return the connection, opened anew if it is lost.

        Raises:
            BrokerError: RabbitMQ cannot be reached or refuses.
        """
        await self._open()
        if self._connection is None:
            raise BrokerError("connection to RabbitMQ closed")
        return self._connection

    async def _open(self) -> AbstractChannel:
        if self._channel is not None and not self._channel.is_closed:
            return self._channel
        # One attempt for all that wait: what it comes to is the same for each of them.
        if self._opening is None or self._opening.done():
            self._opening = asyncio.create_task(self._open_anew())
            self._opening.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        return await asyncio.shield(self._opening)

    async def _open_anew(self) -> AbstractChannel:
        await self._close(LEAVE_SECONDS)
        self._connection = await connect(self._nodes, self._timeout, self._name)
        try:
            async with asyncio.timeout(self._timeout):
                self._channel = await self._connection.channel(
                    publisher_confirms=True, on_return_raises=True
                )
        except FAILURES as error:
            raise BrokerError(f"RabbitMQ opened no channel: {describe(error)}") from error
        return self._channel

    async def probe(self, queue: str) -> None:
        """See that RabbitMQ takes and confirms messages now, by one that no queue gets.

        Args:
            queue: What the error is to be about.

        Raises:
            BrokerError: It does not: it is short of memory or disk, or refuses.
        """
        channel = await self._open()
        try:
            async with asyncio.timeout(self._timeout):
                # One without a body gets through while RabbitMQ lets no other in.
                nothing = aio_pika.Message(b"nothing")
                await channel.default_exchange.publish(nothing, "", mandatory=False)
        except FAILURES as error:
            raise explain(error, queue) from error

    async def unblocked(self) -> None:
        """Return when RabbitMQ, short of memory or disk before, takes messages again."""
        transport = self._connection.transport if self._connection is not None else None
        if transport is not None:
            await transport.connection.ready()

    async def publish(self, queue: str, outgoing: aio_pika.Message) -> None:
        """Publish one message to a queue, persistent, and wait for its confirm.

        Raises:
            QueueMissingError: There is no such queue; nothing was published.
            BrokerError: It was refused, or no confirm came in time: then it may have
                been published all the same.
        """
        channel = await self._open()
        outgoing.delivery_mode = aio_pika.DeliveryMode.PERSISTENT
        try:
            async with asyncio.timeout(self._timeout):
                # What is sent while RabbitMQ blocks the connection arrives late, when nobody
                # counts on it any more: nothing more is sent then.
                await self.unblocked()
                await channel.default_exchange.publish(outgoing, queue, mandatory=True)
        except PublishError as error:
            raise await self._unroutable(queue) from error
        except FAILURES as error:
            explained = explain(error, queue)
            if explained.unreachable and channel is self._channel and not await self._blocked():
                self._leave()
            raise explained from error

    async def _blocked(self) -> bool:
        """Whether RabbitMQ is short of memory or disk: then so is every node of a cluster."""
        try:
            async with asyncio.timeout(0):
                await self.unblocked()
        except TimeoutError:
            return True
        return False

    def _leave(self) -> None:
        """Have the next publish connect to the next node, where there is one."""
        if len(self._nodes) > 1:
            self._nodes.rotate(-1)
            self._channel = None

    async def _unroutable(self, queue: str) -> BrokerError:
        """Return why RabbitMQ has no such queue for a message, by what it says of the queue."""
        try:
            async with asyncio.timeout(self._timeout):
                channel = await (await self.connection()).channel()
                await channel.declare_queue(queue, passive=True)
                await channel.close()
        except FAILURES as error:
            return explain(error, queue)
        except BrokerError as error:
            return error
        return BrokerError(f"RabbitMQ found no queue {queue} for the message, though it is there")


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
            return missing(queue)
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


def missing(queue: str) -> QueueMissingError:
    """Return the error for a queue that is not declared."""
    return QueueMissingError(f"queue {queue} does not exist: run `{command('init')}`")
