"""Dead letters: what was set aside for a person, seen, brought back, taken away."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

from aioworker import console, words
from aioworker.commands import meant
from aioworker.commands.letters import Filter, Letter, text
from aioworker.commands.look import Look
from aioworker.console import say
from aioworker.errors import AioworkerError, QueueMissingError
from aioworker.rabbitmq.connection import connected
from aioworker.rabbitmq.publisher import Publisher
from aioworker.rabbitmq.queues import Queues
from aioworker.words import count

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence

    from aio_pika.abc import AbstractConnection, AbstractIncomingMessage

    from aioworker.settings import Settings

INDENT = 4 * " "


async def show_list(
    settings: Settings, names: Sequence[str], wanted: Filter, *, as_json: bool
) -> None:
    """Print the dead letters of tasks, one a line; of several each line begins with the task.

    Args:
        settings: The settings.
        names: The tasks' names.
        wanted: Which letters are meant.
        as_json: Print JSON.

    Raises:
        BrokerError: RabbitMQ cannot be asked; a note says how many were listed before.
        AioworkerError: Those of several tasks cannot be listed, for these reasons; those of
            the others are.
    """
    failures: list[AioworkerError] = []
    several = len(names) > 1
    async with _connected(settings) as letters:
        for name in names:
            try:
                async with letters.of(name) as look:
                    await _list(look, name, wanted, as_json=as_json, of_several=several)
            except AioworkerError as error:
                failures.append(error)
                if letters.lost:
                    break
    if len(failures) == 1:
        raise failures[0]
    if failures:
        texts = ["; ".join([str(one), *getattr(one, "__notes__", [])]) for one in failures]
        raise AioworkerError("; ".join(texts)) from ExceptionGroup("not listed", failures)


async def _list(look: Look, name: str, wanted: Filter, *, as_json: bool, of_several: bool) -> None:
    listed = 0

    def show(letter: Letter, _delivery: AbstractIncomingMessage) -> str:
        nonlocal listed
        if wanted.matches(letter):
            line = f"{name}: {letter.line}" if of_several else letter.line
            say(words.as_json({"task": name, **asdict(letter)}) if as_json else line)
            listed += 1
        return look.queues.dead

    def note() -> str:
        of = f" of {name}" if of_several else ""
        twice = ", and the last may lie there twice" if look.unsure else ""
        return f"listed {count(listed, 'dead letter')}{of} before that{twice}"

    with _noting(note):
        await look.each(show, "looked at", quiet=sys.stdout.isatty())
    if not as_json:
        console.tell(f"{count(listed, 'dead letter')} of {name}")


async def show_one(settings: Settings, name: str, message_id: str, *, as_json: bool) -> None:
    """Print all that is known of the letters with an id: headers and body.

    Raises:
        AioworkerError: There is none.
        BrokerError: RabbitMQ cannot be asked.
    """
    wanted = Filter(ids=frozenset({message_id}))
    found: set[str] = set()

    def show(letter: Letter, delivery: AbstractIncomingMessage) -> str:
        if wanted.matches(letter):
            found.update(letter.names)
            _show_whole(name, letter, delivery, as_json=as_json)
        return look.queues.dead

    async with _open(settings, name) as look:
        await look.each(show, "looked at", quiet=sys.stdout.isatty())
    _expect_found(name, wanted, found)


def _show_whole(
    task: str, letter: Letter, delivery: AbstractIncomingMessage, *, as_json: bool
) -> None:
    body = delivery.body.decode("utf-8", "backslashreplace")
    if as_json:
        headers = {name: text(value) for name, value in delivery.headers.items()}
        whole = {"task": task, **asdict(letter), "headers": headers, "body": body}
        say(words.as_json(whole))
        return
    say(letter.line)
    # Indented, since a sender chooses the names too: none can look like a line of ours.
    for header, value in sorted(delivery.headers.items()):
        say(f"{INDENT}{header}: {text(value)}")
    say("")
    say(f"{INDENT}body: {body}")


async def requeue(settings: Settings, name: str, wanted: Filter) -> None:
    """Publish letters to their lanes again, each confirmed before it leaves the dead letters.

    Their attempts are counted anew. No more are looked at than there were at the beginning:
    a worker may set them aside again as fast as they come.

    Raises:
        AioworkerError: An id that is meant is not there; the others are requeued.
        BrokerError: One is not confirmed: it stays, with those behind it; a note says how many
            went before.
    """
    found: set[str] = set()

    def bring_back(letter: Letter, _delivery: AbstractIncomingMessage) -> str:
        if not wanted.matches(letter):
            return look.queues.dead
        found.update(letter.names)
        return look.queues.urgent if letter.lane == "urgent" else look.queues.bulk

    def note() -> str:
        also = ", of which the last 1 may lie here as well" if look.perhaps_gone else ""
        done = look.gone + look.perhaps_gone
        return f"requeued {count(done, 'dead letter')} before that{also}"

    async with _open(settings, name) as look:
        with _noting(note):
            await look.each(bring_back, "requeueing:")
    say(f"requeued {count(look.gone, 'dead letter')} of {name}")
    if look.came:
        console.tell(f"{count(look.came, 'dead letter')} came meanwhile, and stayed")
    _expect_found(name, wanted, found)


async def preview(settings: Settings, name: str, wanted: Filter) -> Counter[Letter]:
    """Tell a person which letters are meant; all lie there again when this returns.

    Raises:
        BrokerError: RabbitMQ cannot be asked.
    """
    shown: Counter[Letter] = Counter()

    def note(letter: Letter, _delivery: AbstractIncomingMessage) -> str:
        if wanted.matches(letter):
            shown[letter] += 1
        return look.queues.dead

    async with _open(settings, name) as look:
        await look.each(note, "looked at")
    for letter in shown.elements():
        console.tell(letter.line)
    return shown


async def drop(
    settings: Settings, name: str, wanted: Filter, shown: Counter[Letter] | None = None
) -> None:
    """Take letters away for good.

    Args:
        settings: The settings.
        name: The task's name.
        wanted: Which are meant.
        shown: What somebody was shown of them: nothing else goes. None for all.

    Raises:
        AioworkerError: An id that is meant is not there; the others are dropped.
        BrokerError: RabbitMQ did not answer; a note says how many went before.
    """
    found: set[str] = set()
    left = None if shown is None else Counter(shown)

    def take_away(letter: Letter, _delivery: AbstractIncomingMessage) -> str | None:
        if not wanted.matches(letter) or (left is not None and not left[letter]):
            return look.queues.dead
        if left is not None:
            left[letter] -= 1
        found.update(letter.names)
        return None

    def note() -> str:
        perhaps = ", and perhaps 1 more" if look.perhaps_gone else ""
        return f"dropped {count(look.gone, 'dead letter')} before that{perhaps}"

    async with _open(settings, name) as look:
        with _noting(note):
            await look.each(take_away, "dropping:", copies=left is not None or wanted != Filter())
    say(f"dropped {count(look.gone, 'dead letter')} of {name}")
    if left is not None and (gone := left.total()):
        console.tell(f"{count(gone, 'dead letter')} of those shown did not lie there any more")
    _expect_found(name, wanted, found)


def _expect_found(name: str, wanted: Filter, found: Iterable[str]) -> None:
    """Say which of the ids that are meant no letter has.

    Raises:
        AioworkerError: There are such.
    """
    absent = sorted(wanted.ids.difference(found))
    if absent:
        raise AioworkerError(f"no dead letter of {name} has the id {', '.join(map(repr, absent))}")


@contextmanager
def _noting(note: Callable[[], str]) -> Iterator[None]:
    """Add to an error, and to an end by a signal, how far the work was."""
    try:
        yield
    except (AioworkerError, asyncio.CancelledError) as error:
        error.add_note(note())
        raise


class _Letters:
    """The dead letters of one task after another, over the same two connections."""

    def __init__(
        self, settings: Settings, connection: AbstractConnection, publisher: Publisher
    ) -> None:
        self._settings = settings
        self._connection = connection
        self._publisher = publisher
        self._users = {node.user for node in settings.nodes()}

    @property
    def lost(self) -> bool:
        """Whether no more can be seen, of any task."""
        return self._connection.is_closed

    @asynccontextmanager
    async def of(self, name: str) -> AsyncIterator[Look]:
        """Look at the dead letters of a task, registered or not.

        Raises:
            UnknownTaskError: Neither the task nor its queue is known; the text has the nearest
                name.
            BrokerError: RabbitMQ cannot be asked.
        """
        queues = Queues.of(name, self._settings.queue_prefix)
        timeout = self._settings.connect_timeout
        look = Look(queues, self._users, self._connection, self._publisher, timeout)
        try:
            await look.open()
        except QueueMissingError as error:
            raise await meant.missing(self._settings, name, queues.dead) from error
        try:
            yield look
        finally:
            await look.close()


@asynccontextmanager
async def _connected(settings: Settings) -> AsyncIterator[_Letters]:
    nodes, timeout, own = settings.nodes(), settings.connect_timeout, "aioworker dead"
    async with (
        connected(nodes, timeout, own, careful=True) as connection,
        Publisher(nodes, timeout, own) as publisher,
    ):
        yield _Letters(settings, connection, publisher)


@asynccontextmanager
async def _open(settings: Settings, name: str) -> AsyncIterator[Look]:
    """Look at the dead letters of a task, as `_Letters.of` does."""
    async with _connected(settings) as letters, letters.of(name) as look:
        yield look
