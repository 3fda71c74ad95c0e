"""Writes that are tried again while a store fails for a while, as an NFS server that restarts."""

import errno
import logging
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep
from typing import TypeVar

from moi_jax.common.errors import reason

log = logging.getLogger(__name__)

T = TypeVar("T")

# What may pass by itself. A full disk and a refused access do not.
PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 15.0  # seconds


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
