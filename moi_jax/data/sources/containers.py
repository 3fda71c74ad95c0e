"""Containers: recognises how a file stores its rows, and streams them.

JSON Lines, a JSON array, one JSON object, CSV, TSV (each plain, gzip or zstd), Parquet,
ArrayRecord. The content decides; only CSV and TSV are known by the name of the file.
"""

import functools
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from moi_jax.common.errors import UserError
from moi_jax.data.sources.tables import BOM, has_plain_quotes, table_kind, table_rows
from moi_jax.text.conversations import BadRow

GZIP, ZSTD, PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"
# What no row can be read from, by its first bytes, and what to do.
REFUSED = {
    b"PK\x03\x04": "a zip archive or a spreadsheet; unpack it, or export it as CSV",
    b"BZh": "compressed by bzip2; unpack it, or use gzip or zstd",
    b"\xfd7zXZ\x00": "compressed by xz; unpack it, or use gzip or zstd",
    **dict.fromkeys((b"\xff\xfe", b"\xfe\xff", b"{\0", b"\0{"), "text in UTF-16; save it as UTF-8"),
}
RIEGELI = bytes.fromhex("83af70d10d884a3f")  # the first bytes of an ArrayRecord

MAX_ROW = 2**24  # bytes of the longest row; a longer one is never held in memory
PIECE = 2**16  # bytes of text read at once
HEAD = 2**20  # bytes of a TSV file that show whether its cells are quoted
COMPRESSED_PIECE = 2**8  # compressed bytes read at once: at most about 8 MB of text
BATCH = 1_000  # rows of Parquet or records of ArrayRecord read at once

OUTSIDE_STRING = re.compile(rb'["\[\]{},]')
INSIDE_STRING = re.compile(rb'\\.|"', re.DOTALL)


class RawRow(NamedTuple):
    """A row as it is stored in its file.

    Attributes:
      line: the line in which it begins, from 1; in a container without lines, the row number.
      size: bytes of the file that it takes.
      raw: JSON text, or the object if the container is not JSON, or why it cannot be read.
    """

    line: int
    size: int
    raw: bytes | dict[str, Any] | BadRow


def in_lines(path: Path) -> bool:
    """Whether the file is uncompressed JSON Lines, which can be read from any byte on."""
    with open(path, "rb") as file:
        head = file.read(8)
        file.seek(0)
        if head.startswith((GZIP, ZSTD, PARQUET, RIEGELI, *REFUSED)):
            return False
        return _layout(file, path) == "lines"


def read_rows(path: Path, start: int = 0, end: int | None = None) -> Iterator[RawRow]:
    """The rows that are not blank; of JSON Lines, those that begin in the bytes [start, end).

    If a file cannot be read to its end, the last row is a `BadRow`.

    Raises:
      UserError: the file needs a package that is not installed.
    """
    line = 0
    try:
        with open(path, "rb") as file:
            head = file.read(8)
        for first, what in REFUSED.items():
            if head.startswith(first):
                raise BadRow("unknown_container", f"the file is {what}")
        if head.startswith(PARQUET):
            rows = _parquet_rows(path)
        elif head.startswith(RIEGELI):
            rows = _records(path)
        elif head.startswith((GZIP, ZSTD)):
            rows = _compressed_rows(path, head)
        else:
            rows = _plain_rows(path, start, end)
        for row in rows:
            line = row.line
            yield row
    except BadRow as bad:
        yield RawRow(line + 1, 0, bad)


def _plain_rows(path: Path, start: int, end: int | None) -> Iterator[RawRow]:
    with open(path, "rb") as file:
        layout = _layout(file, path)
    with open(path, "rb") as file:
        yield from _lines(file, start, end) if layout == "lines" else READERS[layout](file)


def _compressed_rows(path: Path, head: bytes) -> Iterator[RawRow]:
    """The rows of a compressed text; their sizes are in compressed bytes."""
    new = _zstd(path) if head.startswith(ZSTD) else lambda: zlib.decompressobj(wbits=31)
    layout = "lines"
    with open(path, "rb") as file, suppress(BadRow):
        layout = _layout(io.BufferedReader(_Inflated(file, new), PIECE), path)
    with open(path, "rb") as file:
        position = 0
        for row in READERS[layout](io.BufferedReader(_Inflated(file, new), PIECE)):
            position, before = file.tell(), position
            yield row._replace(size=position - before)


def _zstd(path: Path) -> Callable[[], Any]:
    try:
        import zstandard
    except ImportError:
        raise _needs("zstandard", path, "compressed by zstd") from None
    return lambda: zstandard.ZstdDecompressor().decompressobj()


def _needs(package: str, path: Path, what: str) -> UserError:
    return UserError(f"{path} is {what}, which needs {package}: pip install 'moi_jax[sources]'")


class _Inflated(io.RawIOBase):
    """A compressed file as a stream of its text; raises BadRow where it is damaged."""

    def __init__(self, file: io.BufferedReader, new: Callable[[], Any]):
        self.file, self.new = file, new
        self.decompressor: Any = None
        self.compressed = b""
        self.text = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.text:
            compressed = self.compressed or self.file.read(COMPRESSED_PIECE)
            between = self.decompressor is None or self.decompressor.eof
            if between and not compressed.strip(b"\0"):  # tape tools pad files with zeros
                if not compressed:
                    return 0
                self.compressed = b""
                continue
            if not compressed:
                raise BadRow("cut_short", "the compressed file ends too early")
            if between:
                self.decompressor = self.new()
            try:
                self.text = memoryview(self.decompressor.decompress(compressed))
            except Exception as error:  # zlib and zstandard each have their own class
                raise BadRow("cut_short", f"the compressed file is damaged: {error}") from None
            self.compressed = self.decompressor.unused_data
        size = min(len(buffer), len(self.text))
        buffer[:size], self.text = self.text[:size], self.text[size:]
        return size


def _layout(file: io.BufferedReader, path: Path) -> str:
    """How a text stores its rows: "lines", "array", "object", "csv", "tsv" or "plain_tsv"."""
    first = file.readline(MAX_ROW).removeprefix(BOM)
    while first.isspace():
        first = file.readline(MAX_ROW)
    first = first.lstrip()
    if not first.startswith((b"[", b"{")):
        kind = table_kind(path) or "lines"
        plain = kind == "tsv" and has_plain_quotes(first + _beginning(file))
        return "plain_tsv" if plain else kind
    whole = _is_json(first)
    if first.startswith(b"["):
        return "lines" if whole and file.read(PIECE).strip() else "array"
    if whole or len(first) >= MAX_ROW:
        return "lines"
    return "object" if _is_json(first + file.read(MAX_ROW)) else "lines"


def _beginning(file: io.BufferedReader) -> bytes:
    """The next `HEAD` bytes or a little more; fewer if the file ends or is damaged."""
    text = b""
    with suppress(BadRow):
        while len(text) < HEAD and (piece := file.read1(PIECE)):
            text += piece
    return text


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _lines(file: io.BufferedReader, start: int = 0, end: int | None = None) -> Iterator[RawRow]:
    """The rows of JSON Lines. Only b"\\n" ends a line; U+2028 does not."""
    position = start
    if start:
        file.seek(start - 1)
        position += _skip_line(file) - 1
    line = 0
    while (end is None or position < end) and (raw := file.readline(MAX_ROW + 1)):
        line += 1
        size = len(raw)
        if size > MAX_ROW and not raw.endswith(b"\n"):
            size += _skip_line(file)
            yield RawRow(line, size, _too_large(size))
        else:
            if position == 0:
                raw = raw.removeprefix(BOM)
            if raw and not raw.isspace():
                yield RawRow(line, size, raw)
        position += size


def _skip_line(file: io.BufferedReader) -> int:
    """Moves to the end of the line; returns the bytes skipped, including the line feed."""
    passed = 0
    while piece := file.readline(PIECE):
        passed += len(piece)
        if piece.endswith(b"\n"):
            break
    return passed


def _too_large(size: int) -> BadRow:
    return BadRow("row_too_large", f"{size:,} bytes, at most {MAX_ROW:,}")


def _object(file: io.BufferedReader) -> Iterator[RawRow]:
    raw = file.read().removeprefix(BOM)
    yield RawRow(1, len(raw), raw)


def _elements(file: io.BufferedReader) -> Iterator[RawRow]:
    """The elements of a JSON array, found only by brackets, commas and quotes."""
    # read1 returns the text before the damaged place of a compressed file, and only then raises.
    text = file.read1(PIECE).removeprefix(BOM).lstrip()
    begin = position = 1  # after the array's own bracket
    number = dropped = depth = 0
    in_string = False
    while depth >= 0:
        found = (INSIDE_STRING if in_string else OUTSIDE_STRING).search(text, position)
        if found is None:
            # A backslash at the end is read again, together with what it escapes.
            position = max(position, len(text) - (in_string and text.endswith(b"\\")))
            if position - begin > MAX_ROW:
                dropped, begin = dropped + position - begin, position
            text, position, begin = text[begin:], position - begin, 0
            if not (more := file.read1(PIECE)):
                raise BadRow("cut_short", "the array has no end")
            text += more
            continue
        position, mark = found.end(), found.group()
        if mark == b'"':
            in_string = not in_string
        elif in_string:
            continue
        elif mark in b"[{":
            depth += 1
        elif mark in b"]}":
            depth -= 1
        if depth < 0 or (depth == 0 and mark == b","):
            raw = text[begin : position - 1].strip()
            size = position - begin + dropped
            if raw or dropped or mark == b",":
                number += 1
                yield RawRow(number, size, _too_large(size) if size > MAX_ROW + 1 else raw)
            begin, dropped = position, 0
    rest = text[position:]
    while rest or (rest := file.read1(PIECE)):
        if rest.strip():
            raise BadRow("invalid_json", "there is text after the array")
        rest = b""


def _table(kind: str, file: io.BufferedReader, plain_quotes: bool = False) -> Iterator[RawRow]:
    rows = table_rows(_whole_lines(file), kind, MAX_ROW, plain_quotes)
    return (RawRow(*row) for row in rows)


def _whole_lines(file: io.BufferedReader) -> Iterator[bytes]:
    while line := file.readline(MAX_ROW + 1):
        if len(line) > MAX_ROW:
            raise BadRow("row_too_large", f"a line has more than {MAX_ROW:,} bytes")
        yield line


READERS: dict[str, Callable[[io.BufferedReader], Iterator[RawRow]]] = {
    "lines": _lines,
    "array": _elements,
    "object": _object,
    "csv": functools.partial(_table, "csv"),
    "tsv": functools.partial(_table, "tsv"),
    "plain_tsv": functools.partial(_table, "tsv", plain_quotes=True),
}


def _parquet_rows(path: Path) -> Iterator[RawRow]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise _needs("pyarrow", path, "a Parquet file") from None
    try:
        with parquet.ParquetFile(path) as file:
            size = path.stat().st_size // max(file.metadata.num_rows, 1)
            number = 0
            for batch in file.iter_batches(BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield RawRow(number, size, row)
    except (ArrowException, OSError) as error:
        raise BadRow("cut_short", f"the Parquet file is damaged: {error}") from None


def _records(path: Path) -> Iterator[RawRow]:
    from array_record.python.array_record_module import ArrayRecordReader

    # Without read-ahead, because records are read in lists.
    reader = ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0")
    try:
        if not reader.ok():
            raise RuntimeError("it has no index")
        count = reader.num_records()
        for start in range(0, count, BATCH):
            records = reader.read(list(range(start, min(start + BATCH, count))))
            for number, record in enumerate(records, start + 1):
                yield RawRow(number, len(record), record)
        reader.close()
    except RuntimeError as error:
        raise BadRow("cut_short", f"the ArrayRecord is damaged: {error}") from None
