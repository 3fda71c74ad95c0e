"""Ignored content: finds what a row holds beside the keys that its format reads.

A row of `question_answer` with a key "hint" trains without the hint; the user should know.
"""

import functools
from collections.abc import Mapping
from textwrap import shorten
from typing import Any

from moi_jax.data.sources.formats import SYSTEM, Format
from moi_jax.data.sources.pairs import context_of
from moi_jax.data.sources.turns import MARKS, REASONING, is_weight

ROW_KEYS = frozenset({*SYSTEM, "tools", "functions"})  # that every format reads
TURN_KEYS = frozenset(
    {"role", "content", "from", "value", "tool_calls", "function_call", "tool_call_id"}
).union(REASONING, MARKS)
# Keys that say where a row comes from and of what kind it is.
METADATA = {
    "author", "category", "created", "dataset", "date", "difficulty", "domain", "hash", "id", "idx",
    "index", "key", "lang", "language", "level", "licence", "license", "link", "model", "name",
    "origin", "path", "quality", "score", "source", "split", "status", "subject", "subset", "tag",
    "tags", "task", "timestamp", "title", "topic", "type", "url", "user", "uuid",
    "version",
}  # fmt: skip
METADATA_ENDINGS = ("_id", "_ids", "_idx", "_name", "_source", "_type", "_url", "_at", "_date")
EXAMPLE = 60  # characters


def ignored_content(row: Mapping[str, Any], form: Format) -> dict[str, str]:
    """What looks like content and is not read: by key, the beginning of the value.

    The key of a turn is written as in `messages[].images`.
    """
    found = _content(row, _keys_read(form, row))
    if is_weight(row.get("weight")):
        del found["weight"]
    if "context" in form.optional and context_of(row) is None:
        found["context"] = _beginning(row["context"])
    for name in form.turns:
        turns = row.get(name)
        for turn in turns if isinstance(turns, list) else ():
            if isinstance(turn, dict):  # or the key holds no turns and is not read
                content = _content(turn, TURN_KEYS)
                found |= {f"{name}[].{key}": text for key, text in content.items()}
    return found


def _keys_read(form: Format, row: Mapping[str, Any]) -> frozenset[str]:
    """The keys of a row that its format reads: of its signatures only the one that has values."""
    for signature in form.signatures:
        if all(row.get(key) is not None for key in signature):
            return _union(signature, form.optional)
    return _union(*form.signatures, form.optional)


@functools.cache
def _union(*keys: frozenset[str]) -> frozenset[str]:
    return ROW_KEYS.union(*keys)


def _content(object_: Mapping[str, Any], read: frozenset[str]) -> dict[str, str]:
    return {
        key: _beginning(value)
        for key, value in object_.items()
        if key not in read and _is_content(key.lower(), value)
    }


def _beginning(value: Any) -> str:
    return shorten(str(value), EXAMPLE, placeholder="...")


def _is_content(key: str, value: Any) -> bool:
    if key in MARKS:
        return value is not None
    if key in METADATA or key.endswith(METADATA_ENDINGS):
        return False
    if isinstance(value, str):
        return bool(value.strip())
    return isinstance(value, list) and bool(value)
