"""Formats: recognises the format of a row by its keys, and turns the row into a `Conversation`.

{"question": "2 + 2?", "answer": "4"}                                   question_answer
{"messages": [{"role": "user", "content": "2 + 2?"}, ...]}              messages
{"conversations": [{"from": "human", "value": "2 + 2?"}, ...]}          sharegpt
"""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from moi_jax.data.sources import nested, react, trajectories
from moi_jax.data.sources.react import Event
from moi_jax.data.sources.turns import CHAT_ROLES, SHAREGPT_ROLES, Reader, text_of, turns
from moi_jax.text.conversations import BadRow, Conversation, Message, Role

CONTROL_TOKEN = re.compile(r"<\|(?:im_start|im_end|endoftext|extra_\d+)\|>")


def detect(row: Mapping[str, Any]) -> str | None:
    """The name of the format whose keys the row has; None if there is none."""
    for name, form in FORMATS.items():
        if any(signature <= row.keys() for signature in form.signatures):
            return name
    return None


class Format(NamedTuple):
    """A format of rows.

    Attributes:
      signatures: a row has the format if it has all keys of one of these sets.
      events: turns a row into events.
      unwrap: first turns a nested row into the plain row that it holds.
    """

    signatures: tuple[frozenset[str], ...]
    events: Reader
    unwrap: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None


def to_conversation(row: Mapping[str, Any], form: Format) -> tuple[Conversation, bool]:
    """The row as a Conversation, and whether a user turn at its end was removed.

    Raises:
      BadRow: the row is not a conversation that can be trained on.
    """
    messages = _messages_of(row, form)
    roles = _turn_roles(messages)
    if "assistant" not in roles:
        raise BadRow("no_assistant", "the row has no assistant turn")
    _check_order(roles)
    trimmed = roles[-1] == "user"
    if trimmed:
        messages = messages[:-1]
    if any(message.role == "assistant" and not message.content.strip() for message in messages):
        raise BadRow("empty_assistant", "an assistant turn is empty")
    return Conversation(tuple(messages)), trimmed


def to_chat(row: Mapping[str, Any], form: Format) -> tuple[Message, ...]:
    """The messages of a row that is not for training: any role may come last.

    Raises:
      BadRow: the row is not a chat.
    """
    messages = _messages_of(row, form)
    _check_order(_turn_roles(messages))
    return tuple(messages)


def _messages_of(row: Mapping[str, Any], form: Format) -> list[Message]:
    if form.unwrap:
        row = form.unwrap(row)
    tools = react.tool_list(row)
    events = form.events(row)
    if row.get("system") is not None:
        events = [Message("system", text_of(row, "system")), *events]
    messages = [event for event in events if isinstance(event, Message)]
    if tools or len(messages) < len(events):
        messages = react.to_messages(events, tools)
    messages = trajectories.mark(messages)
    for message in messages:
        _check_text(message.content)
    if messages and messages[0].role == "system" and not messages[0].content.strip():
        messages = messages[1:]
    return messages


def _check_text(content: str) -> None:
    if "<|" in content and (control := CONTROL_TOKEN.search(content)):
        raise BadRow("control_tokens", f"the text contains {control.group()}")
    if "\0" in content:
        raise BadRow("nul_character", f"the text contains a NUL at {content.index(chr(0))}")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise BadRow("lone_surrogate", f"half a surrogate pair at {error.start}") from None


def _turn_roles(messages: Sequence[Message]) -> list[Role]:
    """The roles after the system message."""
    system_first = bool(messages) and messages[0].role == "system"
    roles = [message.role for message in messages[system_first:]]
    if "system" in roles:
        raise BadRow("system_not_first", "a system turn is not the first turn")
    return roles


def _check_order(roles: Sequence[Role]) -> None:
    if roles[:1] == ["assistant"]:
        raise BadRow("first_turn_assistant", "the first turn is the assistant's")
    for turn, (role, following) in enumerate(pairwise(roles), 1):
        if role == following:
            raise BadRow("roles_not_alternating", f"turns {turn} and {turn + 1} are both {role}'s")


def _pair(question_key: str, answer_key: str) -> Reader:
    """A reader of rows with one question and one answer."""

    def events(row: Mapping[str, Any]) -> list[Event]:
        return [
            Message("user", text_of(row, question_key)),
            Message("assistant", text_of(row, answer_key)),
        ]

    return events


def _alpaca(row: Mapping[str, Any]) -> list[Event]:
    instruction = text_of(row, "instruction")
    text = "" if row.get("input") is None else text_of(row, "input")
    question = f"{instruction}\n\n{text}" if text else instruction
    answer = text_of(row, "response" if "response" in row and "output" not in row else "output")
    return [*_history(row), Message("user", question), Message("assistant", answer)]


def _history(row: Mapping[str, Any]) -> list[Event]:
    """The earlier turns of an Alpaca row, which are pairs of question and answer."""
    events: list[Event] = []
    history = row.get("history") or []
    for pair in history if isinstance(history, list) else [None]:
        if not (
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) for t in pair)
        ):
            raise BadRow("bad_history", "'history' is not a list of pairs of texts")
        events += [Message("user", pair[0]), Message("assistant", pair[1])]
    return events


_messages = turns("messages", "role", "content", CHAT_ROLES)

FORMATS = {
    "messages": Format((frozenset({"messages"}),), _messages),
    "sharegpt": Format(
        (frozenset({"conversations"}),), turns("conversations", "from", "value", SHAREGPT_ROLES)
    ),
    "alpaca": Format(
        (frozenset({"instruction", "output"}), frozenset({"instruction", "response"})), _alpaca
    ),
    "question_answer": Format((frozenset({"question", "answer"}),), _pair("question", "answer")),
    "problem_solution": Format((frozenset({"problem", "solution"}),), _pair("problem", "solution")),
    "text_code": Format((frozenset({"text", "code"}),), _pair("text", "code")),
    "toolbench": Format((frozenset({"answer_generation"}),), _messages, nested.toolbench),
    "oasst": Format((frozenset({"message_tree_id", "prompt"}),), _messages, nested.oasst),
    "self_instruct": Format(
        (frozenset({"instruction", "instances"}),), _alpaca, nested.self_instruct
    ),
}
