"""Ignored content: finds what a row holds beside the keys that its format reads.

A row of `question_answer` with a key "hint" trains without the hint; the user should know.
"""

from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from textwrap import shorten
from typing import Any

from moi_jax.data.sources.formats import SYSTEM, Format
from moi_jax.data.sources.turns import REASONING, WEIGHTS

ROW_KEYS = {*SYSTEM, "tools", "functions"}  # that every format reads
TURN_KEYS = {"role", "content", "from", "value", "train", "tool_calls", "function_call"}
TURN_KEYS |= {"tool_call_id", *REASONING, *WEIGHTS}
# Keys that say where a row comes from and of what kind it is.
METADATA = {
    "author", "category", "created", "dataset", "date", "difficulty", "domain", "hash", "id", "idx",
    "index", "key", "lang", "language", "level", "licence", "license", "link", "model", "name",
    "origin", "path", "quality", "score", "source", "split", "status", "subject", "subset", "tag",
    "tags", "task", "timestamp", "title", "topic", "tree_state", "type", "url", "user", "uuid",
    "version",
}  # fmt: skip
METADATA_ENDINGS = ("_id", "_ids", "_idx", "_name", "_source", "_type", "_url", "_at", "_date")
EXAMPLE = 60  # characters


def ignored_content(row: Mapping[str, Any], form: Format) -> dict[str, str]:
    """What looks like content and is not read: by key, the beginning of the value.

    The key of a turn is written as in `messages[].images`.
    """
    given = (s for s in form.signatures if all(row.get(key) is not None for key in s))
    read = next(given, frozenset().union(*form.signatures)) | form.optional | ROW_KEYS
    found = dict(_content(row, read))
    for name in form.turns:
        turns = row.get(name)
        for turn in turns if isinstance(turns, list) else ():
            found |= {f"{name}[].{key}": text for key, text in _content(turn, TURN_KEYS)}
    return found


def _content(object_: Mapping[str, Any], read: AbstractSet[str]) -> Iterator[tuple[str, str]]:
    for key in sorted(object_.keys() - read):
        value = object_[key]
        if _is_content(key.lower(), value):
            yield key, shorten(str(value), EXAMPLE, placeholder="...")


def _is_content(key: str, value: Any) -> bool:
    if key in WEIGHTS:
        return value is not None
    if key in METADATA or key.endswith(METADATA_ENDINGS):
        return False
    if isinstance(value, str):
        return bool(value.strip())
    return isinstance(value, list) and bool(value)
