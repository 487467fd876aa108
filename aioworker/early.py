"""What the command line does before it imports anything else; nothing in any other process.

`python -m` puts the current folder first on the path: what lies there would be executed in place
of the modules that are meant. A SIGHUP would end the worker that it is to reload, and Ctrl-C
print a traceback.
"""

import sys  # built in: the path is not right yet

NAME, WORKER = "aioworker", "consume"
came: set[int] = set()  # the signals that were kept
kept: set[int] = set()  # those that are


def _started() -> str:
    """Return the script or module that Python was started with, by its name alone."""
    # A child that multiprocessing spawns has its parent's `argv`, and another command line.
    place = len(sys.orig_argv) - len(sys.argv)
    started = sys.orig_argv[place] if place >= 0 else ""
    return started.removeprefix("-m").rpartition("/")[2]


def _leave_folder_out() -> None:
    """Take the current folder from the path if `python -m` has put it there."""
    import os  # loaded before the folder was put on the path

    if sys.argv[0] != "-m" or sys.flags.safe_path:
        return
    try:
        if sys.path[0] in ("", os.getcwd()):
            del sys.path[0]
    except FileNotFoundError:  # the folder is gone: Python has not put it there
        return


def keep() -> None:
    """Keep SIGHUP in `came`; SIGTERM and SIGINT too if they waited for this code.

    They are not blocked: what a module starts would inherit that.
    """
    import signal

    if kept:
        return
    numbers = {signal.SIGHUP}
    if signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ()):
        numbers |= {signal.SIGTERM, signal.SIGINT}
    for number in numbers:
        signal.signal(number, lambda received, _frame: came.add(received))
    kept.update(numbers)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)


def _begin() -> None:
    _leave_folder_out()
    import signal

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if next((word for word in sys.argv[1:] if word[:1] != "-"), None) == WORKER:
        keep()


if _started() == NAME:
    _begin()
