"""Diagnosis: shows a row of a file, and guesses why no row of the file can be used."""

import csv
import json
from collections.abc import Mapping
from contextlib import suppress
from itertools import islice
from textwrap import shorten
from typing import Any

from moi_jax.data.sources import formats
from moi_jax.data.sources.containers import RawRow
from moi_jax.data.sources.readers import SourceFile, parse
from moi_jax.data.sources.tables import SEPARATORS
from moi_jax.text.conversations import BadRow

ROWS = 1_000  # that are looked at
SHOWN = 80  # characters
SEMICOLONS = "its columns are separated by ';'; save it as CSV with commas"


def shown_row(file: SourceFile, line: int) -> str:
    """The beginning of the row in this line, "" if it cannot be shown."""
    raw = next((row.raw for row in file.rows() if row.line == line), b"")
    if isinstance(raw, bytes):
        text = raw.decode("utf-8", "replace")
    else:
        text = "" if isinstance(raw, BadRow) else json.dumps(raw, default=str)
    return shorten(text, SHOWN, placeholder="...")


def likely_cause(file: SourceFile, format_name: str) -> str:
    """Why no row of a file can be used, and what to do; "" if there is no guess.

    Args:
      format_name: the format that the config names, or auto.
    """
    rows = list(islice(file.rows(), ROWS))
    if objects := _objects(rows):
        if split_by_semicolons(objects[0]):
            return SEMICOLONS
        found = next(filter(None, map(formats.detect, objects)), None)
        if format_name == "auto" or found in (None, format_name):
            return ""
        return f"its rows are of the format {found}; set the source's format to {found} or auto"
    texts = [row.raw.decode("utf-8", "replace") for row in rows if isinstance(row.raw, bytes)]
    if not texts:
        return ""
    if _begins_with(texts[0], list):
        return 'a row is an object; write each list as {"messages": [...]}'
    if _begins_with("\n".join(texts), dict):
        return f"an object takes several lines; write each on one line: jq -c . {file.path}"
    for kind, separator in SEPARATORS.items():
        if _is_table(texts[:2], separator):
            return f"it looks like {kind.upper()}; give the file the ending .{kind}"
    return SEMICOLONS if _is_table(texts[:2], ";") else ""


def split_by_semicolons(row: Mapping[str, Any]) -> bool:
    """Whether the row is of a table whose only column bears the names of several."""
    return len(row) == 1 and _is_table([*row], ";")


def _objects(rows: list[RawRow]) -> list[dict[str, Any]]:
    found = []
    for row in rows:
        with suppress(BadRow):
            found.append(parse(row.raw))
    return found


def _begins_with(text: str, kind: type) -> bool:
    """Whether the text begins with a JSON value of this kind."""
    with suppress(ValueError, RecursionError):
        value, _ = json.JSONDecoder().raw_decode(text.lstrip())
        return isinstance(value, kind)
    return False


def _is_table(lines: list[str], separator: str) -> bool:
    """Whether the first line may name the columns of the second one."""
    with suppress(csv.Error):
        names, *_ = rows = [next(csv.reader([line], delimiter=separator), []) for line in lines]
        plain = all(name.strip().replace("_", "a").replace(" ", "a").isalnum() for name in names)
        return len(names) > 1 and plain and all(len(row) >= len(names) for row in rows)
    return False
