"""A database that answers a worker's questions about itself as a test has it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aioworker.addresses import DatabaseAddress
from aioworker.mysql.database import Database

if TYPE_CHECKING:
    from aioworker.errors import DatabaseError

NOWHERE = DatabaseAddress.parse("mysql://nobody@127.0.0.1:1/none")


class MemoryDatabase(Database):
    """One connection, to nowhere.

    Attributes:
        open: Whether the connection stands.
        away: Why none can be had; None while one can.
        no_room: What the server said in a run if it had no room.
        runs: How many runs were ended.
        closed: How often the connection was closed.
    """

    def __init__(self) -> None:
        super().__init__(NOWHERE, connect_timeout=1, timeout=1)
        self.open = True
        self.away: DatabaseError | None = None
        self.no_room: DatabaseError | None = None
        self.runs = 0
        self.closed = 0

    @property
    def is_open(self) -> bool:
        """Whether the connection stands."""
        return self.open

    async def ready(self) -> None:
        """Connect, if it is not."""
        if self.away is not None:
            raise self.away
        self.open = True

    def close(self) -> None:
        """Close the connection."""
        self.open = False
        self.closed += 1

    def take_no_room(self) -> DatabaseError | None:
        """Return what the server said in a run if it had no room, once."""
        found, self.no_room = self.no_room, None
        return found

    def end_run(self) -> None:
        """Count the run."""
        self.runs += 1
