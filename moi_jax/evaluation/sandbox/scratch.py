"""The directory of a program in the weak sandbox: whatever it holds in the end is removed."""

import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress

PASSES = 100_000  # over the entries of the directory; a process that was left behind may add more


@contextmanager
def scratch_directory() -> Iterator[str]:
    """An empty directory, which is removed afterwards, whatever a program has made of it."""
    path = tempfile.mkdtemp(prefix="moi_jax_")
    top = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield path
    finally:
        # What cannot be removed is not worth an error.
        with suppress(OSError):
            _empty(top)
        with suppress(OSError):  # the program may have moved it
            os.rmdir(os.readlink(f"/proc/self/fd/{top}"))
        os.close(top)
        with suppress(OSError):  # and put a link or a file into its place
            os.rmdir(path) if _is_directory(path, None) else os.unlink(path)


def _empty(top: int) -> None:
    """Removes all that is in a directory, and follows no link.

    A program can nest directories so deep that recursion, open files or the length of a path reach
    their limit. So the entries of each directory are moved up to the top before it is removed.
    """
    prefix = secrets.token_hex(8)
    moved = 0
    os.fchmod(top, 0o700)
    for _ in range(PASSES):
        names = os.listdir(top)
        if not names:
            return
        for name in names:
            if not _is_directory(name, top):
                os.unlink(name, dir_fd=top)
                continue
            os.chmod(name, 0o700, dir_fd=top)
            directory = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=top)
            try:
                for entry in os.listdir(directory):
                    moved += 1
                    _move(entry, directory, f"{prefix}{moved}", top)
            finally:
                os.close(directory)
            os.rmdir(name, dir_fd=top)


def _move(entry: str, directory: int, name: str, top: int) -> None:
    if _is_directory(entry, directory):
        os.chmod(entry, 0o700, dir_fd=directory)  # without the right to write it cannot be moved
    os.rename(entry, name, src_dir_fd=directory, dst_dir_fd=top)


def _is_directory(name: str, parent: int | None) -> bool:
    return stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)
