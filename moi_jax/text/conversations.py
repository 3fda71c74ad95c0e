"""Conversations: the typed form of every source row, and the error for a row that has none."""

import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

Role = Literal["system", "user", "assistant", "tool"]


class BadRow(Exception):
    """A row that is not a usable conversation.

    Attributes:
      reason: a short snake_case key; dropped rows are counted by it.
      detail: what is wrong, for people.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)  # both, or it could not be unpickled
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


class ToolCall(NamedTuple):
    """A call of a tool by the assistant.

    Attributes:
      arguments: a JSON object on one line.
      id: "" if there is none.
    """

    name: str
    arguments: str
    id: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    Attributes:
      train: with False an assistant's text carries no loss.
      trajectory: the text calls tools in ReAct form, so a tool wrote its observations.
      thinking: what the assistant thinks before its content and calls.
      calls: the assistant calls these tools together.
      call_id, name: of the call whose result a tool's message is; "" if unknown.
      weight: of the labels of the turn, beside those of the domain.
    """

    role: Role
    content: str
    train: bool = True
    trajectory: bool = False
    thinking: str = ""
    calls: tuple[ToolCall, ...] = ()
    call_id: str = ""
    name: str = ""
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Conversation:
    """An optional system message, then exchanges; the last message is an assistant's.

    An exchange is a user's message and the assistant's answer. Before the answer, the assistant may
    call tools, and the tools' messages follow the message that calls them.

        Conversation((Message("user", "What is 2 + 2?"), Message("assistant", "It is 4.")))

    Attributes:
      tools: the descriptions of the tools that may be called, each a JSON object on one line, as
        OpenAI's interface has it: {"type": "function", "function": {"name": ..., ...}}.
    """

    messages: tuple[Message, ...]
    tools: tuple[str, ...] = ()

    @property
    def system(self) -> str | None:
        first = self.messages[0]
        return first.content if first.role == "system" else None

    @property
    def turns(self) -> tuple[Message, ...]:
        """The messages after the system message."""
        return self.messages if self.system is None else self.messages[1:]

    def first_exchanges(self, count: int) -> "Conversation":
        """The conversation with only its first `count` exchanges."""
        begins = [n for n, message in enumerate(self.messages) if message.role == "user"]
        ends = [*begins[1:], len(self.messages)]
        return replace(self, messages=self.messages[: ends[count - 1]])


def content_hash(messages: Sequence[Message], tools: Sequence[str] = ()) -> int:
    """A 64-bit hash of the roles, and of the NFC-normalised, stripped texts of all parts."""
    digest = hashlib.sha256()

    def add(kind: str, text: str) -> None:
        content = unicodedata.normalize("NFC", text).strip().encode()
        digest.update(f"{kind} {len(content)} ".encode() + content)

    for tool in tools:
        add("description", tool)
    for message in messages:
        add(message.role, message.content)
        if message.thinking:
            add("thinking", message.thinking)
        for call in message.calls:
            add("call", call.name)
            add("arguments", call.arguments)
    return int.from_bytes(digest.digest()[:8], "little")
