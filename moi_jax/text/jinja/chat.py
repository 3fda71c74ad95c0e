"""Conversations in the form in which chat templates read them."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, takewhile
from typing import Any

from moi_jax.text.conversations import Conversation, Message, ToolCall

Json = dict[str, Any]
SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")
THINK, THOUGHT = "<think>", "</think>"


@dataclass(frozen=True)
class Style:
    """How a template wants what templates do not agree on.

    Attributes:
      thinking: as a key of the message; else in <think> tags at the front of the content.
      arguments: of a call as an object; else as JSON text.
      no_content: the content of a message that only calls tools.
      short_ids: calls have ids of nine letters or digits, as Mistral's templates demand.
    """

    thinking: bool
    arguments: bool = True
    no_content: str | None = ""
    short_ids: bool = False

    def messages(self, messages: Sequence[Message]) -> list[Json]:
        """The messages as a template gets them."""
        return [self._message(message) for message in messages]

    def _message(self, message: Message) -> Json:
        content: str | None = message.content
        if message.role == "tool":
            named = {"name": message.name, "tool_call_id": self._id(message.call_id)}
            return {"role": "tool", "content": content, **{k: v for k, v in named.items() if v}}
        whole: Json = {"role": message.role}
        if message.thinking and self.thinking:
            # Templates read it under one name or the other; transformers gives both, too.
            whole |= {"reasoning_content": message.thinking, "thinking": message.thinking}
        elif message.thinking:
            content = inline_thinking(message)
        whole["content"] = content or (self.no_content if message.calls else content)
        if message.calls:
            whole["tool_calls"] = [
                {
                    "type": "function",
                    **({"id": self._id(call.id)} if call.id else {}),
                    "function": {
                        "name": call.name,
                        "arguments": self._arguments(call),
                    },
                }
                for call in message.calls
            ]
        return whole

    def _arguments(self, call: ToolCall) -> Any:
        return json.loads(call.arguments) if self.arguments else call.arguments

    def _id(self, text: str) -> str:
        if not self.short_ids or SHORT_ID.fullmatch(text):
            return text
        return hashlib.sha256(text.encode()).hexdigest()[:9]


def inline_thinking(message: Message) -> str:
    """The content of an answer with its thinking at the front."""
    return f"{THINK}\n{message.thinking}\n{THOUGHT}\n\n{message.content}"


def shared_length(one: str, other: str) -> int:
    """How many characters two texts share at their beginnings."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


@lru_cache(maxsize=256)
def tool_objects(tools: tuple[str, ...]) -> list[Json] | None:
    """Descriptions of tools as a template gets them; None if there are none.

    The sandbox keeps templates from changing them.
    """
    return [json.loads(tool) for tool in tools] or None


def texts_of(message: Message) -> list[str]:
    """All texts of a message that come from its row."""
    called = [text for call in message.calls for text in (call.name, call.arguments, call.id)]
    return [message.content, message.thinking, message.name, message.call_id, *called]


def normalized(conversation: Conversation, normalize: Callable[[str], str]) -> Conversation:
    """The conversation with every text in the tokenizer's normal form."""
    texts = chain(conversation.tools, *map(texts_of, conversation.messages))
    if all(normalize(text) == text for text in texts):
        return conversation
    messages = tuple(
        replace(
            m,
            content=normalize(m.content),
            thinking=normalize(m.thinking),
            calls=tuple(call._replace(arguments=normalize(call.arguments)) for call in m.calls),
        )
        for m in conversation.messages
    )
    return replace(conversation, messages=messages, tools=tuple(map(normalize, conversation.tools)))
