"""The rows of benchmark files, each with its place; what is wrong with one is told by its place."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moi_jax.common.errors import UserError
from moi_jax.data.sources.readers import SourceFile, parse
from moi_jax.evaluation.protocol import Json, Task
from moi_jax.text.conversations import BadRow


def missing(task: Task, path: Path) -> UserError:
    """What is said where a file or directory of a task is not there, or holds nothing."""
    return UserError(
        f"{task.name}: nothing in {path}; put below the data directory {task.options.data}: "
        f"{task.files}"
    )


def json_rows(path: Path, **fields: type) -> Iterator[tuple[str, Json]]:
    """(place, row) of JSON Lines, a JSON array or one JSON object, also gzipped.

    Args:
      fields: what every row must have, by name; a text must not be blank.

    Raises:
      UserError: a row is not JSON, or lacks a field or has another type there, or half a character.
    """
    for line, _, raw in SourceFile(path.name, path).rows():
        where = f"{path}, line {line}"
        try:
            row = parse(raw)
        except BadRow as bad:
            raise malformed(where, bad.detail) from None
        check_texts(where, row)
        for name, kind in fields.items():
            value = row.get(name)
            if not isinstance(value, kind) or (isinstance(value, str) and not value.strip()):
                raise malformed(where, f"{name!r} must be a {kind.__name__} that is not empty")
        yield where, row


def check_texts(where: str, value: Any) -> None:
    """Raises UserError where a text in a JSON value holds half of a character, such as "\\ud83d".

    JSON's escapes can say so, but no file and no model can be given it.
    """
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise malformed(where, f"a text holds {half}, half of a character") from None


def csv_rows(path: Path) -> Iterator[tuple[str, list[str]]]:
    """(place, cells) of the rows that are not blank; a cell's lines end in "\\n" alone.

    Raises:
      UserError: the file is not UTF-8, or its quotes do not close.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise malformed(str(path), f"byte {error.start} is not UTF-8") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield f"{path}, line {line}", [cell.replace("\r\n", "\n") for cell in cells]
            line = reader.line_num + 1
    except csv.Error as error:
        raise malformed(f"{path}, the row that begins in line {line}", str(error)) from None


def malformed(where: str, what: str) -> UserError:
    """What is said of a row that cannot be used: mended or removed, never skipped in silence."""
    return UserError(f"{where}: {what}; mend the row or fetch the file anew")
