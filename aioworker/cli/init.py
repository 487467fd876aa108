"""The command `init`."""

from __future__ import annotations

from typing import Annotated

import typer

from aioworker.cli import console
from aioworker.cli.common import App, TaskNames, TaskOption, app_tasks, prepare, run
from aioworker.words import count

POLICIES = (
    "a policy such as delivery-limit, max-length, message-ttl or expires takes messages away from"
    " these queues, unseen by aioworker: `rabbitmqctl list_policies` shows it, docs/operations.md"
    " what it does"
)


def init(
    names: TaskNames = None,
    option: TaskOption = None,
    app_names: App = None,
    show: Annotated[
        bool, typer.Option("--print", help="Show what it would do, and the least privileges.")
    ] = False,
) -> None:
    """Make or upgrade the budget's tables and declare the queues; can be run again.

    Makes two tables in the database (none with AIOWORKER_BUDGET=worker), or adds what those of
    an earlier version lack, declares each task's four queues and waits until they outlive a
    broker that is killed. A queue that is there and differs is reported, and not changed.
    Without a TASK: all that the app registers, or the main job.
    """
    from aioworker.commands import init

    settings = prepare(app=app_names)
    tasks = app_tasks(settings, [*(names or []), *(option or [])])
    if show:
        console.say_all(run(init.plan(settings, tasks)))
    else:
        run(init.init(settings, tasks, _Report()))


class _Report:
    """A line for each thing that is made."""

    def locked(self, table: str, holders: str) -> None:
        """Say what the silence is for."""
        console.note(f"waiting for a lock on table {table}: {holders}")

    def table(self, name: str, became: str) -> None:
        """Say what became of it."""
        console.say(f"table {name}: {became}")

    def lacking(self, grant: str) -> None:
        """Say what somebody has to do."""
        console.say(f"lacking: {grant}")

    def queue(self, name: str, messages: int | None) -> None:
        """Say what became of it."""
        if messages is None:
            console.say(f"queue {name}: declared")
        else:
            counted = count(messages, "message")
            console.say(f"queue {name}: was there, RabbitMQ counts {counted}")

    def settling(self, seconds: float) -> None:
        """Say what the silence is for, and what nobody sees here."""
        console.note(POLICIES)
        console.note(f"waiting {seconds:g} s until the queues are safe")
