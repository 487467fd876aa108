"""Publishing single messages, each confirmed; a `sweep` publishes its chunks by it, too."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import aio_pika
from pydantic_core import to_json

from aioworker.addresses import BrokerAddress
from aioworker.errors import ConnectionLostError, QueueMissingError, UsageError
from aioworker.rabbitmq import message, queues
from aioworker.rabbitmq.publisher import Publisher
from aioworker.rabbitmq.queues import Queues, count_surely
from aioworker.settings import Settings, checked_prefix
from aioworker.tasks.arguments import as_json
from aioworker.tasks.registry import check_publishable
from aioworker.tasks.task import AnyTask

Outgoing: TypeAlias = aio_pika.Message
SHORTEST_SECONDS, LONGEST_SECONDS = 0.1, 3600


# Takes a message in place of RabbitMQ, in whichever thread publishes; and whether it is urgent.
Taker: TypeAlias = Callable[[Outgoing, bool], None]

# Of the whole process: what is under test may publish in threads that it starts itself.
_takers: list[Taker] = []


@contextmanager
def handing_to(taker: Taker) -> Iterator[None]:
    """Inside, *taker* gets each message, and RabbitMQ none; of several the one that came last."""
    _takers.append(taker)
    try:
        yield
    finally:
        _takers.remove(taker)


def taking() -> Taker | None:
    """Return what takes messages now in place of RabbitMQ; None where nothing does."""
    return next(iter(_takers[-1:]), None)


class Producer:
    """Publishes messages to the lanes of tasks, many over one connection.

    Use as `async with Producer() as producer`. It connects at the first publish, and again
    after the connection was lost. Several publishes may be under way at once. It belongs to
    the event loop of its first publish until it is left: each `asyncio.run()` has one of its
    own.

    Args:
        amqp_url: RabbitMQ, `amqp://user:password@host:5672/vhost`; several, separated by
            commas, are the nodes of one cluster. Without it `AIOWORKER_AMQP_URL` is read.
        timeout: Seconds to connect, and seconds to wait for each confirm, 0.1 to 3600;
            without it `AIOWORKER_CONNECT_TIMEOUT` is read.
        queue_prefix: What the queues' names begin with, 1 to 50 letters, digits, `_` or `-`;
            without it `AIOWORKER_QUEUE_PREFIX` is read.

    Raises:
        UsageError: The URL, the timeout or the prefix is none, or a setting is wrong.
    """

    def __init__(
        self,
        amqp_url: str | None = None,
        *,
        timeout: float | None = None,
        queue_prefix: str | None = None,
    ) -> None:
        addresses: Sequence[BrokerAddress] = ()
        if timeout is not None and not (
            type(timeout) in (int, float) and SHORTEST_SECONDS <= timeout <= LONGEST_SECONDS
        ):
            raise UsageError(
                f"expected timeout from {SHORTEST_SECONDS} to {LONGEST_SECONDS} seconds,"
                f" got: {timeout!r}"
            )
        if amqp_url is None or timeout is None or queue_prefix is None:
            settings = Settings.load()
            addresses = settings.amqp_url
            timeout = settings.connect_timeout if timeout is None else timeout
            queue_prefix = settings.queue_prefix if queue_prefix is None else queue_prefix
        try:
            checked_prefix(queue_prefix)
            if amqp_url is not None:
                addresses = BrokerAddress.parse_all(amqp_url)
        except ValueError as error:
            raise UsageError(str(error)) from None
        self._use(addresses, timeout, queue_prefix)

    @classmethod
    def over(
        cls, addresses: Sequence[BrokerAddress], timeout: float, queue_prefix: str
    ) -> Producer:
        """Make one of what is checked already."""
        made = cls.__new__(cls)
        made._use(addresses, timeout, queue_prefix)
        return made

    def _use(self, addresses: Sequence[BrokerAddress], timeout: float, queue_prefix: str) -> None:
        self._timeout = timeout
        self._prefix = queue_prefix
        self._publisher = Publisher(addresses, timeout, "aioworker publish")
        self._loop: asyncio.AbstractEventLoop | None = None

    async def __aenter__(self) -> Producer:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._publisher.close()
        self._loop = None

    async def publish(
        self, task: AnyTask | str, /, *args: Any, urgent: bool = False, **kwargs: Any
    ) -> str:
        """Publish one message and return its id once RabbitMQ has confirmed it.

        Over a connection that turns out to be lost, as after a suspend, it is published once
        more on a new one, with the same id. It may arrive twice then.

        Args:
            task: The task, or its name: this process need not import it; what it cannot
                take is then refused by the worker.
            args: The function's arguments, without its `Context`; for a task that takes
                chunks, first the list of 1 to 1000 ids or rows.
            urgent: Whether to use the urgent lane.
            kwargs: The function's keyword arguments.

        Raises:
            UsageError: The task cannot be called with these arguments, or the producer
                belongs to another event loop; nothing was published.
            QueueMissingError: The task's lanes are not declared; nothing was published.
            BrokerError: RabbitMQ did not confirm it; it may have been published all the
                same.
        """
        name, checked, named = check_publishable(task, args, kwargs)
        return await self._send(name, outgoing_message(name, checked, named), urgent=urgent)

    async def publish_swept(self, task: AnyTask, chunk: list[Any], sweep: str) -> str:
        """Publish a chunk of a sweep to the bulk lane.

        Args:
            task: The task.
            chunk: What the task can take, checked.
            sweep: The sweep's id.
        """
        if set(map(type, chunk)) == {int} and not task.options.constants:
            # Numbers are as JSON has them, and this writes them in a quarter of the time.
            outgoing = outgoing_message(task.name, [chunk], sweep=sweep, dump=to_json)
        else:
            args = as_json([chunk, *task.options.constants])
            outgoing = outgoing_message(task.name, args, sweep=sweep)
        return await self._send(task.name, outgoing, urgent=False)

    async def _send(self, task: str, outgoing: Outgoing, *, urgent: bool) -> str:
        running = asyncio.get_running_loop()
        if self._loop not in (None, running):
            raise UsageError(
                "expected a Producer of this event loop, got another's: make one in each"
                " asyncio.run(), or use publish_sync"
            )
        self._loop = running
        if (taker := taking()) is not None:
            taker(outgoing, urgent)
            return outgoing.message_id or ""
        queues = Queues.of(task, self._prefix)
        lane = queues.urgent if urgent else queues.bulk
        try:
            await self._publisher.publish(lane, outgoing)
        except ConnectionLostError:
            # It may have been lost long before; often nobody knows until something is sent.
            await self._publisher.publish(lane, outgoing)
        return outgoing.message_id or ""

    async def backlog(self, task: str, *, sure: bool = False) -> int:
        """Return how many chunks wait in a task's bulk lane.

        Args:
            task: The task's name.
            sure: Whether none is believed only where the lane itself says so: RabbitMQ also
                counts none in one that does not answer. That takes the right to read the lane.

        Raises:
            QueueMissingError: The lane is not declared.
            BrokerError: RabbitMQ refuses, the lane does not answer, or the connection is lost.
        """
        bulk = Queues.of(task, self._prefix).bulk
        count = count_surely if sure else queues.count
        waiting = await count(await self._publisher.connection(), bulk, self._timeout)
        if waiting is None:
            raise QueueMissingError.of(bulk)
        return waiting


def outgoing_message(
    task: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    sweep: str | None = None,
    dump: Callable[[object], bytes] = message.dump,
) -> Outgoing:
    """Return the message that runs *task* with these arguments, as aio-pika publishes it.

    Args:
        task: The task's name.
        args: Positional arguments.
        kwargs: Keyword arguments.
        sweep: The id of the sweep that it belongs to; None of a single message.
        dump: Writes them as JSON.
    """
    encoded = message.encode(task, args, kwargs, sweep, dump)
    return aio_pika.Message(
        encoded.body,
        headers=encoded.headers,
        content_type=message.CONTENT_TYPE,
        content_encoding=message.CONTENT_ENCODING,
        correlation_id=encoded.message_id,
        message_id=encoded.message_id,
        timestamp=encoded.published,
    )
