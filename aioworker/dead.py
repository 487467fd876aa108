"""Dead letters: what was set aside for a person, with its reason.

RabbitMQ sends all that are there over one channel; what is not settled goes back into the queue
when its connection closes. Those that aioworker set aside carry its own headers; those that
RabbitMQ set aside carry `x-death` alone, and both are read.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from aioworker import broker, console, message, outcome, topology
from aioworker.console import count, say
from aioworker.errors import AioworkerError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aio_pika.abc import AbstractConnection, AbstractIncomingMessage

    from aioworker.settings import Settings
    from aioworker.task import AnyTask


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter, as `dead list` shows it.

    Args:
        id: The message's id.
        reason: Why it was set aside.
        error: The kind of the error; None where RabbitMQ set it aside.
        attempts: Runs that it had; None where nobody counted.
        lane: Where it came from.
        first_failed_at: When it failed first, ISO 8601; None where nobody noted it.
        failed_at: When it was set aside, ISO 8601; None where nobody noted it.
        worker: Who set it aside; None for RabbitMQ.
    """

    id: str
    reason: str
    error: str | None
    attempts: int | None
    lane: str
    first_failed_at: str | None
    failed_at: str | None
    worker: str | None

    @classmethod
    def of(cls, delivery: AbstractIncomingMessage) -> Letter:
        """Read the headers, whoever wrote them."""
        headers = delivery.headers
        if "x-aioworker-reason" in headers:
            return cls(
                id=outcome.message_id(delivery),
                reason=str(headers["x-aioworker-reason"]),
                error=_text(headers.get("x-aioworker-error")),
                attempts=_number(headers.get("x-aioworker-attempts")),
                lane=str(headers.get("x-aioworker-lane") or "bulk"),
                first_failed_at=_text(headers.get("x-aioworker-first-failed-at")),
                failed_at=_text(headers.get("x-aioworker-failed-at")),
                worker=_text(headers.get("x-aioworker-worker")),
            )
        deaths = headers.get("x-death")
        death = deaths[0] if isinstance(deaths, list) and deaths else {}
        death = death if isinstance(death, dict) else {}
        queue, at = str(death.get("queue") or ""), death.get("time")
        why = _text(death.get("reason")) or "unknown reason"
        return cls(
            id=outcome.message_id(delivery),
            reason=message.unreadable(headers) or f"set aside by RabbitMQ: {why}",
            error=None,
            attempts=None,
            lane="urgent" if queue.endswith(".urgent") else "bulk",
            first_failed_at=None,
            failed_at=at.replace(tzinfo=UTC).isoformat() if isinstance(at, datetime) else None,
            worker=None,
        )

    @property
    def line(self) -> str:
        """The letter in one line: id, when, attempts, lane, reason."""
        when = self.failed_at or "unknown time"
        runs = "" if self.attempts is None else f" attempts={self.attempts}"
        shown = self.id if self.id.isprintable() else json.dumps(self.id)
        return f"{shown} {when} lane={self.lane}{runs} {' '.join(self.reason.split())}"


@dataclass(frozen=True, slots=True)
class Filter:
    """Which dead letters are meant; without any condition, all of them.

    Args:
        ids: One of these message ids; empty for any.
        reason: A part of the reason; empty for any.
        older_than: Set aside longer ago than this; None for any.
    """

    ids: frozenset[str] = frozenset()
    reason: str = ""
    older_than: timedelta | None = None

    def matches(self, letter: Letter) -> bool:
        """Return whether a letter is meant; one without a time is not older than anything."""
        if self.ids and letter.id not in self.ids:
            return False
        if self.reason.lower() not in letter.reason.lower():
            return False
        if self.older_than is None:
            return True
        failed = _moment(letter.failed_at)
        return failed is not None and datetime.now(UTC) - failed > self.older_than


@dataclass(frozen=True, slots=True)
class _Box:
    """The dead letters of a task, as far as nobody else looks at them."""

    settings: Settings
    queues: topology.Queues
    connection: AbstractConnection
    waiting: int

    async def letters(
        self, wanted: Filter
    ) -> AsyncIterator[tuple[Letter, AbstractIncomingMessage]]:
        """Yield those that are meant, as they lie; unsettled ones go back when all is closed."""
        arrived: asyncio.Queue[AbstractIncomingMessage] = asyncio.Queue()
        timeout = self.settings.connect_timeout
        try:
            async with asyncio.timeout(timeout):
                channel = await self.connection.channel()
                queue = await channel.get_queue(self.queues.dead, ensure=False)
                await queue.consume(arrived.put)
            for _ in range(self.waiting):
                async with asyncio.timeout(timeout):
                    delivery = await arrived.get()
                letter = Letter.of(delivery)
                if wanted.matches(letter):
                    yield letter, delivery
        except broker.FAILURES as error:
            raise broker.explain(error, self.queues.dead) from error

    async def settle(self, delivery: AbstractIncomingMessage) -> None:
        """Take one out for good."""
        try:
            async with asyncio.timeout(self.settings.connect_timeout):
                await delivery.ack()
        except broker.FAILURES as error:
            raise broker.explain(error, self.queues.dead) from error


async def show_list(settings: Settings, task: AnyTask, wanted: Filter, *, as_json: bool) -> None:
    """Print the dead letters, one a line.

    Raises:
        BrokerError: RabbitMQ cannot be asked.
    """
    listed = 0
    async with _open(settings, task) as box:
        async for letter, _delivery in box.letters(wanted):
            say(json.dumps(asdict(letter)) if as_json else letter.line)
            listed += 1
    if not as_json:
        console.tell(f"{count(listed, 'dead letter')} of {task.name}")


async def show_one(settings: Settings, task: AnyTask, message_id: str, *, as_json: bool) -> None:
    """Print all that is known of the letters with an id: headers and body.

    Raises:
        AioworkerError: There is none.
        BrokerError: RabbitMQ cannot be asked.
    """
    found = False
    async with _open(settings, task) as box:
        async for letter, delivery in box.letters(Filter(ids=frozenset({message_id}))):
            found = True
            body = delivery.body.decode("utf-8", "backslashreplace")
            if as_json:
                headers = {name: _text(value) for name, value in delivery.headers.items()}
                say(json.dumps({**asdict(letter), "headers": headers, "body": body}))
                continue
            say(letter.line)
            for name, value in sorted(delivery.headers.items()):
                say(f"{name}: {_text(value)}")
            say("")
            say(body)
    if not found:
        raise AioworkerError(f"no dead letter of {task.name} has the id {message_id!r}")


async def requeue(settings: Settings, task: AnyTask, wanted: Filter) -> None:
    """Publish letters to their lanes again, each confirmed before it leaves the dead letters.

    Their attempts are counted anew.

    Raises:
        BrokerError: One is not confirmed: it stays, with those behind it; a note says how many
            went before.
    """
    done = 0
    name = "aioworker dead requeue"
    async with (
        _open(settings, task) as box,
        broker.Publisher(settings.amqp_url, settings.connect_timeout, name) as publisher,
    ):
        async for letter, delivery in box.letters(wanted):
            lane = box.queues.urgent if letter.lane == "urgent" else box.queues.bulk
            try:
                await publisher.publish(lane, outcome.revived(delivery))
                await box.settle(delivery)
            except (AioworkerError, asyncio.CancelledError) as error:
                error.add_note(f"requeued {count(done, 'dead letter')} before that")
                raise
            done += 1
    say(f"requeued {count(done, 'dead letter')} of {task.name}")


async def drop(settings: Settings, task: AnyTask, wanted: Filter, *, yes: bool) -> None:
    """Take letters away for good, after asking.

    Raises:
        AioworkerError: Nobody said yes; nothing was dropped.
        BrokerError: RabbitMQ cannot be asked.
    """
    async with _open(settings, task) as box:
        found = [one async for one in box.letters(wanted)]
        what = count(len(found), "dead letter")
        if found and not yes:
            for letter, _delivery in found:
                console.tell(letter.line)
            if not await asyncio.to_thread(
                console.confirm, f"drop {what} of {task.name} for good?"
            ):
                raise AioworkerError("dropped nothing; --yes drops without asking")
        for _letter, delivery in found:
            await box.settle(delivery)
    say(f"dropped {what} of {task.name}")


@asynccontextmanager
async def _open(settings: Settings, task: AnyTask) -> AsyncIterator[_Box]:
    """Look at the dead letters that are there now."""
    queues = topology.Queues.of(task.name)
    timeout = settings.connect_timeout
    async with broker.connection(
        settings.amqp_url, timeout, "aioworker dead", careful=True
    ) as connection:
        waiting = await topology.check(connection, (queues.dead,), timeout)
        yield _Box(settings, queues, connection, waiting)


def _text(value: Any) -> str | None:
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return None if value is None else str(value)


def _number(value: Any) -> int | None:
    return value if type(value) is int else None


def _moment(text: str | None) -> datetime | None:
    try:
        moment = datetime.fromisoformat(text or "")
    except ValueError:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
