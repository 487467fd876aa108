"""What tasks, and the budgets that they share, can be called."""

from __future__ import annotations

import re

from aioworker.errors import TaskError
from aioworker.rabbitmq.message import brief

NAME_LENGTH = 100
_NAME = re.compile(rf"[A-Za-z0-9_.-]{{1,{NAME_LENGTH}}}")
_RESERVED = (".urgent", ".retry", ".dead")  # a task's queues end so


def check_name(name: object) -> None:
    """Refuse what no task can be called.

    Raises:
        TaskError: It is that.
    """
    if not isinstance(name, str) or _NAME.fullmatch(name) is None or name.endswith(_RESERVED):
        raise TaskError(
            f"expected a task's name of 1 to {NAME_LENGTH} letters, digits, '_', '-' and '.', not"
            f" ending in {', '.join(_RESERVED)}, got: {brief(name)}"
        )


def check_budget_name(name: object) -> None:
    """Refuse what no budget can be called.

    Raises:
        TaskError: It is that.
    """
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise TaskError(
            f"expected a budget's name of 1 to {NAME_LENGTH} letters, digits, '_', '-' and '.',"
            f" got: {brief(name)}"
        )
