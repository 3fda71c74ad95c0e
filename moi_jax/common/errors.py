"""Errors and exit status: 0 done, 2 a mistake of the user, 1 a fault of ours."""

import os
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path


class UserError(Exception):
    """A mistake that the user can fix; its one-line message says what is wrong and what to do."""


def cannot_write(path: Path, error: Exception) -> UserError:
    """The error for a failed write, in one line, also where a library wraps the system's reason."""
    reason = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())
    if "No space left" in reason:
        reason = "no space left on the device"
    return UserError(f"cannot write {path}: {reason[:200]}; nothing was left behind")


def run_command(main: Callable[[], int | None]) -> None:
    """Runs a command's main and leaves the process with its exit status.

    A `UserError` is printed as one line on standard error, and the exit status is 2. Any other
    error is a fault of ours: Python prints its traceback and exits with 1. If the reader of
    standard output has closed it, as `head` does, the command ends silently, as after SIGPIPE.
    """
    try:
        try:
            status: int | str | None = main() or 0
        except SystemExit as leaving:  # from argparse
            status = leaving.code
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 2
        if sys.stdout:
            sys.stdout.flush()
    except BrokenPipeError:
        if not (sys.stdout and _reader_has_left()):
            raise
        # Python flushes standard output once more at exit, and must not fail there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE
    sys.exit(status)


def _reader_has_left() -> bool:
    """Whether the broken pipe is standard output, and not a pipe of our own."""
    poll = select.poll()
    poll.register(sys.stdout, 0)  # errors are reported whatever the mask says
    return bool(poll.poll(0))
