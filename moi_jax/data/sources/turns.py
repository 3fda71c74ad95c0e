"""Turns: reads the turns of a chat row as events (messages, thoughts, calls, observations)."""

import math
from collections.abc import Callable, Iterator, Mapping
from reprlib import repr as shown  # the content of a row may be of any length and depth
from typing import Any

from moi_jax.data.sources.events import Call, Event, Observation, Thought, message
from moi_jax.data.sources.readers import decode
from moi_jax.data.sources.tools import compact, named_function
from moi_jax.text.conversations import BadRow, Role

CHAT_ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}
SHAREGPT_ROLES: dict[str, Role] = {**CHAT_ROLES, "human": "user", "gpt": "assistant"}
CALLING, RETURNING = "function_call", {"tool", "function", "observation"}
# The keys of an assistant's turn that hold its reasoning, under the names that APIs give it.
REASONING = ("reasoning_content", "reasoning", "thinking")
# The keys that say how much a turn is trained on: of OpenAI, of LLaMA-Factory, of Axolotl.
MARKS = ("weight", "loss_weight", "train")
MOST_WEIGHT = 1_000_000  # more is a mistake, and the weights of a batch are float32

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


def is_weight(value: Any) -> bool:
    """Whether a value is a number that may be a weight; NaN is none."""
    return isinstance(value, int | float) and 0 <= value <= MOST_WEIGHT


def weight_of_turn(turn: Mapping[str, Any]) -> float:
    """The weight of a turn's labels, by its keys `weight`, `loss_weight` and `train`.

    With 0 the turn is not trained on. Several keys are multiplied.
    """
    marks = {key: turn[key] for key in MARKS if turn.get(key) is not None}
    if not marks:
        return 1.0
    if not all(map(is_weight, marks.values())) or marks.get("train", 1) not in (0, 1):
        given = ", ".join(f"{key} {shown(mark)}" for key, mark in marks.items())
        raise BadRow(
            "bad_weight",
            f"{given}; a weight is a number from 0 to {MOST_WEIGHT:,}, and train is true or false",
        )
    return math.prod(map(float, marks.values()))


def row_weight(row: Mapping[str, Any]) -> float:
    """The weight of all labels of a row: its key `weight`, if that holds a number."""
    value = row.get("weight")
    if not isinstance(value, int | float) or isinstance(value, bool):
        return 1.0
    if not is_weight(value):
        raise BadRow(
            "bad_weight", f"the row's weight is {shown(value)}, not from 0 to {MOST_WEIGHT:,}"
        )
    return float(value)


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
            yield message(role, text_of(turn, text_key), weight_of_turn(turn))
        elif lower in RETURNING:
            yield Observation(text_of(turn, text_key), _id(turn.get("tool_call_id")))
        elif lower == CALLING:
            yield from _calls(text_of(turn, text_key), weight_of_turn(turn))
        else:
            raise BadRow("unknown_role", f"the role of a turn is {shown(name)}")

    return events


def _assistant(turn: Mapping[str, Any], key: str) -> Iterator[Event]:
    """The thoughts, the text and the calls of an assistant turn."""
    weight, content = weight_of_turn(turn), turn.get(key)
    calls: list[Call] = []
    if listed := turn.get("tool_calls") or turn.get("function_call"):
        calls += _calls(listed, weight)
    # Some APIs give the same text under two names.
    reasoning = [text_of(turn, name) for name in REASONING if turn.get(name)]
    yield from (Thought(text, weight) for text in dict.fromkeys(reasoning))
    text = ""
    if isinstance(content, list):
        parts = [_part(part) for part in content]
        first = next((n for n, (kind, _) in enumerate(parts) if kind == "tool_call"), None)
        yield from (Thought(text, weight) for kind, text in parts[:first] if kind == "reasoning")
        text = "\n".join(text for kind, text in parts[:first] if kind == "text")
        calls += [] if first is None else _called(parts[first:], weight)
    elif content is not None or not calls:
        text = text_of(turn, key)
    if text or not calls:
        yield message("assistant", text, weight)
    yield from calls


def _called(parts: list[tuple[str, str]], weight: float) -> list[Call]:
    """The calls of parts, of which the first is a call.

    The text before a call is its thought. Text after the last call belongs to that call.
    """
    calls: list[Call] = []
    texts: list[str] = []
    for kind, text in parts:
        if kind != "tool_call":
            texts.append(text)
            continue
        for call in _calls(text, weight):
            calls.append(call._replace(thought="\n\n".join(texts)))
            texts = []
    if not calls:
        raise BadRow("bad_call", "a part of type tool_call has no call")
    thought = "\n\n".join([calls[-1].thought, *texts])
    return [*calls[:-1], calls[-1]._replace(thought=thought)]


def _calls(value: Any, weight: float) -> Iterator[Call]:
    """The calls of an object, a list of objects, or the JSON text of either."""
    if isinstance(value, str):
        value = decode(value, "bad_call")
    for call in value if isinstance(value, list) else [value]:
        name, function = named_function(call, "bad_call")
        yield Call(name, _arguments(function.get("arguments")), _id(call.get("id")), weight)


def _arguments(value: Any) -> str:
    """The arguments of a call as JSON on one line; no arguments are an empty object."""
    if isinstance(value, str):
        value = decode(value, "bad_arguments") if value.strip() else None
    if not isinstance(value, dict | None):
        raise BadRow("bad_arguments", f"the arguments are a {type(value).__name__}")
    return compact(value or {}, "bad_arguments")


def _id(value: Any) -> str:
    return str(value) if isinstance(value, str | int) else ""
