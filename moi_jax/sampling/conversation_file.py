"""A file of conversations, each answered: a JSON object a line, and again with the answer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moi_jax.common.atomic_files import atomic_write_text
from moi_jax.common.errors import UserError, cannot_write
from moi_jax.data.sources.formats import FORMATS, to_chat
from moi_jax.data.sources.readers import SourceFile, parse
from moi_jax.data.sources.turns import text_of
from moi_jax.sampling.answer_log import AnswerLog, json_line
from moi_jax.sampling.requests import Completion
from moi_jax.text.conversations import BadRow, Message

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """A row as it stands in the file, and the messages the model goes on from."""

    content: Json
    messages: tuple[Message, ...]


def read_conversations(path: Path) -> list[Row]:
    """The rows of a file in the format `messages`, each ended by a user's message.

    Raises:
      UserError: there is no such file, it has no row, or one is malformed (says which).
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}; name one with a JSON object a line")
    rows = []
    for raw in SourceFile(path.name, path).rows():
        try:
            content = parse(raw.raw)
            messages = _with_empty_system(to_chat(content, FORMATS["messages"]), content)
        except BadRow as bad:
            raise UserError(f"{path}:{raw.line}: {bad.detail} ({bad.reason})") from None
        if not messages or messages[-1].role != "user" or not isinstance(content["messages"], list):
            raise UserError(
                f'{path}:{raw.line}: the row is not {{"messages": [...]}} with a user\'s message '
                f"last, which is what a model answers"
            )
        rows.append(Row(content, messages))
    if not rows:
        raise UserError(f"{path} has no rows")
    return rows


def _with_empty_system(messages: tuple[Message, ...], content: Json) -> tuple[Message, ...]:
    """The messages under the row's own system prompt, be it blank.

    In training a blank one is none and is dropped; here it would give way to the default prompt.
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
    if path.exists():
        raise UserError(f"{path} exists; name a new file, nothing is overwritten")


class AnsweredFile:
    """The rows with their answers: written whole, and kept beside until then.

    What a killed command had answered stands in PATH.partial; the same command goes on from it.
    """

    def __init__(
        self, path: Path, rows: Sequence[Row], prompts: Sequence[list[int]], made_by: Json
    ):
        """
        Args:
          path: not there, see `check_absent`.
          prompts: of the rows.
          made_by: what must be the same when it goes on.

        Raises:
          UserError: `path` cannot be written, or its partial file was made otherwise.
        """
        self._path, self._rows, self._prompts = path, rows, prompts
        self.partial = path.with_name(f"{path.name}.partial")
        self._log = AnswerLog(self.partial, made_by)

    def waiting(self) -> list[int]:
        """The rows without an answer."""
        return [
            n for n, prompt in enumerate(self._prompts) if not self._log.has((str(n), 0), prompt)
        ]

    def add(self, row: int, completion: Completion) -> None:
        answer = {"text": completion.text, "finish": completion.finish}
        self._log.add((str(row), 0), self._prompts[row], **answer)

    def finish(self) -> dict[str, int]:
        """Writes the file, all rows answered; returns how often answers ended in which way."""
        self._log.close()
        counts: dict[str, int] = {}
        lines = []
        for row, answer in self._answered():
            counts[answer["finish"]] = counts.get(answer["finish"], 0) + 1
            message = {"role": "assistant", "content": answer["text"]}
            messages = [*row.content["messages"], message]
            content = {**row.content, "messages": messages, "finish": answer["finish"]}
            lines.append(json_line(content))
        try:
            atomic_write_text(self._path, "".join(lines))
            self.partial.unlink()
        except OSError as error:
            raise cannot_write(self._path, error) from None
        return counts

    def _answered(self) -> Iterator[tuple[Row, Json]]:
        for number, row in enumerate(self._rows):
            yield row, self._log.found[str(number), 0]
