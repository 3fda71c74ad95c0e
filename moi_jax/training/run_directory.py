"""The run directory: locked by one run at a time; moved aside, but never deleted."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from moi_jax.common.errors import UserError, is_full, reason
from moi_jax.common.home import expand_home
from moi_jax.common.locations import STAGING_VARIABLE, is_url
from moi_jax.common.retry import PASSING
from moi_jax.parallel import hosts

# The lock file in every run directory. A directory without it is not a run directory.
LOCK = ".moi_jax.lock"
# In the local copy of a run that is in an object store: identifies the copy.
OWNER = ".moi_jax.owner"


@contextmanager
def run_directory(run_dir: Path, fresh: bool) -> Iterator[Path]:
    """Locks the directory of a run while the block runs; of many processes, process 0 does it.

    It yields the directory; of one in an object store, its local copy.

    Raises:
      UserError: another run trains in it; it holds files but no run (and `fresh` is false); it
        cannot be written, now or later in the block; or the hosts do not share it.
    """
    key = f"the local copy (${STAGING_VARIABLE}) of " * is_url(run_dir) + "logging.run_dir"
    run_dir = expand_home(run_dir)
    lock = _lock(run_dir, fresh) if hosts.is_main() else None
    try:
        hosts.check_shared(run_dir, key)
        with _writing(run_dir):
            yield run_dir
    finally:
        if lock:
            lock.release()


def _lock(run_dir: Path, fresh: bool) -> filelock.BaseFileLock:
    with _writing(run_dir):
        if not fresh and _entries(run_dir) and not (run_dir / LOCK).exists():
            raise UserError(
                f"{run_dir} holds files but is not a run directory; choose another "
                f"logging.run_dir, or use --fresh to move the files aside"
            )
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(run_dir / LOCK, timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise UserError(
                f"{run_dir} is in use by another run; wait for its end, or choose another "
                f"logging.run_dir"
            ) from None
    return lock


def move_aside(run_dir: Path) -> None:
    """Moves the content of a run directory to a new directory beside it."""
    entries = _entries(run_dir)
    if not entries:
        return
    with _writing(run_dir):
        stamp = time.strftime("%Y%m%d-%H%M%S")
        aside = Path(tempfile.mkdtemp(prefix=f"{run_dir.name}.{stamp}.", dir=run_dir.parent))
        for name in entries:
            (run_dir / name).rename(aside / name)


@contextmanager
def _writing(run_dir: Path) -> Iterator[None]:
    """Turns a write that the system refuses into a UserError."""
    try:
        yield
    except OSError as error:
        # The files that are open here, whose errors have no name, are those of the run.
        place = Path(error.filename or run_dir)
        inside = place == run_dir or run_dir in place.parents or place in run_dir.parents
        if not inside or not (error.filename or is_full(error)):
            raise
        named = f" ({place.name})" if run_dir in place.parents else ""
        what = reason(error, directory=run_dir)
        way_out = "choose another logging.run_dir, or get write access to this one"
        if is_full(error):
            way_out = "free some space, then give the same command again"
        elif error.errno in PASSING:
            way_out = "give the same command again when the store works"
        raise UserError(
            f"cannot write the run directory {run_dir}{named}: {what}; {way_out}"
        ) from None


def _entries(run_dir: Path) -> set[str]:
    """The names in a run directory except those that stay there; none if it does not exist."""
    names = {entry.name for entry in run_dir.iterdir()} if run_dir.exists() else set()
    return names - {LOCK, OWNER}
