"""Leftovers: the unfinished folders of killed runs, told apart from those that are being built.

A run builds folders named `<name>.<id>.<run>.part`. Meanwhile it holds the lock of the file
`<run>.<boot>.alive`, which the kernel frees when the process ends, however it ends. Machines that
share a disk may not see each other's locks, so a run trusts only the locks of its own machine,
which the boot id names. All other leftovers are removed when they are a day old.
"""

import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path

import filelock

PART, ALIVE = ".part", ".alive"
ABANDONED_SECONDS = 24 * 3600
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # Linux only; all containers have the same


def part_of(directory: Path, run: str) -> Path:
    """A new name beside `directory`, under which a run builds it."""
    return directory.with_name(f"{directory.name}.{uuid.uuid4().hex}.{run}{PART}")


@contextmanager
def running(folders: Sequence[Path], run: str) -> Iterator[None]:
    """Marks the run as alive, and removes what it and killed runs have left in the folders.

    Args:
      folders: where the run builds; they are made if they are missing. The first one holds the
        lock.

    Raises:
      OSError: a folder cannot be written.
    """
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folders[0] / f"{run}.{_boot()}{ALIVE}")
    with lock:
        try:
            _sweep(folders)
            yield
        finally:
            _remove_parts(folders, run)
            Path(lock.lock_file).unlink(missing_ok=True)


def _boot() -> str:
    """The id of the running kernel; "" where it is not known."""
    return BOOT_ID.read_text(encoding="ascii").strip() if BOOT_ID.exists() else ""


def _sweep(folders: Sequence[Path]) -> None:
    boot = _boot()
    for path in folders[0].glob(f"*.{boot}{ALIVE}") if boot else ():
        with suppress(filelock.Timeout), filelock.FileLock(path, timeout=0):
            _remove_parts(folders, path.name.partition(".")[0])
            path.unlink(missing_ok=True)
    for path in chain(*(folder.glob(f"*{end}") for folder in folders for end in (PART, ALIVE))):
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime < ABANDONED_SECONDS:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


def _remove_parts(folders: Sequence[Path], run: str) -> None:
    for folder in folders:
        for part in folder.glob(f"*.{run}{PART}"):
            shutil.rmtree(part, ignore_errors=True)
