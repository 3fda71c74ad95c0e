"""Writes a block of the cache: from rows to records, lengths, hashes and counts."""

from __future__ import annotations

import json
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from array_record.python import array_record_module

from moi_jax import config
from moi_jax.common.checksums import write_sums
from moi_jax.common.errors import UserError
from moi_jax.data.sources.rows import SourceRow
from moi_jax.data.sources.trajectories import unrecognised
from moi_jax.text import rendering
from moi_jax.text.conversations import BadRow, Conversation, content_hash
from moi_jax.text.instructions import Instruction, loss_tokens
from moi_jax.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from moi_jax.data.decontamination import Benchmarks

RECORDS, LENGTHS, HASHES = "instructions.array_record", "lengths.npy", "hashes.npy"
COUNTS = "counts.json"
BATCH, BATCH_BYTES = 1_000, 2**22  # most rows rendered at once, and about how many bytes of them
EXAMPLES = 5  # rows that the manifest shows for each reason
# Reasons that come from the config, or of rows that are kept: the row itself is not bad.
BY_CONFIG = {"has_system", "too_long", "contaminated", "unfilled", "trained_observations"}
# Counts of rows that are kept; cut_turns counts the turns that truncated rows have lost.
NOTES = (
    *("own_system", "trimmed_user_turn", "truncated_turns", "cut_turns"),
    *("contaminated", "unfilled", "trained_observations"),
)
# A variable of a template that was not filled in. One letter may be LaTeX: \frac{{a}}{{b}}.
HOLE = re.compile(r"\{\{ ?[A-Za-z_][\w.]+ ?\}\}")


def changes(counts: Mapping[str, Any]) -> str:
    """What rows that are kept have lost or bring along, in words; "" if there is nothing to tell.

    Args:
      counts: with the keys of `NOTES`.
    """
    texts = {
        "truncated_turns": f"truncated by {counts['cut_turns']:,} turns",
        "trimmed_user_turn": "without their last user turn",
        "own_system": "with a system text of their own",
    }
    return ", ".join(f"{counts[name]:,} {text}" for name, text in texts.items() if counts[name])


def to_record(instruction: Instruction) -> bytes:
    """int32 header (tokens, system_length, spans), tokens, spans, then row_system in UTF-8."""
    tokens, spans = instruction.tokens, instruction.spans
    header = np.array([len(tokens), instruction.system_length, len(spans)], np.int32)
    return b"".join(
        [header.tobytes(), tokens.tobytes(), spans.tobytes(), instruction.row_system.encode()]
    )


def from_record(record: bytes) -> Instruction:
    """The instruction that `to_record` wrote."""
    length, system_length, spans = np.frombuffer(record, np.int32, 3).tolist()
    numbers = np.frombuffer(record, np.int32, length + 3 * spans, offset=12)
    text = record[12 + numbers.nbytes :].decode()
    return Instruction(numbers[:length], system_length, numbers[length:].reshape(-1, 3), text)


def bad_row_error(place: str, reason: str, detail: str) -> UserError:
    """The error for a bad row under data.on_bad_row: error."""
    return UserError(f"{place}: {reason}: {detail}; fix the row or set data.on_bad_row: drop")


class BlockWriter:
    """Writes the folder of one block, batch by batch."""

    def __init__(
        self,
        directory: Path,
        data: config.Data,
        prompt: str | None,
        tokenizer: Tokenizer,
        benchmarks: Benchmarks | None,
        place: Callable[[int], str],
    ):
        """`place` gives the place of a line of the block in its file, for error messages."""
        self.directory, self.data, self.prompt = directory, data, prompt
        self.tokenizer, self.benchmarks, self.place = tokenizer, benchmarks, place
        self.limit = data.max_instruction_tokens or data.sequence_length
        self.records = array_record_module.ArrayRecordWriter(
            str(directory / RECORDS), "group_size:1"
        )
        self.read = self.kept = 0
        self.lengths, self.hashes = array("i"), array("Q")  # rows of 3 and of 2
        self.dropped: Counter[str] = Counter()
        self.examples: dict[str, list[dict[str, Any]]] = {}
        self.notes = dict.fromkeys(NOTES, 0)
        self.ignored: dict[str, dict[str, Any]] = {}  # by key: rows, and the first with its line

    def add(self, rows: Iterable[SourceRow], max_rows: int | None) -> None:
        """Adds rows until `max_rows` are kept.

        Raises:
          UserError: a row is refused by the config.
        """
        for batch in _batches(rows):
            instructions = iter(
                rendering.render(
                    [r.conversation for r in batch if isinstance(r.conversation, Conversation)],
                    self.tokenizer,
                    self.prompt,
                    self.data.row_system,
                )
            )
            for row in batch:
                if self.kept == max_rows:
                    return
                self.read += 1
                try:
                    if isinstance(row.conversation, BadRow):
                        raise row.conversation
                    samples = next(instructions)
                    if isinstance(samples, BadRow):
                        raise samples
                    self._keep(row, *self._fit(samples[0], row.conversation))
                except BadRow as bad:
                    self._drop(row.line, bad)

    def _fit(
        self, instruction: Instruction, conversation: Conversation
    ) -> tuple[Instruction, Conversation]:
        """The row as the config keeps it; raises BadRow if it keeps nothing."""
        if self.data.row_system == "drop_row" and instruction.row_system:
            raise BadRow("has_system", "the row has a system turn of its own")
        length = len(instruction.tokens)
        if length <= self.limit:
            return instruction, conversation
        exchanges = 0
        if self.data.too_long == "truncate_turns":
            instruction, exchanges = rendering.first_exchanges(
                instruction, self.tokenizer, self.prompt, self.data.row_system, self.limit
            )
        if not exchanges:
            raise BadRow("too_long", f"{length} tokens, at most {self.limit}")
        return instruction, conversation.first_exchanges(exchanges)

    def _keep(self, row: SourceRow, instruction: Instruction, conversation: Conversation) -> None:
        assert isinstance(row.conversation, Conversation)
        contaminated = self._contaminated(row.line, conversation)
        self.records.write(to_record(instruction))
        self.lengths.extend((len(instruction.tokens), *loss_tokens(instruction)))
        turns = whole = content_hash(conversation.turns)
        # A system text that the domain's prompt replaces is not trained on.
        if conversation.system is not None and not (
            self.data.row_system == "replace" and self.prompt
        ):
            whole = content_hash(conversation.messages)
        self.hashes.extend((whole, turns))
        self.kept += 1
        self.notes["own_system"] += bool(instruction.row_system)
        self.notes["trimmed_user_turn"] += row.trimmed
        self.notes["truncated_turns"] += conversation is not row.conversation
        self.notes["cut_turns"] += len(row.conversation.turns) - len(conversation.turns)
        self.notes["contaminated"] += contaminated
        self.notes["unfilled"] += self._unfilled(row.line, conversation)
        if fault := unrecognised(conversation.messages):
            self._note(row.line, BadRow("trained_observations", fault))
            self.notes["trained_observations"] += 1
        for key, text in row.ignored.items():
            first = {"rows": 0, "line": row.line, "example": text}
            self.ignored.setdefault(key, first)["rows"] += 1

    def _unfilled(self, line: int, conversation: Conversation) -> bool:
        """Whether the row has a template's variable in its text, such as {{name}}."""
        for message in conversation.messages:
            if "{{" in message.content and (hole := HOLE.search(message.content)):
                self._note(line, BadRow("unfilled", f"holds {hole.group()}"))
                return True
        return False

    def _contaminated(self, line: int, conversation: Conversation) -> bool:
        """Whether the row holds a benchmark question; raises BadRow if it is dropped for that."""
        if self.benchmarks is None:
            return False
        for message in conversation.turns:
            if question := self.benchmarks.hit(message.content):
                bad = BadRow("contaminated", f"shares 13 words in a row with {question}")
                if self.data.decontaminate.on_hit == "drop":
                    raise bad
                self._note(line, bad)
                return True
        return False

    def _drop(self, line: int, bad: BadRow) -> None:
        if bad.reason == "too_long" and self.data.too_long == "error":
            raise UserError(
                f"{self.place(line)}: {bad.detail}; raise data.max_instruction_tokens "
                f"or set data.too_long: truncate_turns or drop"
            )
        if bad.reason not in BY_CONFIG and self.data.on_bad_row == "error":
            raise bad_row_error(self.place(line), bad.reason, bad.detail)
        self.dropped[bad.reason] += 1
        self._note(line, bad)

    def _note(self, line: int, bad: BadRow) -> None:
        examples = self.examples.setdefault(bad.reason, [])
        if len(examples) < EXAMPLES:
            examples.append({"reason": bad.reason, "line": line, "detail": bad.detail})

    def close(self, lines: int) -> None:
        """Writes the arrays and counts; `lines` is the number of lines that begin in the block."""
        self.records.close()
        np.save(self.directory / LENGTHS, np.array(self.lengths, np.int32).reshape(-1, 3))
        np.save(self.directory / HASHES, np.array(self.hashes, np.uint64).reshape(-1, 2))
        counts = {
            "read": self.read,
            "kept": self.kept,
            "lines": lines,
            "dropped": self.dropped,
            **self.notes,
            "ignored": self.ignored,
            "examples": sorted(chain(*self.examples.values()), key=lambda row: row["line"]),
            # Shows whether the folder is complete.
            "bytes": {
                name: (self.directory / name).stat().st_size for name in (RECORDS, LENGTHS, HASHES)
            },
        }
        (self.directory / COUNTS).write_text(json.dumps(counts) + "\n", encoding="utf-8")
        write_sums(self.directory, (LENGTHS, HASHES, COUNTS))


def _batches(rows: Iterable[SourceRow]) -> Iterator[list[SourceRow]]:
    batch, size = [], 0
    for row in rows:
        batch.append(row)
        size += row.size
        if len(batch) == BATCH or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
