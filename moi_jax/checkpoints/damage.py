"""The error of a damaged checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moi_jax.common.errors import UserError


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
    """Raises DamagedCheckpoint for the errors of orbax and tensorstore while they read an item."""
    try:
        yield
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise DamagedCheckpoint(step, f"{item}: {error}") from None
    except Exception as error:
        if type(error) is not Exception:  # which orbax raises where an array cannot be read
            raise
        raise DamagedCheckpoint(step, f"{item}: {error}") from None
