"""Turns: reads the turns of a chat row as events (messages, thoughts, calls, observations)."""

from collections.abc import Callable, Iterator, Mapping
from reprlib import repr as shown  # the content of a row may be of any length and depth
from typing import Any

from moi_jax.data.sources.react import Call, Event, Observation, Thought, compact, named_function
from moi_jax.data.sources.readers import decode
from moi_jax.text.conversations import BadRow, Message, Role

CHAT_ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}
SHAREGPT_ROLES: dict[str, Role] = {**CHAT_ROLES, "human": "user", "gpt": "assistant"}
CALLING, RETURNING = "function_call", {"tool", "function", "observation"}
# The keys of an assistant's turn that hold its reasoning, under the names that APIs give it.
REASONING = ("reasoning_content", "reasoning", "thinking")
# The keys that say whether a turn is trained on: of OpenAI, of LLaMA-Factory, of Axolotl.
MARKS = ("weight", "loss_weight", "train")

Reader = Callable[[Mapping[str, Any]], list[Event]]


def text_of(row: Mapping[str, Any], key: str) -> str:
    """The text of a key: a string, or the text parts of a list, one in each line."""
    if key not in row:
        raise BadRow("missing_field", f"no {key!r}")
    value = row[key]
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise BadRow("content_not_text", f"{key!r} is {type(value).__name__}")
    texts = []
    for kind, text in map(_part, value):
        if kind != "text":
            raise BadRow("part_not_text", f"a part of {key!r} is of type {shown(kind)}")
        texts.append(text)
    return "\n".join(texts)


def _part(part: Any) -> tuple[str, str]:
    """(type, text) of a part of a content."""
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        raise BadRow("content_not_text", "a part of the content has no type")
    text = part.get("value") if part.get("text") is None else part["text"]
    if kind in ("text", "reasoning", "tool_call"):
        if not isinstance(text, str):
            raise BadRow("content_not_text", f"a part of type {shown(kind)} has no text")
        return kind, text
    raise BadRow("part_not_text", f"a part of the content is of type {shown(kind)}")


def is_trained(turn: Mapping[str, Any]) -> bool:
    """Whether a turn is trained on, by its keys `weight`, `loss_weight` and `train`."""
    marks = {key: turn[key] for key in MARKS if key in turn}
    if any(mark not in (None, 0, 1) for mark in marks.values()):
        given = ", ".join(f"{key} {shown(mark)}" for key, mark in marks.items())
        raise BadRow("bad_weight", f"{given}; use 0 or 1, true or false")
    return 0 not in marks.values()


def turns(key: str, role_key: str, text_key: str, roles: Mapping[str, Role]) -> Reader:
    """A reader of rows whose `key` holds a list of turns, or the JSON text of one."""

    def events(row: Mapping[str, Any]) -> list[Event]:
        listed = row.get(key)
        if isinstance(listed, str):
            listed = decode(listed)
        if not isinstance(listed, list):
            raise BadRow("missing_field", f"no list {key!r}")
        return [event for turn in listed for event in read(turn)]

    def read(turn: Any) -> Iterator[Event]:
        if not isinstance(turn, dict):
            raise BadRow("not_an_object", f"a turn is a {type(turn).__name__}")
        name = turn.get(role_key)
        if name is None:
            raise BadRow("missing_role", f"a turn has no {role_key!r}")
        lower = name.lower() if isinstance(name, str) else ""
        role = roles.get(lower)
        if role == "assistant":
            yield from _assistant(turn, text_key)
        elif role is not None:
            yield Message(role, text_of(turn, text_key), is_trained(turn))
        elif lower in RETURNING:
            yield Observation(text_of(turn, text_key), _id(turn.get("tool_call_id")))
        elif lower == CALLING:
            yield from _calls(text_of(turn, text_key), is_trained(turn))
        else:
            raise BadRow("unknown_role", f"the role of a turn is {shown(name)}")

    return events


def _assistant(turn: Mapping[str, Any], key: str) -> Iterator[Event]:
    """The thoughts, the text and the calls of an assistant turn."""
    train, content = is_trained(turn), turn.get(key)
    calls: list[Call] = []
    if listed := turn.get("tool_calls") or turn.get("function_call"):
        calls += _calls(listed, train)
    # Some APIs give the same text under two names.
    reasoning = [text_of(turn, name) for name in REASONING if turn.get(name)]
    yield from (Thought(text, train) for text in dict.fromkeys(reasoning))
    text = ""
    if isinstance(content, list):
        parts = [_part(part) for part in content]
        first = next((n for n, (kind, _) in enumerate(parts) if kind == "tool_call"), None)
        yield from (Thought(text, train) for kind, text in parts[:first] if kind == "reasoning")
        text = "\n".join(text for kind, text in parts[:first] if kind == "text")
        calls += [] if first is None else _called(parts[first:], train)
    elif content is not None or not calls:
        text = text_of(turn, key)
    if text or not calls:
        yield Message("assistant", text, train)
    yield from calls


def _called(parts: list[tuple[str, str]], train: bool) -> list[Call]:
    """The calls of parts, of which the first is a call.

    The text before a call is its thought. Text after the last call belongs to that call.
    """
    calls: list[Call] = []
    texts: list[str] = []
    for kind, text in parts:
        if kind != "tool_call":
            texts.append(text)
            continue
        for call in _calls(text, train):
            calls.append(call._replace(thought="\n\n".join(texts)))
            texts = []
    if not calls:
        raise BadRow("bad_call", "a part of type tool_call has no call")
    thought = "\n\n".join([calls[-1].thought, *texts])
    return [*calls[:-1], calls[-1]._replace(thought=thought)]


def _calls(value: Any, train: bool) -> Iterator[Call]:
    """The calls of an object, a list of objects, or the JSON text of either."""
    if isinstance(value, str):
        value = decode(value, "bad_call")
    for call in value if isinstance(value, list) else [value]:
        name, function = named_function(call, "bad_call")
        yield Call(name, _arguments(function.get("arguments")), _id(call.get("id")), train)


def _arguments(value: Any) -> str:
    """The arguments of a call as JSON on one line; no arguments are an empty object."""
    if isinstance(value, str):
        value = decode(value, "bad_arguments") if value.strip() else None
    if not isinstance(value, dict | None):
        raise BadRow("bad_arguments", f"the arguments are a {type(value).__name__}")
    return compact(value or {}, "bad_arguments")


def _id(value: Any) -> str:
    return str(value) if isinstance(value, str | int) else ""
