"""Readers: the rows of a file, one after another or from a byte range, not yet understood."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from moi_jax.data.conversations import BadRow
from moi_jax.errors import UserError

BOM = b"\xef\xbb\xbf"


class RawRow(NamedTuple):
    """A row as it stands in its file: the line it begins in (from 1), its bytes, its content."""

    line: int
    size: int
    raw: bytes


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

    def digest(self) -> str:
        """sha256 hex of the content."""
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @property
    def splittable(self) -> bool:
        """Whether `rows` reads any range of bytes without what stands before it."""
        return True

    def rows(self, start: int = 0, end: int | None = None) -> Iterator[RawRow]:
        """The rows that are not blank and whose first byte lies in [start, end).

        Lines are counted from 1 at the first that begins there. Only b"\\n" ends a line: U+2028
        is content.

        Raises:
          UserError: the file is a JSON array.
        """
        first = not start
        with open(self.path, "rb") as file:
            if start:
                file.seek(start - 1)
                file.readline()
            position = file.tell()
            for line, raw in enumerate(file, 1):
                if end is not None and position >= end:
                    return
                position += len(raw)
                if line == 1 and not start:
                    raw = raw.removeprefix(BOM)
                if not raw.strip():
                    continue
                if first and raw.lstrip().startswith(b"["):
                    raise UserError(f"{self.path} is a JSON array; write one object a line")
                first = False
                yield RawRow(line, len(raw), raw)


def parse(raw: bytes) -> dict[str, Any]:
    """The object of a row.

    Raises:
      BadRow: the row is none.
    """
    try:
        row = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow("invalid_utf8", f"{error.reason} at byte {error.start}") from None
    # json raises RecursionError on deep nesting and a plain ValueError on a giant number.
    except (ValueError, RecursionError) as error:
        raise BadRow("invalid_json", str(error)) from None
    if not isinstance(row, dict):
        raise BadRow("not_an_object", f"the row is a {type(row).__name__}")
    return row
