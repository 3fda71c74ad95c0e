"""Paths: finds the files that the path of a source names, a glob or a directory."""

import glob
import logging
import os
import re
from itertools import takewhile
from pathlib import Path

from moi_jax.common.errors import UserError

log = logging.getLogger(__name__)

# The ending of a file of rows in a directory: .jsonl, .csv.gz, .array_record-00001-of-00002.
ROWS = re.compile(
    r"\.(jsonl|ndjson|json|csv|tsv|parquet|array_record|arrayrecord)(-\d+-of-\d+)?(\.gz|\.zst)?$"
)

# The ending of an archive or of a compressed file that cannot be read.
PACKED = re.compile(r"\.(bz2|xz|lzma|lz4|br|zip|7z|rar|tar|tgz|tar\.(gz|zst))$")


def find_files(root: Path, path: str) -> list[str]:
    """The names of the files relative to `root`, sorted.

    Args:
      path: a glob; or a directory, for the files in and below it that have the ending of a file of
        rows. Hidden files are left out.

    Raises:
      UserError: there is no such file, or something that has the name of one is not a file.
    """
    directory = (root / path).is_dir()
    pattern = os.path.join(glob.escape(path), "**", "*") if directory else path
    _refuse_loops(root, pattern)
    names = sorted(set(glob.glob(pattern, root_dir=root, recursive=True)))
    if directory:
        _tell_packed(path, [name for name in names if PACKED.search(name.lower())])
        names = [name for name in names if ROWS.search(name.lower())]
    folders = {name for name in names if (root / name).is_dir()}
    files = [name for name in names if name not in folders]
    for name in files:
        if not (root / name).is_file():
            raise UserError(
                f"{root / name} is not a file that can be read: it is a link to nothing or to "
                f"itself, or a device; remove it"
            )
    _tell_unread(path, files, sorted(folders))
    if not files:
        what = "in the directory" if directory else "matches"
        raise UserError(
            f"no file {what} {path!r} below data.root ({root}); correct the source's path or "
            f"data.root"
        )
    return files


def _tell_packed(path: str, names: list[str]) -> None:
    """Warns of files in a directory that may hold rows, but cannot be read."""
    if names:
        log.warning(
            f"the directory {path!r} holds packed files, which are not read: {_listed(names)}; "
            f"unpack them, or use gzip or zstd"
        )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")


def _tell_unread(path: str, files: list[str], folders: list[str]) -> None:
    """Warns of directories that a glob matches, but no file in them."""
    entered = {str(parent) for name in files for parent in Path(name).parents}
    if unread := [folder for folder in folders if str(Path(folder)) not in entered]:
        log.warning(
            f"{path!r} matches directories, whose files are not read: {_listed(unread)}; to read "
            f"them, give the directory itself as a path"
        )


def _refuse_loops(root: Path, pattern: str) -> None:
    """Refuses links below `**` that lead back to a directory above them: a glob follows them."""
    parts = Path(pattern).parts
    if "**" in parts:
        plain = takewhile(lambda part: not glob.has_magic(part), parts)
        _refuse_loops_below(root.joinpath(*plain), frozenset())


def _refuse_loops_below(directory: Path, above: frozenset[Path]) -> None:
    real = directory.resolve()
    if real in above:
        raise UserError(
            f"a symbolic link leads from {directory} back to {real}, which is above it; remove "
            f"the link, or name the files of the source without '**'"
        )
    try:
        folders = [path for path in directory.iterdir() if path.is_dir()]
    except OSError:  # a glob passes over what it may not read
        return
    for folder in folders:
        if not folder.name.startswith("."):
            _refuse_loops_below(folder, above | {real})
