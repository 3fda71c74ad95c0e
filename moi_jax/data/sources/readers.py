"""Reads the rows of a source file, all of them or those of a byte range, and parses their JSON."""

import hashlib
import json
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from moi_jax.data.sources.containers import RawRow, in_lines, read_rows
from moi_jax.data.sources.tables import table_kind
from moi_jax.text.conversations import BadRow


@dataclass(frozen=True)
class SourceFile:
    """A file of a source; it can be pickled, so that worker processes open it themselves.

    Attributes:
      name: the path relative to data.root, which people see.
      path: the path to open.
    """

    name: str
    path: Path

    @property
    def size(self) -> int:
        """The size in bytes, for progress bars."""
        return self.path.stat().st_size

    @property
    def splittable(self) -> bool:
        """Whether `rows` can read a byte range: only for uncompressed JSON Lines."""
        return in_lines(self.path)

    def digest(self) -> str:
        """sha256 hex of the content; for a table also of its kind, which the name tells."""
        with open(self.path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        digest.update((table_kind(self.path) or "").encode())
        return digest.hexdigest()

    def rows(self, start: int = 0, end: int | None = None) -> Iterator[RawRow]:
        """The rows that are not blank; of a splittable file, those that begin in [start, end).

        Lines are counted from 1 at the first line that begins in the range.

        Raises:
          UserError: the file needs a package that is not installed.
        """
        return read_rows(self.path, start, end)


def parse(raw: bytes | dict[str, Any] | BadRow) -> dict[str, Any]:
    """The row as an object.

    Raises:
      BadRow: the row is not a JSON object.
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
    """The value of a JSON text; stricter than json.loads, which accepts invalid JSON.

    Raises:
      BadRow: the text is not JSON (`reason`), repeats a key, or holds NaN or Infinity.
    """
    try:
        return DECODER.decode(text)
    # json raises RecursionError for deep nesting and a plain ValueError for a huge number.
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
    raise BadRow("not_finite", f"{name} is not a JSON number")


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)
