"""Conversations: the typed form of every source row, and the error for a row that has none."""

import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant"]


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


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    Attributes:
      train: with False an assistant's text carries no loss.
      trajectory: the text calls tools in ReAct form, so a tool wrote its observations.
    """

    role: Role
    content: str
    train: bool = True
    trajectory: bool = False


@dataclass(frozen=True, slots=True)
class Conversation:
    """An optional system message, then user and assistant alternating; the last is an assistant.

    Conversation((Message("user", "What is 2 + 2?"), Message("assistant", "It is 4.")))
    """

    messages: tuple[Message, ...]

    @property
    def system(self) -> str | None:
        first = self.messages[0]
        return first.content if first.role == "system" else None

    @property
    def turns(self) -> tuple[Message, ...]:
        """The messages after the system message."""
        return self.messages if self.system is None else self.messages[1:]

    def first_exchanges(self, count: int) -> "Conversation":
        """The conversation with only its first `count` pairs of user and assistant turns."""
        system = len(self.messages) - len(self.turns)
        return Conversation(self.messages[: system + 2 * count])


def content_hash(messages: Sequence[Message]) -> int:
    """A 64-bit hash of the roles and the NFC-normalised, stripped contents."""
    digest = hashlib.sha256()
    for message in messages:
        content = unicodedata.normalize("NFC", message.content).strip().encode()
        digest.update(f"{message.role} {len(content)} ".encode() + content)
    return int.from_bytes(digest.digest()[:8], "little")
