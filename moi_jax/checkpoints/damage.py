"""The error of a damaged checkpoint."""

import errno
import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moi_jax.common.errors import UserError, reason

GONE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)


class DamagedCheckpoint(UserError):
    """A step that cannot be read, or is not as it was written.

    Attributes:
      reason: what is wrong, and in which file, in one line.
    """

    def __init__(self, step: Path, reason: object):
        self.step, self.reason = step, " ".join(str(reason).split())[:200]
        super().__init__(f"{step} is damaged or incomplete ({self.reason}); use another checkpoint")


@contextmanager
def reading(step: Path, item: str) -> Iterator[None]:
    """Raises DamagedCheckpoint for the errors of orbax and tensorstore while they read an item.

    What the system refuses, such as a file of another user, is no damage: it raises UserError.
    """
    failed: UserError | None = None
    try:
        yield
    except OSError as error:
        failed = cannot_read(step, error, item)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        failed = DamagedCheckpoint(step, f"{item}: {error}")
    except Exception as error:
        if type(error) is not Exception:  # which orbax raises where an array cannot be read
            raise
        failed = DamagedCheckpoint(step, f"{item}: {error}")
    if failed:
        forget_cut_off()
        raise failed from None


def forget_cut_off() -> None:
    """Forgets the reads or writes that orbax cut off when one of them failed.

    Each of them would print a traceback at the end of Python. Call it when the error, which holds
    them, is handled.
    """
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    gc.collect()


def cannot_read(step: Path, error: OSError, item: str = "") -> UserError:
    """The error of a file that is missing or cannot be read."""
    what = f"{error.filename or item or step}: {reason(error)}"
    if error.errno is None or error.errno in GONE:
        return DamagedCheckpoint(step, what)
    return UserError(f"cannot read {what}; get read access, or give the same command again")
