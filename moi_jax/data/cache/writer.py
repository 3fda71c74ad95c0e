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
from moi_jax.common.checksums import digests, write_sums
from moi_jax.common.errors import UserError
from moi_jax.data.cache.records import to_record
from moi_jax.data.sources.rows import SourceRow
from moi_jax.data.sources.tools import unlisted
from moi_jax.data.sources.trajectories import unrecognised
from moi_jax.text import rendering
from moi_jax.text.conversations import BadRow, Conversation, content_hash
from moi_jax.text.instructions import Instruction, Rendering, loss_tokens
from moi_jax.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from moi_jax.data.decontamination import Benchmarks

RECORDS, LENGTHS, HASHES = "instructions.array_record", "lengths.npy", "hashes.npy"
SAMPLES = "samples.npy"  # written only if a conversation of the block has several samples
COUNTS = "counts.json"
BATCH, BATCH_BYTES = 1_000, 2**22  # most rows rendered at once, and about how many bytes of them
EXAMPLES = 5  # rows that the manifest shows for each reason
# Reasons that come from the config, or of rows that are kept: the row itself is not bad.
BY_CONFIG = {
    *("has_system", "too_long", "contaminated", "unfilled", "trained_observations"),
    "unlisted_tool",
}
# Counts of rows that are kept; cut_turns counts the turns that truncated rows have lost.
NOTES = (
    *("own_system", "trimmed_user_turn", "truncated_turns", "cut_turns"),
    *("contaminated", "unfilled", "trained_observations"),
)
# Counts of how rows that are kept were rendered, each left out where it is 0: by the fast renderer
# or by the checkpoint's own template (if it has one); rows that are split, their samples, and
# samples of theirs that are left out as too long; rows that call a tool which they do not list.
RENDERING_NOTES = (
    *("fast_rows", "template_rows", "split_rows", "split_samples", "too_long_samples"),
    "unlisted_tool",
)
# A variable of a template that was not filled in. One letter may be LaTeX: \frac{{a}}{{b}}.
HOLE = re.compile(r"\{\{ ?[A-Za-z_][\w.]+ ?\}\}")


def changes(counts: Mapping[str, Any]) -> str:
    """What rows that are kept have lost or bring along, in words; "" if there is nothing to tell.

    Args:
      counts: with the keys of `NOTES`, and of `RENDERING_NOTES` that are not 0.
    """
    texts = {
        "truncated_turns": f"truncated by {counts['cut_turns']:,} turns",
        "trimmed_user_turn": "without their last user turn",
        "own_system": "with a system text of their own",
        "fast_rows": "by the fast renderer",
        "template_rows": "by the checkpoint's template",
        "split_rows": f"split into {counts.get('split_samples', 0):,} samples",
        "too_long_samples": "samples of theirs too long",
    }
    found = {name: counts.get(name, 0) for name in texts}
    return ", ".join(f"{found[name]:,} {text}" for name, text in texts.items() if found[name])


def records_kept(counts: Mapping[str, Any]) -> int:
    """The number of records of a block, from its counts: the samples of all rows that are kept."""
    return counts.get("samples", counts["kept"])


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
        self.options = Rendering(data.thinking, data.rewritten_history)
        self.records = array_record_module.ArrayRecordWriter(
            str(directory / RECORDS), "group_size:1"
        )
        self.read = self.kept = 0
        self.lengths, self.hashes = array("i"), array("Q")  # rows of 3 and of 2
        self.samples = array("i")
        self.dropped: Counter[str] = Counter()
        self.examples: dict[str, list[dict[str, Any]]] = {}
        self.notes = dict.fromkeys(NOTES, 0)
        self.rendering: Counter[str] = Counter()  # of RENDERING_NOTES
        self.ignored: dict[str, dict[str, Any]] = {}  # by key: rows, and the first with its line

    def add(self, rows: Iterable[SourceRow], max_rows: int | None) -> None:
        """Adds rows until `max_rows` are kept.

        Raises:
          UserError: a row is refused by the config.
        """
        for batch in _batches(rows):
            conversations = [
                row.conversation for row in batch if isinstance(row.conversation, Conversation)
            ]
            rendered = iter(
                rendering.render(
                    conversations, self.tokenizer, self.prompt, self.data.row_system, self.options
                )
            )
            for row in batch:
                if self.kept == max_rows:
                    return
                self.read += 1
                try:
                    if isinstance(row.conversation, BadRow):
                        raise row.conversation
                    samples = next(rendered)
                    if isinstance(samples, BadRow):
                        raise samples
                    kept = self._fit(samples, row.conversation)
                    self._keep(row, len(samples), *kept)
                except BadRow as bad:
                    self._drop(row.line, bad)

    def _fit(
        self, samples: list[Instruction], conversation: Conversation
    ) -> tuple[list[Instruction], Conversation]:
        """The row as the config keeps it; raises BadRow if it keeps nothing.

        Of several samples, those that fit are kept: a shorter one would be like another sample.
        """
        if self.data.row_system == "drop_row" and samples[0].row_system:
            raise BadRow("has_system", "the row has a system turn of its own")
        length = max(len(sample.tokens) for sample in samples)
        if length <= self.limit:
            return samples, conversation
        bad = BadRow("too_long", f"{length} tokens, at most {self.limit}")
        if self.data.too_long == "error":
            raise bad
        if len(samples) > 1:
            fitting = [sample for sample in samples if len(sample.tokens) <= self.limit]
            if not fitting:
                raise bad
            return fitting, conversation
        if self.data.too_long == "drop":
            raise bad
        shorter, exchanges = rendering.first_exchanges(
            conversation,
            samples[0],
            self.tokenizer,
            self.prompt,
            self.data.row_system,
            self.limit,
            self.options,
        )
        if not exchanges:
            raise bad
        return [shorter], conversation.first_exchanges(exchanges)

    def _keep(
        self, row: SourceRow, rendered: int, samples: list[Instruction], conversation: Conversation
    ) -> None:
        """Writes the samples of a row.

        Args:
          rendered: how many there were before some were found too long.
          conversation: what is kept of the row's.
        """
        assert isinstance(row.conversation, Conversation)
        contaminated = self._contaminated(row.line, conversation)
        for sample in samples:
            self.records.write(to_record(sample))
            self.lengths.extend((len(sample.tokens), *loss_tokens(sample)))
        self._hash(conversation, len(samples))
        self.kept += 1
        self._count_rendering(rendered, samples)
        self.notes["own_system"] += bool(samples[0].row_system)
        self.notes["trimmed_user_turn"] += row.trimmed
        self.notes["truncated_turns"] += conversation is not row.conversation
        self.notes["cut_turns"] += len(row.conversation.turns) - len(conversation.turns)
        self.notes["contaminated"] += contaminated
        self.notes["unfilled"] += self._unfilled(row.line, conversation)
        if fault := unrecognised(conversation.messages):
            self._note(row.line, BadRow("trained_observations", fault))
            self.notes["trained_observations"] += 1
        if unknown := unlisted(conversation):
            self._note(row.line, BadRow("unlisted_tool", unknown))
            self.rendering["unlisted_tool"] += 1
        for key, text in row.ignored.items():
            first = {"rows": 0, "line": row.line, "example": text}
            self.ignored.setdefault(key, first)["rows"] += 1

    def _hash(self, conversation: Conversation, samples: int) -> None:
        """Adds the hashes and numbers of the samples of a conversation."""
        turns = whole = content_hash(conversation.turns, conversation.tools)
        # A system text that the domain's prompt replaces is not trained on.
        if conversation.system is not None and not (
            self.data.row_system == "replace" and self.prompt
        ):
            whole = content_hash(conversation.messages, conversation.tools)
        for sample in range(samples):
            self.hashes.extend(((whole + sample) % 2**64, turns))
            self.samples.append(sample)

    def _count_rendering(self, rendered: int, samples: list[Instruction]) -> None:
        """Counts by which path a row was rendered, and what was made of it."""
        if self.tokenizer.template.typed:
            self.rendering["template_rows" if samples[0].conversation else "fast_rows"] += 1
        if rendered > 1:
            self.rendering["split_rows"] += 1
            self.rendering["split_samples"] += len(samples)
            self.rendering["too_long_samples"] += rendered - len(samples)

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
        for text in (text for m in conversation.turns for text in (m.thinking, m.content)):
            if question := self.benchmarks.hit(text):
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
        arrays, records = [LENGTHS, HASHES], len(self.samples)
        if records > self.kept:
            np.save(self.directory / SAMPLES, np.array(self.samples, np.int32))
            arrays.append(SAMPLES)
        counts = {
            "read": self.read,
            "kept": self.kept,
            "lines": lines,
            "dropped": self.dropped,
            **self.notes,
            **{note: count for note, count in self.rendering.items() if count},
            **({"samples": records} if records > self.kept else {}),
            "ignored": self.ignored,
            "examples": sorted(chain(*self.examples.values()), key=lambda row: row["line"]),
            # Shows whether the folder is complete.
            "bytes": {name: (self.directory / name).stat().st_size for name in (RECORDS, *arrays)},
            # For copies elsewhere. Here each record is verified when it is read.
            "sha256": dict(digests(self.directory, [RECORDS])),
        }
        (self.directory / COUNTS).write_text(json.dumps(counts) + "\n", encoding="utf-8")
        write_sums(self.directory, (*arrays, COUNTS))


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
