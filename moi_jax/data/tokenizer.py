"""Tokenizers: text to ids and back, by tokenizer.json (tokenizers) or qwen.tiktoken (tiktoken)."""

import base64
import hashlib
import os
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tiktoken
import tokenizers

from moi_jax.errors import UserError

ENDOFTEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

# Qwen v1: the split pattern, and the special tokens, numbered on from the last rank.
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPECIALS = (ENDOFTEXT, IM_START, IM_END, *(f"<|extra_{n}|>" for n in range(205)))

# Saved and exported beside the file that decides the ids, where they are there.
COMPANIONS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
TEXTS_PER_TASK = 64


class Tokenizer(ABC):
    """Text is NFC-normalised, and special tokens in it are plain text: they never parse.

    Attributes:
      files: name -> text of the files that a checkpoint saves; `from_files` reads them back.
      fingerprint: sha256 hex of the file that decides the ids.
      vocab_size: one more than the greatest id, special tokens included.
      im_start, im_end, endoftext: ids of the ChatML and padding tokens.
    """

    files: dict[str, str]
    fingerprint: str
    vocab_size: int
    im_start: int
    im_end: int
    endoftext: int

    @staticmethod
    def from_files(files: Mapping[str, str]) -> "Tokenizer":
        """The tokenizer of the files, as `Tokenizer.files` holds them.

        Raises:
          UserError: the files hold no tokenizer, or one without the ChatML tokens.
        """
        for name, kind in KINDS.items():
            if name in files:
                return kind(name, files)
        raise UserError(f"no tokenizer: looked for {' and '.join(KINDS)}")

    def __init__(self, name: str, files: Mapping[str, str]):
        self.files = dict(files)
        self.fingerprint = hashlib.sha256(files[name].encode()).hexdigest()
        self._open(name, files[name])
        for special in (IM_START, IM_END, ENDOFTEXT):
            number = self._special(special)
            if number is None or number in self.encode(special):
                raise UserError(f"{name} has no special token {special}, which ChatML needs")
            setattr(self, special.strip("<|>"), number)

    def __reduce__(self) -> tuple[Callable[..., "Tokenizer"], tuple[dict[str, str]]]:
        return Tokenizer.from_files, (self.files,)

    @abstractmethod
    def _open(self, name: str, text: str) -> None:
        """Reads the vocabulary from the text of the file `name`; sets `vocab_size`."""

    @abstractmethod
    def _special(self, special: str) -> int | None: ...

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, on all cores."""

    @abstractmethod
    def use_one_thread(self) -> None:
        """Keeps `encode_batch` to one core: for a process beside which others encode."""

    @abstractmethod
    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and the half-open character range of each in the NFC form of `text`.

        A character whose bytes are split among tokens lies in the range of each of them.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of the ids; special tokens show as their text."""

    def encode(self, text: str) -> list[int]:
        """The ids of one text."""
        return self.encode_batch([text])[0]


class JsonTokenizer(Tokenizer):
    """tokenizer.json, read by the tokenizers library."""

    def _open(self, name: str, text: str) -> None:
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing more special
            raise UserError(f"{name} is no tokenizer: {error}") from None
        backend.encode_special_tokens = True
        # The file may carry a truncation, a padding, and a post-processor that trims offsets.
        backend.no_truncation()
        backend.no_padding()
        backend.post_processor = None
        self._backend = backend
        self.vocab_size = max(backend.get_vocab().values(), default=-1) + 1

    def _special(self, special: str) -> int | None:
        return self._backend.token_to_id(special)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        normal = [unicodedata.normalize("NFC", text) for text in texts]
        return [encoding.ids for encoding in self._backend.encode_batch_fast(normal)]

    def use_one_thread(self) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the library looks at each call

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = self._backend.encode(unicodedata.normalize("NFC", text))
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)


class TiktokenTokenizer(Tokenizer):
    """qwen.tiktoken, read by the tiktoken library."""

    def _open(self, name: str, text: str) -> None:
        try:
            lines = [line.split() for line in text.splitlines() if line]
            ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        except ValueError as error:
            raise UserError(f"{name} is no tokenizer of base64 tokens and ranks: {error}") from None
        # tiktoken panics in Rust on these.
        complete = all(bytes([byte]) in ranks for byte in range(256))
        if sorted(ranks.values()) != list(range(len(lines))) or not complete:
            raise UserError(f"{name} is no tokenizer: a rank or one of the 256 bytes is missing")
        self._threads = os.cpu_count() or 1
        self._specials = {s: len(ranks) + n for n, s in enumerate(QWEN_SPECIALS)}
        self._backend = tiktoken.Encoding(
            name,
            pat_str=QWEN_PATTERN,
            mergeable_ranks=ranks,
            special_tokens=self._specials,
        )
        self.vocab_size = self._backend.n_vocab

    def _special(self, special: str) -> int | None:
        return self._specials.get(special)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        normal = [unicodedata.normalize("NFC", text) for text in texts]
        if len(normal) <= TEXTS_PER_TASK or self._threads == 1:
            return self._encode_task(normal)
        # tiktoken's own batch makes a task of each text, which eats what the threads win.
        tasks = [normal[n : n + TEXTS_PER_TASK] for n in range(0, len(normal), TEXTS_PER_TASK)]
        with ThreadPoolExecutor(min(len(tasks), self._threads)) as threads:
            return [ids for task in threads.map(self._encode_task, tasks) for ids in task]

    def use_one_thread(self) -> None:
        self._threads = 1

    def _encode_task(self, texts: list[str]) -> list[list[int]]:
        return [self._backend.encode_ordinary(text) for text in texts]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        text = unicodedata.normalize("NFC", text)
        ids = self._backend.encode_ordinary(text)
        if not ids:
            return [], []
        ends = np.cumsum([len(token) for token in self._backend.decode_tokens_bytes(ids)])
        starts = np.concatenate([[0], ends[:-1]])
        # The character each byte belongs to: all but UTF-8's continuation bytes begin one.
        bytes_ = np.frombuffer(text.encode(), np.uint8)
        character = np.cumsum((bytes_ & 0xC0) != 0x80) - 1
        ranges = zip(character[starts].tolist(), (character[ends - 1] + 1).tolist(), strict=True)
        return ids, list(ranges)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._backend.decode([int(i) for i in ids])


KINDS: dict[str, type[Tokenizer]] = {
    "tokenizer.json": JsonTokenizer,
    "qwen.tiktoken": TiktokenTokenizer,
}


def load_tokenizer(directory: Path) -> Tokenizer:
    """Reads the tokenizer of a directory: its tokenizer.json or its qwen.tiktoken.

    Raises:
      UserError: the directory or the files are missing or hold no tokenizer with ChatML tokens.
    """
    directory = directory.expanduser()
    wanted = (*KINDS, *COMPANIONS)
    try:
        files = {
            name: (directory / name).read_text(encoding="utf-8")
            for name in wanted
            if (directory / name).is_file()
        }
        return Tokenizer.from_files(files)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the tokenizer in {directory}: {error}") from None
    except UserError as error:
        raise UserError(f"tokenizer directory {directory}: {error}") from None
