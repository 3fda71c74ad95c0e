"""Reads the rows of benchmark files. Each row comes with its place, for error messages."""

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
    """The error for a file or directory of a task that is missing or empty."""
    return UserError(
        f"{task.name}: nothing in {path}; put into the data directory {task.options.data}: "
        f"{task.files}"
    )


def json_rows(path: Path, **fields: type) -> Iterator[tuple[str, Json]]:
    """(place, row) of JSON Lines, a JSON array or one JSON object, also gzipped.

    Args:
      fields: name -> type of the fields that every row must have; a text must not be blank.

    Raises:
      UserError: a row is not JSON, lacks a field, has a field of another type, or has half of a
        character in a text.
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
    """Raises UserError where a text in a JSON value has half of a character, such as "\\ud83d".

    JSON can write it as an escape, but it cannot be written to a file or given to a model.
    """
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise malformed(where, f"a text has {half}, half of a character") from None


def csv_rows(path: Path) -> Iterator[tuple[str, list[str]]]:
    """(place, cells) of the rows that are not blank. Line breaks in cells become "\\n".

    Raises:
      UserError: the file is not UTF-8, or a quote is not closed.
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
    """The error for a row that cannot be used. Such rows are never skipped silently."""
    return UserError(f"{where}: {what}; correct the row or download the file again")
