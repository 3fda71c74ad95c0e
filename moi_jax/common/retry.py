"""Writes that are tried again while a store fails for a while, as an NFS server that restarts."""

import errno
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic, sleep
from typing import TypeVar

from moi_jax.common.errors import reason

log = logging.getLogger(__name__)

T = TypeVar("T")

# What may pass by itself while one waits for it. A full disk and a refused access do not.
PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 15.0  # seconds
# What does not pass while a run goes on, as the system and tensorstore say it.
REFUSED = ("Permission denied", "Operation not permitted", "Read-only file system")


def may_pass(error: Exception) -> bool:
    """Whether a write in the background that the system, or a library, refuses may do better later.

    A full disk may: somebody frees space while the run goes on.
    """
    late = isinstance(error, TimeoutError) and error.errno is None  # what was late may go on
    return not late and not any(refusal in str(error) for refusal in REFUSED)


def pauses(seconds: float) -> Iterator[float]:
    """The pauses between tries, longer and longer, which together take no longer than `seconds`.

    They are counted, not measured, so that all processes of a run give up at the same try.
    """
    pause, left = FIRST_PAUSE, seconds
    while left >= pause:
        yield pause
        left -= pause
        pause = min(2 * pause, LONGEST_PAUSE)


def retried(path: Path, seconds: float, write: Callable[[], T]) -> T:
    """Calls `write`, and calls it again while the store of `path` fails in a way that may pass.

    Args:
      seconds: for how long; 0 means once.

    Raises:
      OSError: the last failure, with the name of the file.
    """
    deadline, pause = monotonic() + seconds, FIRST_PAUSE
    while True:
        try:
            return write()
        except OSError as error:
            if error.errno not in PASSING:
                raise
            if monotonic() + pause > deadline:
                raise OSError(error.errno, error.strerror, str(path)) from None
            log.warning("cannot write %s: %s; trying again in %.0f s", path, reason(error), pause)
        sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
