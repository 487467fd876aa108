"""A budget that tasks share: what all of them together may start."""

from __future__ import annotations

from aioworker.errors import RateLimitError, TaskError
from aioworker.limits import NoLimit, RateLimit, parse_limit
from aioworker.rabbitmq.message import brief
from aioworker.tasks.names import check_budget_name


class Budget:
    """One turn and one rate for several tasks, over all workers, in one database.

    Never two of its tasks run at once, and starts are an interval of its rate apart, whichever task
    they are of; a task's own `rate_limit` holds besides. It is made once, and given to each task
    as `@task(budget=…)`.

    Args:
        name: What `status` and `--budget` call it: up to 100 letters, digits, `_`, `-` and `.`.
        rate_limit: Starts in a unit of time, such as `"6/m"`; `"0/m"` is a pause; with `"none"`
            nothing is shared, unless a rate is set at run time.

    Attributes:
        rate_limit: The same, parsed; None is no limit.

    Raises:
        TaskError: It cannot be called that.
        RateLimitError: `rate_limit` is not COUNT/UNIT.
    """

    def __init__(self, name: str, *, rate_limit: str) -> None:
        check_budget_name(name)
        if not isinstance(rate_limit, str):
            raise TaskError(
                f"budget {name!r}: expected rate_limit such as '6/m', or 'none',"
                f" got: {brief(rate_limit)}"
            )
        try:
            said = parse_limit(rate_limit)
        except RateLimitError as error:
            raise RateLimitError(f"budget {name!r}: {error}") from None
        self.name = name
        self.rate_limit: RateLimit | None = None if said is NoLimit.NONE else said

    def __str__(self) -> str:
        """Return its rate limit, as a person writes it."""
        return str(self.rate_limit or NoLimit.NONE)

    def __repr__(self) -> str:
        return f"Budget({self.name!r}, rate_limit={str(self)!r})"
