"""Formats: what the keys of a row tell, and how each becomes one `Conversation` or `BadRow`."""

import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

from moi_jax.data.conversations import BadRow, Conversation, Message, Role

CONTROL_TOKEN = re.compile(r"<\|(?:im_start|im_end|endoftext|extra_\d+)\|>")
MESSAGES_ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}
SHAREGPT_ROLES: dict[str, Role] = {**MESSAGES_ROLES, "human": "user", "gpt": "assistant"}
TOOL_ROLES = {"function_call", "observation", "tool", "function"}


def detect(row: Mapping[str, Any]) -> str | None:
    """The name of the format whose keys the row has."""
    for name, form in FORMATS.items():
        if any(signature <= row.keys() for signature in form.signatures):
            return name
    return None


Reader = Callable[[Mapping[str, Any]], list[Message]]


class Format(NamedTuple):
    """Keys that tell the format (any one of the sets), and how a row becomes messages."""

    signatures: tuple[frozenset[str], ...]
    messages: Reader


def to_conversation(row: Mapping[str, Any], form: Format) -> tuple[Conversation, bool]:
    """The row as a Conversation, and whether a trailing user turn was trimmed.

    Raises:
      BadRow: the row is no conversation that can be trained on.
    """
    for key in ("tools", "functions"):
        value = row.get(key)
        if isinstance(value, str):
            value = value.strip() not in ("", "[]")
        if value:
            raise BadRow("tools_not_built", f"the row has a list of {key}")
    messages = form.messages(row)
    if row.get("system") is not None:
        messages = [Message("system", _text(row, "system")), *messages]
    for message in messages:
        _check_text(message.content)
    if messages and messages[0].role == "system" and not messages[0].content.strip():
        messages = messages[1:]
    return _check_turns(messages)


def _check_text(content: str) -> None:
    if "<|" in content and (control := CONTROL_TOKEN.search(content)):
        raise BadRow("control_tokens", f"{control.group()} stands in the text")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise BadRow("lone_surrogate", f"half a surrogate pair at {error.start}") from None


def _check_turns(messages: list[Message]) -> tuple[Conversation, bool]:
    system_first = bool(messages) and messages[0].role == "system"
    roles = [message.role for message in messages[system_first:]]
    if "system" in roles:
        raise BadRow("system_not_first", "a system turn stands later than first")
    if "assistant" not in roles:
        raise BadRow("no_assistant", "the row has no assistant turn")
    if roles[0] == "assistant":
        raise BadRow("first_turn_assistant", "the first turn is the assistant's")
    for turn, (role, following) in enumerate(pairwise(roles), 1):
        if role == following:
            raise BadRow("roles_not_alternating", f"turns {turn} and {turn + 1} are both {role}'s")
    trimmed = roles[-1] == "user"
    if trimmed:
        messages = messages[:-1]
    if any(message.role == "assistant" and not message.content.strip() for message in messages):
        raise BadRow("empty_assistant", "an assistant turn is empty")
    return Conversation(tuple(messages)), trimmed


def _text(row: Mapping[str, Any], key: str) -> str:
    if key not in row:
        raise BadRow("missing_field", f"no {key!r}")
    value = row[key]
    if not isinstance(value, str):
        raise BadRow("content_not_text", f"{key!r} is {type(value).__name__}")
    return value


def _train(turn: Mapping[str, Any]) -> bool:
    weight, train = turn.get("weight"), turn.get("train")
    if weight not in (None, 0, 1) or train not in (None, False, True):
        raise BadRow("bad_weight", f"weight {weight!r}, train {train!r}; use 0 or 1, true or false")
    return weight != 0 and train is not False


def _turns(key: str, role_key: str, text_key: str, roles: Mapping[str, Role]) -> Reader:
    """Reads the list of turns below `key`."""

    def messages(row: Mapping[str, Any]) -> list[Message]:
        turns = row.get(key)
        if not isinstance(turns, list):
            raise BadRow("missing_field", f"no list {key!r}")
        return [message(turn) for turn in turns]

    def message(turn: Any) -> Message:
        if not isinstance(turn, dict):
            raise BadRow("not_an_object", f"a turn is a {type(turn).__name__}")
        role = turn.get(role_key)
        if role is None:
            raise BadRow("missing_role", f"a turn has no {role_key!r}")
        if turn.get("tool_calls") or turn.get("function_call"):
            raise BadRow("tools_not_built", "a turn calls a tool")
        if not isinstance(role, str) or role not in roles:
            tool = isinstance(role, str) and role in TOOL_ROLES
            reason = "tools_not_built" if tool else "unknown_role"
            raise BadRow(reason, f"the role of a turn is {role!r}")
        return Message(roles[role], _text(turn, text_key), _train(turn))

    return messages


def _pair(question_key: str, answer_key: str) -> Reader:
    """Reads one question and one answer."""

    def messages(row: Mapping[str, Any]) -> list[Message]:
        return [
            Message("user", _text(row, question_key)),
            Message("assistant", _text(row, answer_key)),
        ]

    return messages


def _alpaca(row: Mapping[str, Any]) -> list[Message]:
    if row.get("history"):
        raise BadRow("history_not_built", "the row has earlier turns in 'history'")
    instruction = _text(row, "instruction")
    text = "" if row.get("input") is None else _text(row, "input")
    question = f"{instruction}\n\n{text}" if text else instruction
    answer = _text(row, "response" if "response" in row and "output" not in row else "output")
    return [Message("user", question), Message("assistant", answer)]


FORMATS = {
    "messages": Format(
        (frozenset({"messages"}),), _turns("messages", "role", "content", MESSAGES_ROLES)
    ),
    "sharegpt": Format(
        (frozenset({"conversations"}),), _turns("conversations", "from", "value", SHAREGPT_ROLES)
    ),
    "alpaca": Format(
        (frozenset({"instruction", "output"}), frozenset({"instruction", "response"})), _alpaca
    ),
    "question_answer": Format((frozenset({"question", "answer"}),), _pair("question", "answer")),
    "problem_solution": Format((frozenset({"problem", "solution"}),), _pair("problem", "solution")),
    "text_code": Format((frozenset({"text", "code"}),), _pair("text", "code")),
}
