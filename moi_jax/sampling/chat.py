"""A chat: its history, the prompt of the next answer, and the terminal."""

import json
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
from moi_jax.text.answers import call_objects, read_answer
from moi_jax.text.conversations import Message, ToolCall
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
      messages: exchanges of a user's message and the answer, with calls of tools and their results
        between them.
      system: the system prompt; None for no system block.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        system: str | None,
        context: int,
        room: int,
        *,
        tools: Sequence[str] = (),
        thinking: bool | None = None,
    ):
        """
        Args:
          context: tokens of a prompt and its answer together.
          room: tokens kept free for the answer; the oldest exchanges are dropped to make room.
          tools, thinking: see `render_prompt`.
        """
        self.messages: list[Message] = []
        self.system = system
        self._tokenizer, self._context, self._room = tokenizer, context, room
        self._tools, self._thinking = tools, thinking

    @property
    def exchanges(self) -> int:
        """How many questions the history has."""
        return sum(message.role == "user" for message in self.messages)

    def ask(self, messages: Sequence[Message]) -> tuple[list[int], int]:
        """Adds a user's message, or the results of the tools that the last answer calls.

        Returns:
          The prompt of the answer, and the number of old exchanges that were dropped for it.

        Raises:
          UserError: the exchange does not fit the context even alone; nothing is added.
        """
        asked, dropped = [*self.messages, *messages], 0
        while len(ids := self._prompt(asked)) + self._room > self._context:
            later = [n for n, message in enumerate(asked) if n and message.role == "user"]
            if not later:
                break
            asked, dropped = asked[later[0] :], dropped + 1
        if len(ids) >= self._context:
            raise UserError(
                f"the message makes a prompt of {len(ids):,} tokens and the context has "
                f"{self._context:,}; shorten the message or the system prompt"
            )
        self.messages = asked
        return ids, dropped

    def answered(self, text: str) -> tuple[ToolCall, ...]:
        """Adds the answer; without any text, drops the last exchange.

        Returns:
          The calls of the answer, whose results must come next.
        """
        if not text:
            self.undo()
            return ()
        answer = read_answer(text, self._tokenizer.template, self._tools, self._thinking)
        self.messages.append(answer)
        return answer.calls

    def undo(self) -> None:
        """Removes the last exchange, if there is one."""
        while self.messages and self.messages.pop().role != "user":
            pass

    def _prompt(self, messages: Sequence[Message]) -> list[int]:
        return render_prompt(messages, self._tokenizer, self.system, self._tools, self._thinking)


def start_chat(
    checkpoint: OpenCheckpoint,
    config: GenerationConfig,
    *,
    system: str | None,
    tools: Sequence[str] = (),
    thinking: bool | None = None,
    context: int | None = None,
) -> None:
    """Chats with a checkpoint on the terminal, until the user leaves.

    Args:
      config: of every answer; the n-th question has the seed config.seed + n.
      system: the system prompt; None for no system block.
      tools, thinking: see `render_prompt`.
      context: tokens that the history and the next answer may have together.
    """
    context = context or default_context(checkpoint, DEFAULT_CONTEXT)
    sampler = open_sampler(checkpoint, context=context)
    numbers = count()

    def answer(prompt: list[int], show: Callable[[str], None]) -> str | None:
        request = make_request(prompt, config, next(numbers))
        return describe_cut(complete(checkpoint, sampler, request, show))

    room = min(config.max_new_tokens, context // 2)
    chat = Chat(checkpoint.tokenizer, system, context, room, tools=tools, thinking=thinking)
    chat_on_terminal(chat, answer, _note)


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
    for question in _read(chat, note):
        asked = [Message("user", question)]
        while asked:
            try:
                calls = _exchange(chat, asked, answer, note)
            except UserError as error:
                note(str(error))
                if asked[0].role == "tool":
                    chat.undo()
                    note("(the question is dropped, since the results of its calls do not fit)")
                break
            asked = _results(calls, note)
            if calls and not asked:
                chat.undo()
                note("(the question is dropped, since its calls have no results)")


def _exchange(
    chat: Chat,
    asked: Sequence[Message],
    answer: Callable[[list[int], Callable[[str], None]], str | None],
    note: Callable[[str], None],
) -> tuple[ToolCall, ...]:
    """Asks, and shows the answer; returns its calls.

    Raises:
      UserError: see `Chat.ask`.
    """
    shown: list[str] = []

    def show(text: str) -> None:
        shown.append(text)
        print(text, end="", flush=True)

    prompt, dropped = chat.ask(asked)
    if dropped:
        note(f"(the context is full; oldest exchanges dropped: {dropped})")
    try:
        ended = answer(prompt, show)
    except KeyboardInterrupt:
        ended = "(stopped)"
    print()
    if ended:
        note(ended)
    return chat.answered("".join(shown))


def _results(calls: Sequence[ToolCall], note: Callable[[str], None]) -> list[Message]:
    """The results of calls, as the user types them; none if the user stops."""
    results = []
    for call, shown in zip(calls, call_objects(calls), strict=True):
        note(f"call: {json.dumps(shown, ensure_ascii=False)}")
        try:
            result = input(f"result of {call.name}> ")
        except (KeyboardInterrupt, EOFError):
            print()
            return []
        results.append(Message("tool", result, call_id=call.id, name=call.name))
    return results


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
        return f"{chat.exchanges} exchanges are left"
    if name == "/system" and text.strip():
        chat.system = text.strip()
    elif name == "/no-system":
        chat.system = None
    elif name != "/system":
        return f"there is no command {name}; /help lists them"
    return "no system prompt" if chat.system is None else f"system prompt: {chat.system}"
