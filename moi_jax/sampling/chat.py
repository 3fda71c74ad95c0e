"""A chat: its history, the prompt of the next answer, and the terminal."""

import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import count

from moi_jax.checkpoints.opener import OpenCheckpoint
from moi_jax.common.errors import UserError
from moi_jax.sampling.generate import (
    complete,
    default_context,
    describe_cut,
    make_request,
    open_sampler,
)
from moi_jax.sampling.requests import GenerationConfig
from moi_jax.text.conversations import Message
from moi_jax.text.rendering import render_prompt
from moi_jax.text.tokenizer import Tokenizer

DEFAULT_CONTEXT = 8192  # tokens of a chat; fewer where the model's own length is shorter
HELP = """\
/system TEXT   sets the system prompt of the whole chat; without TEXT, shows it
/no-system     removes the system prompt
/undo          removes the last question and its answer
/reset         clears the history
/quit          leaves, like Ctrl-D; Ctrl-C stops an answer
To send a message that begins with /, put a space before it."""


class Chat:
    """The history of a chat under one system prompt, as long as the context allows.

    Attributes:
      messages: the user's and the assistant's in turn.
      system: the system prompt; None for no system block.
    """

    def __init__(self, tokenizer: Tokenizer, system: str | None, context: int, room: int):
        """
        Args:
          context: tokens of a prompt and its answer together.
          room: tokens kept free for the answer; the oldest exchanges are dropped to make room.
        """
        self.messages: list[Message] = []
        self.system = system
        self._tokenizer, self._context, self._room = tokenizer, context, room

    def ask(self, question: str) -> tuple[list[int], int]:
        """Adds a user's message.

        Returns:
          The prompt of its answer, and the number of old exchanges that were dropped for it.

        Raises:
          UserError: it does not fit the context even alone; it is not added.
        """
        asked = [*self.messages, Message("user", question)]
        dropped = 0
        while len(ids := self._prompt(asked)) + self._room > self._context and len(asked) > 1:
            asked, dropped = asked[2:], dropped + 1
        if len(ids) >= self._context:
            raise UserError(
                f"the message makes a prompt of {len(ids):,} tokens and the context has "
                f"{self._context:,}; shorten the message or the system prompt"
            )
        self.messages = asked
        return ids, dropped

    def answered(self, text: str) -> None:
        """Adds the answer to the last question; without any text, drops the question too."""
        if text:
            self.messages.append(Message("assistant", text))
        else:
            self.messages.pop()

    def undo(self) -> None:
        """Removes the last exchange, if there is one."""
        del self.messages[-2:]

    def _prompt(self, messages: Sequence[Message]) -> list[int]:
        return render_prompt(messages, self._tokenizer, self.system)


def start_chat(
    checkpoint: OpenCheckpoint,
    config: GenerationConfig,
    *,
    system: str | None,
    context: int | None = None,
) -> None:
    """Chats with a checkpoint on the terminal, until the user leaves.

    Args:
      config: of every answer; the n-th question has the seed config.seed + n.
      system: the system prompt; None for no system block.
      context: tokens that the history and the next answer may have together.
    """
    context = context or default_context(checkpoint, DEFAULT_CONTEXT)
    sampler = open_sampler(checkpoint, context=context)
    numbers = count()

    def answer(prompt: list[int], show: Callable[[str], None]) -> str | None:
        request = make_request(prompt, config, next(numbers))
        return describe_cut(complete(checkpoint, sampler, request, show))

    room = min(config.max_new_tokens, context // 2)
    chat_on_terminal(Chat(checkpoint.tokenizer, system, context, room), answer, _note)


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def chat_on_terminal(
    chat: Chat,
    answer: Callable[[list[int], Callable[[str], None]], str | None],
    note: Callable[[str], None],
) -> None:
    """Reads messages and shows their answers, until /quit or the end of the input.

    Args:
      answer: (prompt, function that shows new text) -> a note to show afterwards, or None. Ctrl-C
        interrupts it.
      note: shows the user a line that is no answer.
    """
    note("Ctrl-C stops an answer, Ctrl-D leaves, /help lists the commands")
    shown: list[str] = []

    def show(text: str) -> None:
        shown.append(text)
        print(text, end="", flush=True)

    for message in _read(chat, note):
        shown.clear()
        try:
            prompt, dropped = chat.ask(message)
        except UserError as error:
            note(str(error))
            continue
        if dropped:
            note(f"(the context is full; oldest exchanges dropped: {dropped})")
        try:
            ended = answer(prompt, show)
        except KeyboardInterrupt:
            ended = "(stopped)"
        print()
        if ended:
            note(ended)
        chat.answered("".join(shown))


def _read(chat: Chat, note: Callable[[str], None]) -> Iterator[str]:
    """Yields the user's messages to the model; carries out commands."""
    import readline  # noqa: F401  # gives input() its line editing

    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    while True:
        try:
            line = input("> ")
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            print()
            return
        if line == "/quit":
            return
        if line.startswith("/"):
            note(_command(chat, *line.partition(" ")[::2]))
        elif line.strip():
            yield line.strip()


def _command(chat: Chat, name: str, text: str) -> str:
    """Carries out a command; returns a note for the user."""
    if name == "/help":
        return HELP
    if name == "/reset":
        chat.messages.clear()
        return "the history is empty"
    if name == "/undo":
        chat.undo()
        return f"{len(chat.messages) // 2} exchanges are left"
    if name == "/system" and text.strip():
        chat.system = text.strip()
    elif name == "/no-system":
        chat.system = None
    elif name != "/system":
        return f"there is no command {name}; /help lists them"
    return "no system prompt" if chat.system is None else f"system prompt: {chat.system}"
