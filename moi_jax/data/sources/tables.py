"""Tables: streams the rows of CSV and TSV, whose first row names the columns."""

import csv
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from moi_jax.text.conversations import BadRow

BOM = b"\xef\xbb\xbf"
SEPARATORS = {"csv": ",", "tsv": "\t"}
LOST = "are lost"  # ends the detail of a bad row that takes other lines along
# A cell of TSV that begins with a quote, and one that is quoted as in CSV.
QUOTE = re.compile(rb'(?:\A|[\t\n])"')
QUOTED = re.compile(rb'(?:\A|[\t\n])"[^"]*(?:""[^"]*)*"(?=[\t\r\n]|\Z)')


def table_kind(path: Path) -> str | None:
    """The ending csv or tsv of a name, perhaps before .gz or .zst; None for another ending."""
    endings = [ending.lower() for ending in path.suffixes]
    if endings and endings[-1] in (".gz", ".zst"):
        endings.pop()
    return endings[-1][1:] if endings and endings[-1][1:] in SEPARATORS else None


def has_plain_quotes(text: bytes) -> bool:
    """Whether cells of a TSV text begin with a quote, but no cell is quoted as in CSV."""
    return bool(QUOTE.search(text)) and not QUOTED.search(text)


def table_rows(
    lines: Iterable[bytes], kind: str, most: int, plain_quotes: bool = False
) -> Iterator[tuple[int, int, dict[str, Any] | BadRow]]:
    """(line in which it begins, bytes, content) of each row that is not blank, after the first.

    Args:
      most: characters of the longest cell.
      plain_quotes: a quote is a letter like any other.

    Raises:
      BadRow: the first row does not name the columns, or a row is too large to go on.
    """
    text = _Text(lines)
    csv.field_size_limit(most)
    reader = csv.reader(
        text,
        delimiter=SEPARATORS[kind],
        quoting=csv.QUOTE_NONE if plain_quotes else csv.QUOTE_MINIMAL,
        strict=True,
    )
    names: list[str] = []
    while True:
        begin, before = reader.line_num + 1, text.size
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            bad, size = _bad(error, begin, reader.line_num), text.size - before
            # In the middle of a cell nobody knows where the next row begins.
            if not names or size > most:
                raise bad from None
            yield begin, size, bad
            continue
        if not names:
            names = _names(cells)
        elif cells:
            yield begin, text.size - before, _row(names, cells)


def _bad(error: csv.Error, begin: int, end: int) -> BadRow:
    """The row of the lines [begin, end], in which the error was found at the end."""
    if begin == end:
        return BadRow("bad_table", str(error))
    lines = f"{end - begin + 1:,} lines"
    if "end of data" in str(error):
        how = f"never closes: {lines}"
    elif "field limit" in str(error):
        how = f"does not close in {csv.field_size_limit():,} characters: all lines from it on"
    else:
        how = f"closes in the middle of line {end}: {lines}"
    return BadRow("bad_table", f"a quote opened in line {begin} {how} {LOST}")


class _Text:
    """Lines as text; bytes that are not UTF-8 become lone surrogates. `size` counts the bytes."""

    def __init__(self, lines: Iterable[bytes]):
        self.size, iterator = 0, iter(lines)
        first = next(iterator, b"")
        self.lines = chain([first.removeprefix(BOM)], iterator)

    def __iter__(self) -> Iterator[str]:
        for line in self.lines:
            self.size += len(line)
            yield line.decode("utf-8", "surrogateescape")


def _names(cells: list[str]) -> list[str]:
    names = [name.strip() for name in cells]
    if doubled := next((name for name in names if name and names.count(name) > 1), None):
        raise BadRow("duplicate_key", f"two columns are named {doubled!r}")
    return names


def _row(names: list[str], cells: list[str]) -> dict[str, Any] | BadRow:
    if len(cells) != len(names):
        return BadRow("bad_table", f"{len(cells)} cells, but {len(names)} columns are named")
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        return BadRow("invalid_utf8", "a cell is not UTF-8")
    return {name: cell for name, cell in zip(names, cells, strict=True) if name}
