"""Source rows: finds the files of a config, detects their format, and converts their rows."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from moi_jax.common.errors import UserError
from moi_jax.common.home import expand_home
from moi_jax.config import Source
from moi_jax.data.sources import formats
from moi_jax.data.sources.containers import RawRow
from moi_jax.data.sources.datasets import open_dataset
from moi_jax.data.sources.diagnosis import SEMICOLONS, split_by_semicolons
from moi_jax.data.sources.formats import FORMATS, TEXT, Format, Typing
from moi_jax.data.sources.ignored import ignored_content
from moi_jax.data.sources.paths import find_files
from moi_jax.data.sources.readers import SourceFile, parse
from moi_jax.text.conversations import BadRow, Conversation

ROWS_TO_DETECT = 100  # how many readable rows are looked at to detect the format of a file


class SourceRow(NamedTuple):
    """A row of a source file.

    Attributes:
      line, size: see `RawRow`.
      trimmed: whether a user turn at the end was removed.
      ignored: what looks like content and is not read, see `ignored_content`.
    """

    line: int
    size: int
    conversation: Conversation | BadRow
    trimmed: bool = False
    ignored: Mapping[str, str] = MappingProxyType({})


def expand(root: Path, sources: Sequence[Source], cache_dir: Path) -> list[list[SourceFile]]:
    """The files of each source, sorted by their names relative to `root`.

    Args:
      root: data.root; it may begin with ~.
      cache_dir: data.cache_dir; a source of kind tfds that is missing is built below it.

    Raises:
      UserError: a path names no file, see `find_files`; or a format is unknown.
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
        found.append([SourceFile(name, root / name) for name in find_files(root, source.path)])
    return found


def detect_format(file: SourceFile) -> str | None:
    """The format of a file by the keys of its first rows; None if no row can be read.

    Raises:
      UserError: the keys of these rows belong to no format.
    """
    odd: tuple[int, dict[str, Any]] | None = None
    for line, row in islice(_readable(file), ROWS_TO_DETECT):
        if name := formats.detect(row):
            return name
        odd = odd or (line, row)
    if odd is None:
        return None
    line, row = odd
    todo = f"set the source's format to one of {', '.join(FORMATS)}"
    raise UserError(
        f"{file.path}:{line}: no known format has the keys "
        f"{', '.join(map(repr, sorted(row))) or '(none)'}; "
        f"{SEMICOLONS if split_by_semicolons(row) else todo}"
    )


def _readable(file: SourceFile) -> Iterator[tuple[int, dict[str, Any]]]:
    for row in file.rows():
        with suppress(BadRow):
            yield row.line, parse(row.raw)


def splittable(file: SourceFile, format_name: str | None) -> bool:
    """Whether `source_rows` can read a byte range of the file."""
    return file.splittable and not (format_name and FORMATS[format_name].join)


def source_rows(
    file: SourceFile,
    format_name: str | None,
    start: int = 0,
    end: int | None = None,
    typing: Typing = TEXT,
) -> Iterator[SourceRow]:
    """The rows of a file; of a splittable one, those that begin in the bytes [start, end).

    Args:
      format_name: from `detect_format` or from the config; None if no row is readable.
      typing: what stands apart in the messages.
    """
    form = FORMATS[format_name] if format_name else None
    raw = file.rows(start, end) if splittable(file, format_name) else file.rows()
    joined = form.join(raw) if form and form.join else raw
    return (_convert(row, form, typing) for row in joined)


def _convert(row: RawRow, form: Format | None, typing: Typing) -> SourceRow:
    try:
        content = parse(row.raw)
        assert form  # or no row is readable, and parse has raised
        conversation, trimmed = formats.to_conversation(content, form, typing)
        ignored = ignored_content(content, form)
        return SourceRow(row.line, row.size, conversation, trimmed, ignored)
    except BadRow as bad:
        return SourceRow(row.line, row.size, bad)
