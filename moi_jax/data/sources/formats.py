"""Formats: recognises the format of a row by its keys, and turns the row into a `Conversation`.

{"question": "2 + 2?", "answer": "4"}                                   question_answer
{"messages": [{"role": "user", "content": "2 + 2?"}, ...]}              messages
{"conversations": [{"from": "human", "value": "2 + 2?"}, ...]}          sharegpt
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from moi_jax import config
from moi_jax.data.sources import message_trees, native, nested, pairs, react, trajectories
from moi_jax.data.sources.containers import RawRow
from moi_jax.data.sources.events import Event, apart, weighed
from moi_jax.data.sources.tools import listed_tools, openai_form
from moi_jax.data.sources.turns import (
    CHAT_ROLES,
    SHAREGPT_ROLES,
    Reader,
    row_weight,
    text_of,
    turns,
)
from moi_jax.text.conversations import BadRow, Conversation, Message, Role
from moi_jax.text.templates import Template

SYSTEM = ("system", "system_prompt")  # keys of a row's own system text, in every format
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
      optional: keys that are read too, besides `SYSTEM` and the keys of tools, or that are known
        to hold nothing to train on.
      turns: the keys that hold lists of turns.
      unwrap: first turns a nested row into the plain row that it holds.
      join: before that, joins the rows of a file that belong together.
    """

    signatures: tuple[frozenset[str], ...]
    events: Reader
    optional: frozenset[str] = frozenset()
    turns: tuple[str, ...] = ()
    unwrap: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    join: Callable[[Iterable[RawRow]], Iterator[RawRow]] | None = None


class Typing(NamedTuple):
    """What stands apart in messages, so that the chat template writes it; else it is text in them.

    Attributes:
      tools: descriptions, calls and results of tools. Their text form is ReAct.
      thinking: the thoughts before an answer. Their text form is a <think> block.
    """

    tools: bool = False
    thinking: bool = False

    @classmethod
    def of(cls, data: config.Data, template: Template) -> "Typing":
        """What the config and the chat template want."""
        return cls(data.tools == "template" and template.renders_tools, template.typed)


TEXT = Typing()


def to_conversation(
    row: Mapping[str, Any], form: Format, typing: Typing = TEXT
) -> tuple[Conversation, bool]:
    """The row as a Conversation, and whether a user turn at its end was removed.

    Raises:
      BadRow: the row is not a conversation that can be trained on.
    """
    conversation = _read(row, form, typing)
    messages = conversation.messages
    roles = _turn_roles(messages)
    if "assistant" not in roles:
        raise BadRow("no_assistant", "the row has no assistant turn")
    _check_order(roles)
    trimmed = roles[-1] == "user"
    if trimmed:
        messages = messages[:-1]
    if any(
        message.role == "assistant" and not (message.calls or message.content.strip())
        for message in messages
    ):
        raise BadRow("empty_assistant", "an assistant turn is empty")
    return Conversation(messages, conversation.tools), trimmed


def to_chat(row: Mapping[str, Any], form: Format, typing: Typing = TEXT) -> Conversation:
    """The messages and tools of a row that is not for training: any role may come last.

    Raises:
      BadRow: the row is not a chat.
    """
    conversation = _read(row, form, typing, unfinished=True)
    _check_order(_turn_roles(conversation.messages))
    return conversation


def _read(
    row: Mapping[str, Any], form: Format, typing: Typing, unfinished: bool = False
) -> Conversation:
    """The messages and tools of a row, whatever the order of roles.

    Args:
      unfinished: the row may end with results of tools.
    """
    weight = row_weight(row)
    if form.unwrap:
        row = form.unwrap(row)
    listed = listed_tools(row)
    tools = tuple(map(openai_form, listed)) if typing.tools else ()
    described = [] if typing.tools else list(map(react.described, listed))
    events: list[Event] = [Message("system", text) for text in _system_texts(row)]
    events += form.events(row)
    if typing.thinking:
        events = list(apart(events))
    messages = [event for event in events if isinstance(event, Message)]
    if listed or len(messages) < len(events):
        if typing.tools:
            messages = native.to_messages(events, typing.thinking, unfinished)
        else:
            messages = react.to_messages(events, described, typing.thinking)
    messages = trajectories.mark(messages)
    for text in tools:
        _check_text(text)
    for message in messages:
        _check_message(message)
    if messages and messages[0].role == "system" and not messages[0].content.strip():
        messages = messages[1:]
    if weight != 1:
        messages = [weighed(message, weight) for message in messages]
    return Conversation(tuple(messages), tools)


def _check_message(message: Message) -> None:
    """Checks all that the template may write of a message."""
    _check_text(message.content)
    if message.thinking:
        _check_text(message.thinking)
    for call in message.calls:
        for text in call:
            _check_text(text)


def _system_texts(row: Mapping[str, Any]) -> set[str]:
    """The row's own system text, at most one."""
    texts = {text_of(row, key) for key in SYSTEM if row.get(key) is not None}
    texts = {text for text in texts if text.strip()}
    if len(texts) > 1:
        keys = " and ".join(map(repr, SYSTEM))
        raise BadRow("system_not_first", f"{keys} hold different texts; a row has one system text")
    return texts


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
    """The roles after the system message. An answer with its calls and results is one turn."""
    system_first = bool(messages) and messages[0].role == "system"
    turns = messages[system_first:]
    roles: list[Role] = [
        message.role
        for message in turns
        if message.role != "tool" and (not message.calls or message is turns[-1])
    ]
    if "system" in roles:
        raise BadRow("system_not_first", "a system turn is not the first turn")
    return roles


def _check_order(roles: Sequence[Role]) -> None:
    if roles[:1] == ["assistant"]:
        raise BadRow("first_turn_assistant", "the first turn is the assistant's")
    for turn, (role, following) in enumerate(pairwise(roles), 1):
        if role == following:
            raise BadRow("roles_not_alternating", f"turns {turn} and {turn + 1} are both {role}'s")


def _keys(*signatures: str) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(signature.split()) for signature in signatures)


_messages = turns("messages", "role", "content", CHAT_ROLES)
_CONTEXT = frozenset({"context"})

FORMATS = {
    "messages": Format(_keys("messages"), _messages, turns=("messages",)),
    "sharegpt": Format(
        _keys("conversations"),
        turns("conversations", "from", "value", SHAREGPT_ROLES),
        turns=("conversations",),
    ),
    "alpaca": Format(
        _keys("instruction output", "instruction response"),
        pairs.alpaca,
        optional=frozenset({"input", "context", "history"}),
    ),
    "multiple_choice": Format(
        _keys(*(f"question {c} {a}" for c in pairs.CHOICES for a in pairs.RIGHT)),
        pairs.multiple_choice,
        optional=_CONTEXT,
    ),
    "question_answer": Format(
        _keys("question answer", "question response", "question output"),
        pairs.pair("question", "answer", "response", "output"),
        optional=_CONTEXT,
    ),
    "problem_solution": Format(
        _keys("problem solution"), pairs.pair("problem", "solution"), optional=_CONTEXT
    ),
    "text_code": Format(_keys("text code"), pairs.pair("text", "code"), optional=_CONTEXT),
    "prompt_completion": Format(
        _keys("prompt completion", "prompt response"),
        pairs.prompt_completion,
        turns=("prompt", "completion", "response"),
    ),
    "toolbench": Format(
        _keys("answer_generation"),
        _messages,
        optional=frozenset({"compare_candidates"}),
        unwrap=nested.toolbench,
    ),
    "oasst": Format(
        _keys("message_tree_id prompt"),
        _messages,
        optional=frozenset({"tree_state"}),
        unwrap=nested.oasst,
    ),
    "oasst_messages": Format(
        _keys("message_id parent_id role text"),
        _messages,
        unwrap=nested.oasst,
        join=message_trees.join,
    ),
    "self_instruct": Format(
        _keys("instruction instances"), pairs.alpaca, unwrap=nested.self_instruct
    ),
}
