"""Dead letters: what was set aside for a person, seen, brought back, taken away."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import NamedTuple

from aioworker.commands import which_tasks
from aioworker.errors import AioworkerError, QueueMissingError
from aioworker.rabbitmq.connection import Connection, connected
from aioworker.rabbitmq.dead_letters import DeadLetters, Progress, no_progress
from aioworker.rabbitmq.delivery import Message
from aioworker.rabbitmq.letter import Filter, Letter, text
from aioworker.rabbitmq.message import LOOK
from aioworker.rabbitmq.publisher import Publisher
from aioworker.rabbitmq.queues import Queues
from aioworker.settings import Settings
from aioworker.words import count


class Moved(NamedTuple):
    """What became of the letters that were to be requeued or dropped.

    Args:
        letters: How many went.
        others: Requeued: how many came meanwhile, and stayed. Dropped: how many of those that
            somebody was shown did not lie there any more.
        absent: The ids that were meant and that no letter has.
    """

    letters: int
    others: int
    absent: list[str]


async def read_all(
    settings: Settings,
    names: Sequence[str],
    wanted: Filter,
    *,
    show: Callable[[str, Letter], None],
    end: Callable[[str, int], None],
    progress: Progress = no_progress,
) -> None:
    """Read the dead letters of tasks; they stay.

    Args:
        settings: The settings.
        names: The tasks' names.
        wanted: Which letters are meant.
        show: Called with the task and each letter that is meant, at once.
        end: Called with the task and how many they were, behind its last one.
        progress: Shows how far it is with each task.

    Raises:
        BrokerError: RabbitMQ cannot be asked; a note says how many were shown before.
        AioworkerError: Those of several tasks cannot be read, for these reasons; those of
            the others are.
    """
    failures: list[AioworkerError] = []
    several = len(names) > 1
    async with _connected(settings) as (connection, publisher):
        for name in names:
            try:
                async with _letters_over(settings, name, connection, publisher) as look:
                    shown = await _read(look, name, wanted, show, progress, of_several=several)
                    end(name, shown)
            except AioworkerError as error:
                failures.append(error)
                if connection.is_closed:
                    break  # nor can those of any other task be read
    if len(failures) == 1:
        raise failures[0]
    if failures:
        texts = ["; ".join([str(one), *getattr(one, "__notes__", [])]) for one in failures]
        raise AioworkerError("; ".join(texts)) from ExceptionGroup("not listed", failures)


async def _read(
    look: DeadLetters,
    name: str,
    wanted: Filter,
    show: Callable[[str, Letter], None],
    progress: Progress,
    *,
    of_several: bool,
) -> int:
    """Show the letters of one task that are meant, and return how many they are."""
    shown = 0

    def stay(letter: Letter, _delivery: Message) -> str:
        nonlocal shown
        show(name, letter)
        shown += 1
        return look.queues.dead

    def note() -> str:
        of = f" of {name}" if of_several else ""
        twice = ", and the last may lie there twice" if look.unsure else ""
        return f"listed {count(shown, 'dead letter')}{of} before that{twice}"

    with _noting(note):
        await look.read(wanted, stay, progress)
    return shown


async def read_one(
    settings: Settings,
    name: str,
    message_id: str,
    show: Callable[[Letter, dict[str, str | None], str], None],
    progress: Progress = no_progress,
) -> bool:
    """Read the letters with an id whole; they stay.

    Args:
        settings: The settings.
        name: The task's name.
        message_id: The id.
        show: Called with each, at once: the letter; its headers as a person reads them, in the
            sender's order; its body, what is no UTF-8 escaped.
        progress: Shows how far it is.

    Returns:
        Whether there is one.

    Raises:
        BrokerError: RabbitMQ cannot be asked.
    """
    wanted = Filter(ids=frozenset({message_id}))
    found = False

    def stay(letter: Letter, delivery: Message) -> str:
        nonlocal found
        found = True
        headers = {name: text(value) for name, value in delivery.headers.items() if name != LOOK}
        show(letter, headers, delivery.body.decode("utf-8", "backslashreplace"))
        return look.queues.dead

    async with _letters_of(settings, name) as look:
        await look.read(wanted, stay, progress)
    return found


async def requeue(
    settings: Settings, name: str, wanted: Filter, progress: Progress = no_progress
) -> Moved:
    """Publish letters to their lanes again, each confirmed before it leaves the dead letters.

    Their attempts are counted anew. No more are looked at than there were at the beginning:
    a worker may set them aside again as fast as they come.

    Raises:
        BrokerError: One is not confirmed: it stays, with those behind it; a note says how many
            went before.
    """
    absent = set(wanted.ids)

    def bring_back(letter: Letter, _delivery: Message) -> str:
        absent.difference_update(letter.names)
        return look.queues.urgent if letter.lane == "urgent" else look.queues.bulk

    def note() -> str:
        also = ", of which the last 1 may lie here as well" if look.perhaps_gone else ""
        done = look.gone + look.perhaps_gone
        return f"requeued {count(done, 'dead letter')} before that{also}"

    async with _letters_of(settings, name) as look:
        with _noting(note):
            await look.read(wanted, bring_back, progress)
    return Moved(look.gone, look.came, sorted(absent))


async def preview(
    settings: Settings, name: str, wanted: Filter, progress: Progress = no_progress
) -> Counter[Letter]:
    """Return which letters are meant, for a person; all lie there again when this returns.

    Raises:
        BrokerError: RabbitMQ cannot be asked.
    """
    found: Counter[Letter] = Counter()

    def stay(letter: Letter, _delivery: Message) -> str:
        found[letter] += 1
        return look.queues.dead

    async with _letters_of(settings, name) as look:
        await look.read(wanted, stay, progress)
    return found


async def drop(
    settings: Settings,
    name: str,
    wanted: Filter,
    shown: Counter[Letter] | None = None,
    progress: Progress = no_progress,
) -> Moved:
    """Take letters away for good.

    Args:
        settings: The settings.
        name: The task's name.
        wanted: Which are meant.
        shown: What somebody was shown of them: nothing else goes. None for all.
        progress: Shows how far it is.

    Raises:
        BrokerError: RabbitMQ did not answer; a note says how many went before.
    """
    absent = set(wanted.ids)
    left = None if shown is None else Counter(shown)

    def take_away(letter: Letter, _delivery: Message) -> str | None:
        if left is not None:
            if not left[letter]:
                return look.queues.dead
            left[letter] -= 1
        absent.difference_update(letter.names)
        return None

    def note() -> str:
        perhaps = ", and perhaps 1 more" if look.perhaps_gone else ""
        return f"dropped {count(look.gone, 'dead letter')} before that{perhaps}"

    async with _letters_of(settings, name) as look:
        with _noting(note):
            some_stay = left is not None or wanted != Filter()
            await look.read(wanted, take_away, progress, copies=some_stay)
    return Moved(look.gone, 0 if left is None else left.total(), sorted(absent))


@contextmanager
def _noting(note: Callable[[], str]) -> Iterator[None]:
    """Add to an error, and to an end by a signal, how far the work was."""
    try:
        yield
    except (AioworkerError, asyncio.CancelledError) as error:
        error.add_note(note())
        raise


@asynccontextmanager
async def _connected(settings: Settings) -> AsyncIterator[tuple[Connection, Publisher]]:
    """Connect twice: letters are read over one connection, their copies go over the other."""
    nodes, timeout, own = settings.nodes(), settings.connect_timeout, "aioworker dead"
    async with (
        connected(nodes, timeout, own, tolerant=True) as connection,
        Publisher(nodes, timeout, own) as publisher,
    ):
        yield connection, publisher


@asynccontextmanager
async def _letters_over(
    settings: Settings, name: str, connection: Connection, publisher: Publisher
) -> AsyncIterator[DeadLetters]:
    """Open the dead letters of a task, registered or not.

    Raises:
        UnknownTaskError: Neither the task nor its queue is known; the text has the nearest name.
        BrokerError: RabbitMQ cannot be asked.
    """
    queues = Queues.of(name, settings.queue_prefix)
    users = {node.user for node in settings.nodes()}
    look = DeadLetters(queues, users, connection, publisher, settings.connect_timeout)
    try:
        await look.open()
    except QueueMissingError as error:
        raise await which_tasks.missing(settings, name, queues.dead) from error
    try:
        yield look
    finally:
        await look.close()


@asynccontextmanager
async def _letters_of(settings: Settings, name: str) -> AsyncIterator[DeadLetters]:
    """Connect, and open the dead letters of one task."""
    async with _connected(settings) as servers, _letters_over(settings, name, *servers) as look:
        yield look
