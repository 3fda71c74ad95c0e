"""Message trees: joins the flat messages of OpenAssistant, one in each row, to trees.

{"message_id": "a", "parent_id": null, "role": "prompter", "text": "Name a colour."}
{"message_id": "b", "parent_id": "a", "role": "assistant", "text": "Blue.", "rank": 0}

become the row {"prompt": {..., "text": "Name a colour.", "replies": [{..., "text": "Blue."}]}}.
"""

from collections.abc import Iterable, Iterator
from reprlib import repr as shown  # the content of a row may be of any length and depth
from typing import Any

from moi_jax.data.sources.containers import RawRow
from moi_jax.data.sources.readers import parse
from moi_jax.text.conversations import BadRow


def join(rows: Iterable[RawRow]) -> Iterator[RawRow]:
    """The trees, each in the place of its first message; rows that are in none are bad.

    A message without a parent begins a tree, which ends where the next one begins: only one tree
    is in memory.
    """
    tree: RawRow | None = None
    messages: dict[str, dict[str, Any]] = {}
    for row in rows:
        try:
            message = _message(row)
            parent = message.get("parent_id")
            if not parent:
                if tree:
                    yield tree
                messages, tree = {}, RawRow(row.line, row.size, {"prompt": message})
            elif parent in messages:
                assert tree
                messages[parent]["replies"].append(message)
                tree = tree._replace(size=tree.size + row.size)
            else:
                raise BadRow("unknown_parent", f"its tree has no message {shown(parent)} before it")
            messages[message["message_id"]] = message
        except BadRow as bad:
            yield RawRow(row.line, row.size, bad)
    if tree:
        yield tree


def _message(row: RawRow) -> dict[str, Any]:
    message = parse(row.raw)
    if not isinstance(message.get("message_id"), str):
        raise BadRow("missing_field", "the message has no text 'message_id'")
    if not isinstance(message.get("parent_id"), str | None):
        raise BadRow("missing_field", "'parent_id' is neither a text nor null")
    return {**message, "replies": []}
