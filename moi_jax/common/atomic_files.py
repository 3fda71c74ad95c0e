"""Files and directories that are there only when whole."""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from moi_jax.common.errors import UserError, cannot_write


def check_new(path: Path) -> None:
    """Raises UserError where nothing can be written as `path`."""
    if path.exists() or path.is_symlink():
        raise UserError(f"{path} exists; name a new directory, nothing is overwritten")
    try:
        _try_writing(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from None


def check_writable(directory: Path) -> None:
    """Makes the directory; raises UserError where nothing can be written into it."""
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
    """Where to write what is to be `path`: beside it, and it appears there only when whole."""
    check_new(path)
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield beside / "whole"
        (beside / "whole").rename(path)
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def write_texts(directory: Path, files: Mapping[str, str]) -> None:
    """Writes files by their names alone: they come from checkpoints, which may be a stranger's."""
    for name, text in files.items():
        (directory / Path(name).name).write_text(text, encoding="utf-8")


def atomic_write_text(path: Path, text: str) -> None:
    """Writes a file so that it is never seen half: beside it, then renamed."""
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
