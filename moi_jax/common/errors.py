"""The user's mistakes, and how a command ends: 0 done, 2 the user's mistake, 1 a fault of ours."""

import os
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path


class UserError(Exception):
    """A mistake the user can mend; the message is one line: what, where, and the way out."""


def cannot_write(path: Path, error: Exception) -> UserError:
    """What a failed write says; libraries wrap the system's reason in lines of their own."""
    reason = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())
    if "No space left" in reason:
        reason = "no space left on the device"
    return UserError(f"cannot write {path}: {reason[:200]}; nothing was left behind")


def run_command(main: Callable[[], int | None]) -> None:
    """Runs a command's main and leaves the process with its exit status.

    A `UserError` is printed as one line on standard error, exit status 2. Anything else is a
    fault of ours: Python prints its traceback and leaves with 1. When the reader of standard
    output has left, as `head` does, the command ends without a word, as by SIGPIPE.
    """
    try:
        try:
            status: int | str | None = main() or 0
        except SystemExit as left:  # of argparse
            status = left.code
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 2
        if sys.stdout:
            sys.stdout.flush()
    except BrokenPipeError:
        if not (sys.stdout and _reader_has_left()):
            raise
        # For Python's own flush at exit, of what could not be written.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE
    sys.exit(status)


def _reader_has_left() -> bool:
    """Whether it is standard output that broke, and no pipe of ours."""
    poll = select.poll()
    poll.register(sys.stdout, 0)  # errors are told in any case
    return bool(poll.poll(0))
