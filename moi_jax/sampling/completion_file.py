"""A file of conversations and their completions: JSON Lines in, JSON Lines out."""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moi_jax.checkpoints.items import parameters_fingerprint
from moi_jax.checkpoints.opener import OpenCheckpoint
from moi_jax.common.atomic_files import atomic_write_text
from moi_jax.common.errors import UserError, cannot_write
from moi_jax.common.fingerprint import json_fingerprint
from moi_jax.common.progress import count_bar
from moi_jax.data.sources.formats import FORMATS, TEXT, Typing, to_chat
from moi_jax.data.sources.readers import SourceFile, parse
from moi_jax.data.sources.turns import text_of
from moi_jax.parallel import hosts
from moi_jax.sampling.generate import default_context, make_request, not_finite, open_sampler
from moi_jax.sampling.requests import Completion, GenerationConfig
from moi_jax.sampling.response_log import ResponseLog, json_line
from moi_jax.text.answers import message_object, read_answer
from moi_jax.text.conversations import BadRow, Message
from moi_jax.text.rendering import render_prompt
from moi_jax.text.templates import Template

log = logging.getLogger(__name__)

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ConversationRow:
    """A row as it stands in the file, and the messages and tools that the model is given."""

    content: Json
    messages: tuple[Message, ...]
    tools: tuple[str, ...] = ()


def read_conversations(path: Path, typing: Typing = TEXT) -> list[ConversationRow]:
    """The rows of a file in the format `messages`, each with what can be answered last.

    Args:
      typing: what stands apart in the messages. With tools, a row may end with their results.

    Raises:
      UserError: there is no such file, it has no rows, or a row is malformed.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}; name one with a JSON object a line")
    rows = []
    for raw in SourceFile(path.name, path).rows():
        try:
            content = parse(raw.raw)
            chat = to_chat(content, FORMATS["messages"], typing)
            messages = _with_empty_system(chat.messages, content)
        except BadRow as bad:
            raise UserError(f"{path}:{raw.line}: {bad.detail} ({bad.reason})") from None
        asked = messages and messages[-1].role in ("user", "tool")
        if not asked or not isinstance(content["messages"], list):
            raise UserError(
                f'{path}:{raw.line}: the row is not {{"messages": [...]}} with a user\'s message '
                f"last or, where the chat template has tools, their results; only such a row can "
                f"be answered"
            )
        rows.append(ConversationRow(content, messages, chat.tools))
    if not rows:
        raise UserError(f"{path} has no rows")
    return rows


def _with_empty_system(messages: tuple[Message, ...], content: Json) -> tuple[Message, ...]:
    """The messages with the row's own system prompt, even if it is blank.

    Training drops a blank one; here the default prompt would take its place.
    """
    if messages and messages[0].role == "system":
        return messages
    if content.get("system") is not None:
        return (Message("system", text_of(content, "system")), *messages)
    turns = content["messages"]
    if isinstance(turns, list) and turns and str(turns[0].get("role")).lower() == "system":
        return (Message("system", text_of(turns[0], "content")), *messages)
    return messages


def check_absent(path: Path) -> None:
    """Raises UserError if the file exists already."""
    if path.exists():
        raise UserError(f"{path} exists; name a new file, nothing is overwritten")


class CompletionFile:
    """The rows with their answers, written when all are there.

    Until then PATH.partial holds the answers so far; after a kill, the same command continues.
    """

    def __init__(
        self,
        path: Path,
        rows: Sequence[ConversationRow],
        prompts: Sequence[list[int]],
        made_by: Json,
        template: Template,
        thinking: bool | None = None,
    ):
        """
        Args:
          path: must not exist, see `check_absent`.
          prompts: token ids of each row's prompt.
          made_by: the settings, which must be the same when a file is continued.
          template: tells thinking and calls from the text of an answer.
          thinking: with which the prompts were rendered, see `render_prompt`.

        Raises:
          UserError: `path` cannot be written, or its partial file has other settings.
        """
        self._path, self._rows, self._prompts = path, rows, prompts
        self._template, self._thinking = template, thinking
        self.partial = path.with_name(f"{path.name}.partial")
        self._log = ResponseLog(self.partial, made_by)

    def waiting(self) -> list[int]:
        """Numbers of the rows that have no answer yet."""
        return [
            n for n, prompt in enumerate(self._prompts) if not self._log.has((str(n), 0), prompt)
        ]

    def add(self, row: int, completion: Completion) -> None:
        """Saves the answer of a row."""
        answer = {"text": completion.text, "finish": completion.finish}
        self._log.add((str(row), 0), self._prompts[row], **answer)

    def finish(self) -> dict[str, int]:
        """Writes the file once all rows are answered; returns how often each `finish` occurred."""
        self._log.close()
        counts: dict[str, int] = {}
        lines = []
        for row, answer in self._answered():
            counts[answer["finish"]] = counts.get(answer["finish"], 0) + 1
            message = read_answer(answer["text"], self._template, row.tools, self._thinking)
            messages = [*row.content["messages"], message_object(message)]
            content = {**row.content, "messages": messages, "finish": answer["finish"]}
            lines.append(json_line(content))
        try:
            atomic_write_text(self._path, "".join(lines))
            self.partial.unlink()
        except OSError as error:
            raise cannot_write(self._path, error) from None
        return counts

    def _answered(self) -> Iterator[tuple[ConversationRow, Json]]:
        for number, row in enumerate(self._rows):
            yield row, self._log.found[str(number), 0]


def complete_file(
    checkpoint: OpenCheckpoint,
    rows: Sequence[ConversationRow],
    out: Path,
    config: GenerationConfig,
    *,
    system: str | None,
    thinking: bool | None = None,
    slots: int = 16,
    context: int | None = None,
) -> None:
    """Answers the rows of a file and writes them to `out`; continues what a killed call began.

    All processes of a run call it with the same rows; process 0 writes.

    Args:
      rows: of `read_conversations`.
      out: a file that does not exist yet, see `check_absent`.
      config: of every answer; row n has the seed config.seed + n.
      system: the system prompt of rows that bring none; None for no system block.
      thinking: see `render_prompt`.
      slots: how many rows are answered at a time.
      context: tokens of the longest prompt and its answer; None means what they need.

    Raises:
      UserError: `out` cannot be written, an answer file with other settings was begun there, or
        the model gave logits that are not finite (`out` is written, and says in which rows).
    """
    tokenizer = checkpoint.tokenizer
    prompts = [render_prompt(row.messages, tokenizer, system, row.tools, thinking) for row in rows]
    settings = dataclasses.asdict(config)
    settings["stop"] = list(settings.pop("stop_strings"))
    hosts.check_same({"file of conversations": json_fingerprint(prompts)})
    made_by = {
        "parameters": parameters_fingerprint(checkpoint.step),
        "dtype": checkpoint.dtype,
        "context": context,
        **settings,
    }
    answers = CompletionFile(out, rows, prompts, made_by, tokenizer.template, thinking)
    waiting = answers.waiting()
    if len(waiting) < len(rows):
        log.info(f"{len(rows) - len(waiting)} of {len(rows)} rows were answered before")
    if waiting:
        needed = max(map(len, prompts)) + config.max_new_tokens
        requests = [make_request(prompts[n], config, n) for n in waiting]
        sampler = open_sampler(
            checkpoint,
            slots=min(slots, len(waiting)),
            context=context or default_context(checkpoint, needed),
            requests=requests,
        )
        try:
            with count_bar("answers", len(waiting)) as progress:
                for index, completion in sampler.run(checkpoint.parameters, requests):
                    answers.add(waiting[index], completion)
                    progress(1)
        except KeyboardInterrupt:
            log.info(f"{answers.partial} keeps the answers so far; the same command continues it")
            raise
    counts = hosts.from_main("the answers' file", answers.finish)
    ended = ", ".join(f"{finish} {number}" for finish, number in sorted(counts.items()))
    log.info(f"{out}: {len(rows)} answers ({ended})")
    if bad := counts.get("not_finite"):
        error = not_finite(checkpoint)
        raise UserError(f"{bad} of {len(rows)} rows have no complete answer: {error}")
