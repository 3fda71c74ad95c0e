"""A chat that goes on: what was said so far, and the prompt of the next answer."""

from collections.abc import Sequence

from moi_jax.data.conversations import Message
from moi_jax.data.rendering import render_prompt
from moi_jax.data.tokenizer import Tokenizer
from moi_jax.errors import UserError


class Chat:
    """Questions and answers under one system prompt, as many as the context holds.

    Attributes:
      messages: users' and assistant's in turn.
      system: the system prompt; None for no system block.
    """

    def __init__(self, tokenizer: Tokenizer, system: str | None, context: int, room: int):
        """
        Args:
          context: tokens of a prompt and its answer together.
          room: tokens kept free for the answer: the oldest exchanges are forgotten for it.
        """
        self.messages: list[Message] = []
        self.system = system
        self._tokenizer, self._context, self._room = tokenizer, context, room

    def ask(self, question: str) -> tuple[list[int], int]:
        """Adds a user's message.

        Returns:
          The prompt of its answer, and the number of old exchanges that were forgotten for it.

        Raises:
          UserError: it does not fit the context even alone; nothing was added.
        """
        asked = [*self.messages, Message("user", question)]
        forgotten = 0
        while len(ids := self._prompt(asked)) + self._room > self._context and len(asked) > 1:
            asked, forgotten = asked[2:], forgotten + 1
        if len(ids) >= self._context:
            raise UserError(
                f"the message makes a prompt of {len(ids):,} tokens and the context has "
                f"{self._context:,}; shorten it, or the system prompt"
            )
        self.messages = asked
        return ids, forgotten

    def answered(self, text: str) -> None:
        """Adds the answer to the last question; without any text both are gone."""
        if text:
            self.messages.append(Message("assistant", text))
        else:
            self.messages.pop()

    def undo(self) -> None:
        """Takes back the last exchange."""
        del self.messages[-2:]

    def _prompt(self, messages: Sequence[Message]) -> list[int]:
        return render_prompt(messages, self._tokenizer, self.system)
