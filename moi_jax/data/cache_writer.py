"""Writing one domain's cache folder: rows in, records, lengths, hashes and a manifest out."""

import json
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module

from moi_jax import config
from moi_jax.data import chatml, sources
from moi_jax.data.chatml import Instruction
from moi_jax.data.conversations import BadRow, Conversation, content_hash
from moi_jax.data.readers import SourceFile
from moi_jax.data.tokenizer import Tokenizer
from moi_jax.errors import UserError

BATCH = 1_000  # rows rendered at once
EXAMPLES = 5  # dropped rows of each reason that the manifest tells
# Dropped because the config asks for it, not because the row is bad.
BY_CONFIG = {"has_system", "too_long"}


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


def bad_row_error(path: Path, line: int, reason: str, detail: str) -> UserError:
    """What data.on_bad_row: error says of a row."""
    return UserError(
        f"{path}:{line}: {reason}: {detail}; mend the row or set data.on_bad_row: drop"
    )


def empty_file_error(path: Path) -> UserError:
    """What data.on_bad_row: error says of a file without a row."""
    return UserError(f"{path} is empty; leave it out or set data.on_bad_row: drop")


class DomainWriter:
    """Writes one domain's folder, file by file and batch by batch, in near-constant memory."""

    def __init__(
        self, directory: Path, data: config.Data, prompt: str | None, tokenizer: Tokenizer
    ):
        self.directory, self.data = directory, data
        self.prompt, self.tokenizer = prompt, tokenizer
        self.limit = data.max_instruction_tokens or data.sequence_length
        self.records = array_record_module.ArrayRecordWriter(
            str(directory / "instructions.array_record"), "group_size:1"
        )
        self.lengths = [np.zeros((0, 3), np.int32)]
        self.hashes = [np.zeros((0, 2), np.uint64)]
        self.dropped: Counter[str] = Counter()
        self.examples: list[dict[str, Any]] = []
        self.files: list[dict[str, Any]] = []
        self.empty_files: list[str] = []
        self.counts = {"own_system": 0, "trimmed_user_turn": 0, "truncated_turns": 0}

    def add_file(
        self,
        file: SourceFile,
        source: config.Source,
        room: int | None,
        advance: Callable[[int], None],
    ) -> int:
        """Adds a file's rows, at most `room` of them; returns how many.

        `advance` is told the bytes of source read.

        Raises:
          UserError: the file has no known format, or a row is refused by the config.
        """
        name = file.name
        form = sources.detect_format(file) if source.format == "auto" else source.format
        read = kept = 0
        rows = (sources.convert(row, form) for row in file.rows())
        while kept != room and (batch := list(islice(rows, BATCH))):
            batch_read, batch_kept = self._add_batch(
                name, batch, None if room is None else room - kept
            )
            read, kept = read + batch_read, kept + batch_kept
            advance(sum(row.size for row in batch))
        if not read and room != 0:
            if self.data.on_bad_row == "error":
                raise empty_file_error(self.data.root / name)
            self.empty_files.append(name)
        self.files.append({"name": name, "format": form, "read": read, "kept": kept})
        return kept

    def _add_batch(self, name: str, rows: list[sources.Row], room: int | None) -> tuple[int, int]:
        """Adds rows until `room` are kept; returns how many were read and kept."""
        conversations = [r.conversation for r in rows if isinstance(r.conversation, Conversation)]
        instructions = iter(
            chatml.render(conversations, self.tokenizer, self.prompt, self.data.row_system)
        )
        lengths: list[tuple[int, int, int]] = []
        hashes: list[tuple[int, int]] = []
        read = 0
        for row in rows:
            if len(hashes) == room:
                break
            read += 1
            conversation = row.conversation
            try:
                if isinstance(conversation, BadRow):
                    raise conversation
                instruction, conversation = self._fit(next(instructions), conversation)
            except BadRow as bad:
                self._drop(name, row.line, bad)
                continue
            self.records.write(to_record(instruction))
            lengths.append((len(instruction.tokens), *chatml.loss_tokens(instruction)))
            turns = content_hash(conversation.turns)
            # A system text that the domain's prompt replaces is no part of what is trained on.
            replaced = self.data.row_system == "replace" and bool(self.prompt)
            hashes.append((turns if replaced else content_hash(conversation.messages), turns))
            self.counts["own_system"] += bool(instruction.row_system)
            self.counts["trimmed_user_turn"] += row.trimmed
        self.lengths.append(np.array(lengths, np.int32).reshape(-1, 3))
        self.hashes.append(np.array(hashes, np.uint64).reshape(-1, 2))
        return read, len(hashes)

    def _fit(
        self, instruction: Instruction, conversation: Conversation
    ) -> tuple[Instruction, Conversation]:
        """What the config keeps of the row; raises BadRow where that is nothing."""
        if self.data.row_system == "drop_row" and instruction.row_system:
            raise BadRow("has_system", "the row has a system turn of its own")
        length = len(instruction.tokens)
        if length <= self.limit:
            return instruction, conversation
        exchanges = 0
        if self.data.too_long == "truncate_turns":
            instruction, exchanges = chatml.first_exchanges(instruction, self.tokenizer, self.limit)
        if not exchanges:
            raise BadRow("too_long", f"{length} tokens, at most {self.limit}")
        self.counts["truncated_turns"] += 1
        return instruction, conversation.first_exchanges(exchanges)

    def _drop(self, name: str, line: int, bad: BadRow) -> None:
        if bad.reason == "too_long" and self.data.too_long == "error":
            raise UserError(
                f"{self.data.root / name}:{line}: {bad.detail}; raise data.max_instruction_tokens "
                f"or set data.too_long: truncate_turns or drop"
            )
        if bad.reason not in BY_CONFIG and self.data.on_bad_row == "error":
            raise bad_row_error(self.data.root / name, line, bad.reason, bad.detail)
        self.dropped[bad.reason] += 1
        if self.dropped[bad.reason] <= EXAMPLES:
            self.examples.append(
                {"reason": bad.reason, "file": name, "line": line, "detail": bad.detail}
            )

    def close(self) -> dict[str, Any]:
        """Writes what is not written yet; returns the manifest."""
        self.records.close()
        np.save(self.directory / "lengths.npy", np.concatenate(self.lengths))
        np.save(self.directory / "hashes.npy", np.concatenate(self.hashes))
        manifest = {
            "read": sum(file["read"] for file in self.files),
            "kept": sum(file["kept"] for file in self.files),
            "dropped": dict(sorted(self.dropped.items())),
            **self.counts,
            "empty_files": self.empty_files,
            "files": self.files,
            "examples": self.examples,
        }
        text = json.dumps(manifest, indent=2)
        (self.directory / "manifest.json").write_text(text + "\n", encoding="utf-8")
        return manifest
