"""Messages of all kinds, drawn at random, as the lanes of a busy site hold them."""

from __future__ import annotations

import random
from dataclasses import dataclass

import aio_pika

from tests.conftest import QUEUES
from tests.faults import junk
from tests.place import chunk

SIZE = 50  # add-ons that are a message's own
WEIGHTS = (10, 5, 2, 1, 1, 2)


@dataclass(frozen=True, slots=True)
class Message:
    """One message.

    Args:
        id: Its id, which says what it is.
        lane: The lane that it goes to.
        names: The add-ons that it names.
        writes: Those of them that it is to write; the others are right before.
        refused: The one of them that the data refuses.
        bad: What it is, where it is no chunk.
    """

    id: str
    lane: str
    names: list[int]
    writes: list[int]
    refused: int | None = None
    bad: junk.Bad | None = None

    @property
    def doomed(self) -> bool:
        """Whether it is to become a dead letter."""
        return self.refused is not None or self.bad is not None

    @property
    def right(self) -> set[int]:
        """The add-ons that are right before."""
        return {*self.names} - {*self.writes, self.refused}

    def outgoing(self) -> aio_pika.Message:
        """Return it as it is published."""
        sent = self.bad or junk.Bad((), chunk(*self.names))
        return aio_pika.Message(
            sent.body, headers=sent.headers | {"id": self.id}, content_type=sent.content_type
        )


def draw(seed: int, count: int) -> list[Message]:
    """Return so many messages; no two name the same add-on."""
    chance, bad = random.Random(seed), junk.draw(seed, count)

    def make(n: int) -> Message:
        ids = list(range(n * SIZE + 1, (n + 1) * SIZE + 1))
        lane, few = chance.choice([QUEUES.bulk, QUEUES.urgent]), ids[: chance.choice([1, 1, 5])]
        kinds = [
            Message(f"{n} chunk", lane, ids, ids),
            Message(f"{n} urgent", QUEUES.urgent, few, few),
            Message(f"{n} half right", lane, ids, ids[::2]),
            Message(f"{n} right", lane, ids, []),
            Message(f"{n} refused", lane, ids, ids[1:], refused=ids[0]),
            Message(f"{n} bad", lane, [], [], bad=bad[n]),
        ]
        return chance.choices(kinds, WEIGHTS)[0]

    return [make(n) for n in range(count)]
