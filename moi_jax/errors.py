"""The user's mistakes, and how a command ends: 0 done, 2 the user's mistake, 1 a fault of ours."""

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
    fault of ours: Python prints its traceback and leaves with 1.
    """
    try:
        sys.exit(main() or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
