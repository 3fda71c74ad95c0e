"""Runs a command: its output, the signals that end it, and its exit status."""

import errno
import logging
import os
import select
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO

from moi_jax.cli.hosts import fail_together, leave_hosts
from moi_jax.cli.signals import ending_on_signals, stopped_by
from moi_jax.common.errors import UserError, is_full, reason

# What the user's machine refuses.
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
CANNOT_PRINT = "error: cannot write standard output: {}"
READER_LEFT = 128 + signal.SIGPIPE

Outcome = tuple[int | str | None, str]  # exit status, line on standard error


def run_command(main: Callable[[], int | None]) -> None:
    """Runs a command's main and leaves the process with its exit status, see docs/training.md.

    A mistake of the user, a refusal of the machine and a signal are told in one line on standard
    error. Any other error is a fault of ours: Python prints its traceback and exits with 1. Where
    other processes take part, they are told and end too.

    A character that the encoding of the output does not have is shown as an escape. If the output
    cannot be written, the exit status says so: as after SIGPIPE where its reader has left, as
    `head` does, else 2.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream:  # it is None where it was closed
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    # It warns where there is no home directory for its cache of fonts.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    with ending_on_signals():
        try:
            status, line = _outcome(main)
        except Exception:
            fail_together(1, None)
            raise
        fail_together(status, line)
    failure = _flush(sys.stdout) or _log_failure()
    if isinstance(failure, BrokenPipeError):
        status = READER_LEFT
    elif failure and not status:
        status, line = 2, CANNOT_PRINT.format(reason(failure))
    if line and sys.stderr:
        with suppress(OSError):
            print(line, file=sys.stderr)
    _flush(sys.stderr)
    sys.exit(status)


def _outcome(main: Callable[[], int | None]) -> Outcome:
    try:
        status = main() or 0
        leave_hosts()
        return status, ""
    except SystemExit as leaving:  # from argparse
        return leaving.code, ""
    except KeyboardInterrupt:  # from a chat
        return 128 + signal.SIGINT, stopped_by(signal.SIGINT)
    except UserError as error:
        return error.exit_status, f"error: {error}"
    except BrokenPipeError:
        if not _reader_has_left():
            raise
        return READER_LEFT, ""
    except UnicodeEncodeError as error:
        if error.encoding != sys.getfilesystemencoding():
            raise
        return 2, (
            f"error: the locale's encoding {error.encoding} has no file name {error.object!r}; "
            f"set the environment variable PYTHONUTF8=1"
        )
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        if not error.filename:  # files of ours are told before they get here
            return 2, CANNOT_PRINT.format(reason(error))
        way_out = "free some space" if is_full(error) else "get access to it, or name another"
        return 2, f"error: {error.filename}: {reason(error)}; {way_out}"


def _log_failure() -> OSError | None:
    """Why the log is incomplete, where the last of it could not be written."""
    from moi_jax.common.log import ConsoleHandler  # imports rich, which `--help` can do without

    handlers = logging.getLogger("moi_jax").handlers
    return next((h.failure for h in handlers if isinstance(h, ConsoleHandler)), None)


def _flush(stream: TextIO | None) -> OSError | None:
    """Flushes a stream; returns the error of one that cannot be written.

    Such a stream is closed off. Python flushes it once more at exit, and must not fail there.
    """
    if not stream:
        return None
    try:
        stream.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return error
    return None


def _reader_has_left() -> bool:
    """Whether the broken pipe is standard output or error, and not a pipe of our own."""
    poll = select.poll()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        poll.register(stream, 0)  # errors are reported whatever the mask says
    return bool(poll.poll(0))
