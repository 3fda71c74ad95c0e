"""Source rows: finds the files of a config, detects their format, and converts their rows."""

import glob
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from moi_jax.common.errors import UserError
from moi_jax.common.home import expand_home
from moi_jax.config import Source
from moi_jax.data.sources import formats
from moi_jax.data.sources.containers import RawRow
from moi_jax.data.sources.datasets import open_dataset
from moi_jax.data.sources.formats import FORMATS
from moi_jax.data.sources.readers import SourceFile, parse
from moi_jax.text.conversations import BadRow, Conversation

ROWS_TO_DETECT = 100  # how many readable rows are looked at to detect the format of a file


class SourceRow(NamedTuple):
    """A row of a source file: its line, its size in bytes, and its conversation."""

    line: int
    size: int
    conversation: Conversation | BadRow
    trimmed: bool = False  # whether a user turn at the end was removed


def expand(root: Path, sources: Sequence[Source], cache_dir: Path) -> list[list[SourceFile]]:
    """The files of each source, sorted by their names relative to `root`.

    Args:
      root: data.root; it may begin with ~.
      cache_dir: data.cache_dir; a source of kind tfds that is missing is built below it.

    Raises:
      UserError: a pattern matches no file, or a format is unknown.
    """
    root = expand_home(root)
    found = []
    for source in sources:
        if source.format != "auto" and source.format not in FORMATS:
            name = source.path or source.tfds or source.hf
            raise UserError(
                f"source {name}: unknown format {source.format!r}; use auto or one of "
                f"{', '.join(FORMATS)}"
            )
        if source.path is None:
            found.append([open_dataset(root, source, cache_dir)])
            continue
        names = glob.glob(source.path, root_dir=root, recursive=True)
        files = sorted({name for name in names if (root / name).is_file()})
        if not files:
            raise UserError(
                f"no file matches {source.path!r} below data.root ({root}); "
                f"correct the source's path or data.root"
            )
        found.append([SourceFile(name, root / name) for name in files])
    return found


def detect_format(file: SourceFile) -> str | None:
    """The format of a file by the keys of its first rows; None if no row can be read.

    Raises:
      UserError: the keys of these rows belong to no format.
    """
    odd: tuple[int, list[str]] | None = None
    for line, row in islice(_readable(file), ROWS_TO_DETECT):
        if name := formats.detect(row):
            return name
        odd = odd or (line, sorted(row))
    if odd is None:
        return None
    raise UserError(
        f"{file.path}:{odd[0]}: no known format has the keys "
        f"{', '.join(map(repr, odd[1])) or '(none)'}; set the source's format to one of "
        f"{', '.join(FORMATS)}"
    )


def _readable(file: SourceFile) -> Iterator[tuple[int, dict[str, Any]]]:
    for row in file.rows():
        with suppress(BadRow):
            yield row.line, parse(row.raw)


def convert(row: RawRow, format_name: str | None) -> SourceRow:
    """Converts a row; `format_name` comes from `detect_format` or from the config."""
    try:
        content = parse(row.raw)
        # If the format is None, no row is readable, and parse has raised.
        conversation, trimmed = formats.to_conversation(content, FORMATS[format_name or ""])
        return SourceRow(row.line, row.size, conversation, trimmed)
    except BadRow as bad:
        return SourceRow(row.line, row.size, bad)
