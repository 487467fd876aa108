"""Connections to RabbitMQ: plain ones, every step bounded in time, every refusal explained.

A plain connection never heals by itself: what goes wrong on it is seen at the next step,
as one `BrokerError`, and whoever holds the connection opens another. aio-pika's robust one hides
what happened: it makes a deleted queue anew, and hands out deliveries of the connection before.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import traceback
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TypeAlias
from urllib.parse import urlsplit

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractConnection
from aio_pika.exceptions import AuthenticationError, ProbableAuthenticationError
from aiormq.exceptions import InvalidFrameError
from pamqp import commands

from aioworker import tls
from aioworker.addresses import BrokerAddress, Nodes
from aioworker.errors import BrokerError, TlsFileError, let_go
from aioworker.rabbitmq.errors import CONNECT_FAILURES, FAILURES, describe
from aioworker.rabbitmq.frames import ForeignError, PlainConnection, TolerantConnection

Connection: TypeAlias = PlainConnection  # for those who import no aio_pika
HEARTBEAT_SECONDS = 15
_CANNOT = "cannot connect to RabbitMQ "
_WRONGLY = "what answers there speaks RabbitMQ's protocol wrongly"
_CURE = re.compile(r"[,;]? check AIOWORKER_AMQP_URL$")
# RabbitMQ's words, whole: behind them it tells of a limit, or of a virtual host that is down.
_NO_VHOST = re.compile(r"NOT_ALLOWED - vhost .+ not found")
_CLOSED_VHOST = re.compile(r"NOT_ALLOWED - access to vhost .+ refused for user '[^']*'")
CLOSE_SECONDS = 2.0
LEAVE_SECONDS = 0.1  # where another connection is wanted at once
# What goes wrong on a connection is raised; a program that sets up no logging prints nothing of it.
for _library in ("aio_pika", "aiormq"):
    logging.getLogger(_library).addHandler(logging.NullHandler())


async def connect(nodes: Nodes, timeout: float, name: str, *, tolerant: bool = False) -> Connection:
    """Connect to the first node that answers.

    Args:
        nodes: The nodes of one cluster, tried in their order; the one that answers is first
            among them afterwards.
        timeout: Seconds for all of them together.
        name: What RabbitMQ lists the connection as.
        tolerant: Whether a message that cannot be decoded may arrive without ending it.

    Raises:
        BrokerError: None of them could be used; the text has the reason of each.
    """
    opened, _failures = await _connect(nodes, timeout, name, tolerant=tolerant)
    return opened


async def _connect(
    nodes: Nodes, timeout: float, name: str, *, tolerant: bool
) -> tuple[Connection, list[BrokerError]]:
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
                    connection_class=TolerantConnection if tolerant else PlainConnection,
                )
                return await _confirming(opened), failures
        except CONNECT_FAILURES as error:
            nodes.rotate(-1)
            failures.append(await _refused(error, address))
            failures[-1].__cause__ = error
            let_go(error)
    raise _of_all(failures)


async def _confirming(opened: Connection) -> Connection:
    """Return a connection, and close one whose server confirms nothing: no channel opens there."""
    named = opened.transport and opened.transport.connection.server_properties.get("capabilities")
    if not isinstance(named, dict) or not named.get("publisher_confirms"):
        await close(opened)
        raise ForeignError("what answers there confirms no message, as RabbitMQ does")
    return opened


def _of_all(failures: Sequence[BrokerError]) -> BrokerError:
    """Return one error that names every node that was tried, each with its own reason."""
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
    reason = await tls.explained(error, address.tls, partial(_certificate, address))
    if reason is not None:
        text = f"{_CANNOT}at {address.shown}: {reason}; check AIOWORKER_AMQP_URL"
        return BrokerError(text, unreachable=tls.cut_off(error))
    # What answers and refuses is not away.
    away = not isinstance(error, AuthenticationError | InvalidFrameError | TlsFileError)
    return BrokerError(_explain_connect(error, address), unreachable=away)


async def _certificate(address: BrokerAddress, asked: tls.Tls) -> tls.Certificate:
    """Shake hands with a node, and say no more."""
    at = urlsplit(address.url.get_secret_value())
    _reader, writer = await asyncio.open_connection(at.hostname, at.port, ssl=asked.context())
    found: tls.Certificate = writer.get_extra_info("peercert")
    writer.transport.abort()  # no goodbye that a peer could leave without an answer
    await writer.wait_closed()
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
        if isinstance(frame, commands.Connection.Close):
            return frame.reply_text
    return ""


@asynccontextmanager
async def connected(
    nodes: Nodes, timeout: float, name: str, *, tolerant: bool = False
) -> AsyncIterator[Connection]:
    """Connect, and close at the end without waiting long for a peer that is gone.

    After a failure inside the node is the last of *nodes*. Of several, an error that it is away
    names it and those that were tried before it.

    Args:
        nodes: As for `connect`.
        timeout: Likewise.
        name: Likewise.
        tolerant: Likewise.
    """
    opened, failures = await _connect(nodes, timeout, name, tolerant=tolerant)
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


async def close(
    opened: AbstractConnection | AbstractChannel, seconds: float = CLOSE_SECONDS
) -> None:
    """Close a connection or a channel; a peer that does not say goodbye is not waited for long."""
    with contextlib.suppress(*FAILURES):
        async with asyncio.timeout(seconds):
            await opened.close()
