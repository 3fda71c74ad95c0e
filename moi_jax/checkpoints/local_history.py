"""Which local copies belong to the history of a run: a file in its directory tells."""

import re
from collections.abc import Sequence
from pathlib import Path

from moi_jax.common.atomic_files import atomic_write_text
from moi_jax.common.errors import UserError, reason
from moi_jax.common.retry import retried

# The file in the run directory that identifies the run in the hosts' own folders. It also names
# what belongs to the history of the run: the last start, and the copy from which that one went on.
RUN_ID = "run_id"


def read_history(directory: Path) -> list[str]:
    """The id of a run and its history; [] if there is none, or no id.

    The id names a folder that is removed, so anything else must not be taken for one.
    """
    file = directory / RUN_ID
    words = file.read_text(errors="replace").split() if file.is_file() else []
    return words if words and re.fullmatch("[0-9a-f]{32}", words[0]) else []


def write_history(directory: Path, words: Sequence[str], retry_seconds: int) -> None:
    """Writes the id of a run and its history; raises UserError if it cannot."""
    file, text = directory / RUN_ID, " ".join(words)
    try:
        retried(file, retry_seconds, lambda: atomic_write_text(file, text))
    except OSError as error:
        raise UserError(
            f"cannot write {file}, which says what local copies belong to the run: "
            f"{reason(error, directory)}; give the same command again when it can be written"
        ) from None


def forget_copies(directory: Path, retry_seconds: int = 0) -> None:
    """Leaves no copy in the history of a run that goes on without local saves.

    The file stays, without a history: an object store would keep the one that was removed here.

    Args:
      directory: of the run.
      retry_seconds: for how long a write is tried again when the store fails.

    Raises:
      UserError: it cannot be written.
    """
    if words := read_history(directory):
        write_history(directory, words[:1], retry_seconds)
