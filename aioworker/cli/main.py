"""The command line: reads options and settings, owns signals, logging and exit statuses.

Exit statuses: 0 done, 1 not done, 2 wrong usage or settings. What a command needs is
imported when it runs, so that help answers at once; and before the app's modules are, behind
which the current folder is on the path.
"""

from __future__ import annotations

import logging
import os
import signal
from typing import Annotated, Any

import typer

from aioworker.cli import console, consume, control, dead, history, publish, status
from aioworker.cli.common import end_process
from aioworker.errors import AioworkerError, UsageError, told
from aioworker.logs import journal_mark
from aioworker.worker import signals

_debug = False  # main() reports errors outside of any command's context

app = typer.Typer(
    name="aioworker",
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def main_options(
    ctx: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """Refresh database rows in the background, no faster than the database can stand.

    Exits 0 when done, 1 when not, 2 when the usage or a setting is wrong.
    """
    global _debug
    _debug = debug
    if ctx.invoked_subcommand is None:
        console.say_all(ctx.get_help())


app.command()(consume.init)
app.command(cls=consume.WithSettings)(consume.consume)
app.command()(publish.publish_all)
app.command()(publish.publish)
app.command()(status.status)
app.command()(status.health)
# A rate such as -1/m is no option.
app.command(context_settings={"ignore_unknown_options": True})(control.rate_limit)
app.command()(control.pause)
app.command()(control.resume)
app.command()(history.audit)
app.command()(history.history)
app.add_typer(dead.app)


def main() -> None:
    """Run the command line and exit with its status."""
    if os.getpid() == 1:
        signals.end_as_first_process(signal.SIGTERM)
    console.open_streams()
    try:
        status = app(standalone_mode=False)
    except AioworkerError as error:
        status = 2 if isinstance(error, UsageError) else 1
        _fail(error, "; ".join([str(error), *getattr(error, "__notes__", [])]))
    except _usage_error as error:
        status = 2
        _fail(error, f"{error.format_message()} `{_path(error)} --help` shows the usage.")
    except console.OutputError as error:
        status = 1
        _fail(error, f"cannot write to standard output: {error}")
    except Exception as error:  # noqa: BLE001 - a fault of ours, still one line
        status = 1
        _fail(error, f"unexpected {told(error)}; --debug shows where")
    end_process(status or 0)


# typer carries its own copy of click, whose errors have no public name.
_usage_error: Any = typer.BadParameter.__mro__[1]


def _path(error: Any) -> str:
    return error.ctx.command_path if error.ctx is not None else "aioworker"


def _fail(error: BaseException, line: str) -> None:
    if _debug:
        import traceback

        for part in "".join(traceback.format_exception(error)).rstrip("\n").split("\n"):
            console.note(part)
    mark = journal_mark(logging.ERROR)
    console.note(f"{mark}aioworker: {' '.join(line.split())}")
