"""Atomic writes: a file or directory appears under its name only when it is complete."""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from moi_jax.common.errors import UserError, cannot_write

# Staging directories of this process.
_unfinished: set[Path] = set()


def remove_unfinished() -> None:
    """Removes what is half written, before a signal ends the process."""
    for directory in list(_unfinished):
        shutil.rmtree(directory, ignore_errors=True)


def check_new(path: Path) -> None:
    """Checks that `path` does not exist and can be written; raises UserError otherwise."""
    if path.exists() or path.is_symlink():
        raise UserError(f"{path} exists, and nothing is overwritten; name a new directory")
    try:
        _try_writing(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from None


def check_writable(directory: Path) -> None:
    """Makes the directory; raises UserError if nothing can be written into it."""
    try:
        _try_writing(directory)
    except OSError as error:
        raise cannot_write(directory, error) from None


def _try_writing(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory):
        pass


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yields a path to write a directory to; it is renamed to `path` when the block has ended.

        with atomic_directory(Path("out")) as staging:
            staging.mkdir()
            ...

    Raises:
      UserError: `path` exists, or cannot be written.
    """
    check_new(path)
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    _unfinished.add(beside)
    try:
        yield beside / "whole"
        (beside / "whole").rename(path)
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        _unfinished.remove(beside)


def write_texts(directory: Path, files: Mapping[str, str]) -> None:
    """Writes name -> text into a directory.

    Folders in the names are ignored: the names come from checkpoints, which may be malicious.
    """
    for name, text in files.items():
        (directory / Path(name).name).write_text(text, encoding="utf-8")


def atomic_write_text(path: Path, text: str) -> None:
    """Writes a text file under another name, then renames it: readers never see half of it."""
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
