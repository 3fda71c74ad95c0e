"""Conversations: the one typed form every source row takes, and the row that cannot take it."""

import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant"]


class BadRow(Exception):
    """A row that is no usable conversation; `reason` is a short snake_case key to count by."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)  # both, so that it can be pickled
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn; `train=False` keeps an assistant's text out of the loss."""

    role: Role
    content: str
    train: bool = True


@dataclass(frozen=True, slots=True)
class Conversation:
    """An optional system message, then user and assistant in turn, an assistant last."""

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
        """The conversation cut after its first `count` pairs of user and assistant."""
        system = len(self.messages) - len(self.turns)
        return Conversation(self.messages[: system + 2 * count])


def content_hash(messages: Sequence[Message]) -> int:
    """A 64-bit hash of the roles and the NFC-normalised, stripped contents, and nothing else."""
    digest = hashlib.sha256()
    for message in messages:
        content = unicodedata.normalize("NFC", message.content).strip().encode()
        digest.update(f"{message.role} {len(content)} ".encode() + content)
    return int.from_bytes(digest.digest()[:8], "little")
