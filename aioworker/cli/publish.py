"""The commands `publish-all` and `publish`."""

from __future__ import annotations

import sys
from functools import partial
from typing import Annotated

import typer

from aioworker.cli import console
from aioworker.cli.common import App, TaskName, TaskOption, app_task, named, prepare, run
from aioworker.errors import UnknownTaskError, UsageError
from aioworker.words import count

ID_DIGITS = 20  # Python refuses to read numbers of thousands


def publish_all(  # noqa: PLR0913 - as many as the command has options
    name: TaskName = None,
    option: TaskOption = None,
    app_names: App = None,
    chunk_size: Annotated[
        str | None, typer.Option(metavar="N", help="Ids in one message, 1 to 1000.")
    ] = None,
    after: Annotated[
        int | None, typer.Option(metavar="ID", min=0, help="Begin behind this id; appends.")
    ] = None,
    append: Annotated[
        bool, typer.Option("--append", help="Publish even if an earlier sweep is still queued.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count the chunks, publish none.")
    ] = False,
    only_needed: Annotated[
        bool, typer.Option("--only-needed", help="Leave out what needs no writing.")
    ] = False,
) -> None:
    """Publish one message for every chunk of ids the task sweeps.

    Prints how many chunks and ids RabbitMQ has confirmed, and the last id. Cut short, it
    prints the command that goes on from there. While an earlier sweep is still queued it
    publishes nothing: exits 0 if that one advances, 1 if it stands still or is paused.
    Exits 0 when every message is confirmed, 1 when one is not.
    """
    from aioworker.commands import publish

    settings = prepare(app=app_names, chunk_size=chunk_size)
    task = app_task(settings, named(name, option))
    if dry_run:
        found = run(publish.count_all(settings, task, after=after or 0, only_needed=only_needed))
        console.say(f"would publish {count(found.chunks, 'chunk')}, {count(found.ids, 'id')}")
        return
    done = run(
        publish.publish_all(
            settings,
            task,
            after=after or 0,
            append=append or after is not None,
            only_needed=only_needed,
            note=console.note,
            progress=partial(console.progress, "publishing ids"),
            count_first=console.is_terminal(),
        )
    )
    if isinstance(done, publish.EarlierSweep):
        console.say(
            "published nothing: an earlier sweep is still queued,"
            f" {count(done.chunks, 'chunk')}, and {done.pace}; --append publishes all the same"
        )
        raise typer.Exit(0 if done.advances else 1)
    console.say(f"published {done}")


def publish(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[TASK] ID", help="The task, and ids; - reads them from standard input."
        ),
    ],
    option: TaskOption = None,
    app_names: App = None,
    bulk: Annotated[
        bool, typer.Option("--bulk", help="Use the bulk lane, behind the sweeps.")
    ] = False,
) -> None:
    """Publish single ids to the urgent lane: the surgical strike.

    Without a TASK: the only one that the app registers, or the main job. Exits 0 when every
    message is confirmed.
    """
    from aioworker.commands import publish

    settings = prepare(app=app_names)
    first = [] if _is_id(words[0]) else words[:1]
    try:
        task = app_task(settings, named(first, option))
    except UnknownTaskError as error:
        raise UsageError(f"{'expected ids, or a task first: ' if first else ''}{error}") from None
    ids = _numbers(words[len(first) :])
    if not ids:
        raise UsageError(f"expected publish [TASK] ID..., got no id: {' '.join(words)}")
    messages = run(publish.publish(settings, task, ids, urgent=not bulk))
    what = f"{count(len(ids), 'id')} in {count(messages, 'message')}"
    console.say(f"published {what} to the {'bulk' if bulk else 'urgent'} lane of {task.name}")


def _is_id(word: str) -> bool:
    """Whether a word stands for ids, and not for a task."""
    return word == "-" or (word.isascii() and word.isdigit())


def _numbers(words: list[str]) -> list[int]:
    """Return words as whole numbers, each once; `-` stands for those of standard input."""
    found = [
        word for text in words for word in (sys.stdin.read().split() if text == "-" else [text])
    ]
    for word in found:
        if word == "-" or not _is_id(word) or len(word) > ID_DIGITS:
            raise UsageError(f"expected ids as whole numbers, got: {word[:ID_DIGITS]!r}")
    return list(dict.fromkeys(map(int, found)))
