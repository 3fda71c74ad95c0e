"""Readers: the rows of a file, one after another or from a byte range, and the JSON in them."""

import hashlib
import json
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from moi_jax.data.sources.containers import RawRow, in_lines, read_rows
from moi_jax.text.conversations import BadRow


@dataclass(frozen=True)
class SourceFile:
    """A file of a source. Small and picklable: worker processes open it themselves.

    Attributes:
      name: shown to people, and below data.root.
      path: where it is.
    """

    name: str
    path: Path

    @property
    def size(self) -> int:
        """Bytes, for progress bars."""
        return self.path.stat().st_size

    @property
    def splittable(self) -> bool:
        """Whether `rows` heeds a byte range: plain JSON Lines do, no other container."""
        return in_lines(self.path)

    def digest(self) -> str:
        """sha256 hex of the content."""
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def rows(self, start: int = 0, end: int | None = None) -> Iterator[RawRow]:
        """The rows that are not blank; of a splittable file those that begin in [start, end).

        A line begun before `start` belongs to the range before. Lines are counted from 1 at the
        first that begins in the range.

        Raises:
          UserError: the file needs a package that is not installed.
        """
        return read_rows(self.path, start, end)


def parse(raw: bytes | dict[str, Any] | BadRow) -> dict[str, Any]:
    """The object of a row.

    Raises:
      BadRow: the row is none.
    """
    if isinstance(raw, BadRow):
        raise raw
    if isinstance(raw, dict):
        return raw
    try:
        row = decode(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow("invalid_utf8", f"{error.reason} at byte {error.start}") from None
    if not isinstance(row, dict):
        raise BadRow("not_an_object", f"the row is a {type(row).__name__}")
    return row


def decode(text: str, reason: str = "invalid_json") -> Any:
    """The value of a JSON text; stricter than json.loads, which takes what other readers refuse.

    Raises:
      BadRow: the text is no JSON (`reason`), has a key twice, or NaN or Infinity.
    """
    try:
        return DECODER.decode(text)
    # json raises RecursionError on deep nesting and a plain ValueError on a giant number.
    except (ValueError, RecursionError) as error:
        raise BadRow(reason, str(error)) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        doubled = next(key for key in keys if keys.count(key) > 1)
        raise BadRow("duplicate_key", f"an object has the key {reprlib.repr(doubled)} twice")
    return found


def _constant(name: str) -> NoReturn:
    raise BadRow("not_finite", f"{name} is no JSON number")


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)
