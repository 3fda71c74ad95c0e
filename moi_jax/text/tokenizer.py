"""Tokenizers: text to ids and back, from tokenizer.json (tokenizers) or qwen.tiktoken (tiktoken).

tokenizer = load_tokenizer(Path("checkpoint"))
tokenizer.encode("2 + 2?")  # [17, 488, 220, 17, 30]
"""

import base64
import copy
import hashlib
import os
import re
import unicodedata
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import tiktoken
import tokenizers

from moi_jax.common.errors import UserError
from moi_jax.common.home import expand_home
from moi_jax.text.byte_level import QWEN_PATTERN
from moi_jax.text.template_choice import choose_template, with_chat_template
from moi_jax.text.templates import Template
from moi_jax.text.vocabulary_files import from_ranks, from_vocabulary_files

# Qwen v1's tokens, and its special tokens, whose ids follow the last rank.
QWEN_RANKS = 151_643
QWEN_SPECIALS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *(f"<|extra_{n}|>" for n in range(205)),
)

# Saved and exported together with the file that decides the ids, if they exist.
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
    """A tokenizer and its chat template; text is never parsed into special tokens.

    Attributes:
      files: name -> text of the files that a checkpoint saves; `from_files` reads them back.
      fingerprint: sha256 hex of the file that decides the ids.
      vocab_size: one more than the largest id, including special tokens.
    """

    files: dict[str, str]
    fingerprint: str
    vocab_size: int

    @staticmethod
    def from_files(files: Mapping[str, str], template: str | None = None) -> "Tokenizer":
        """The tokenizer of the files (name -> text, as in `Tokenizer.files`).

        Args:
          template: the name or the file of its chat template; None is its own, see
            `choose_template`. Without a template it cannot render conversations, but does all the
            rest.

        Raises:
          UserError: the files hold no tokenizer, or the template that was named does not fit it.
        """
        if template is not None:
            files, template = with_chat_template(files, template)
        if not files.keys() & KINDS.keys() and "vocab.json" in files:
            files = {**files, "tokenizer.json": from_vocabulary_files(files)}
        for name, kind in KINDS.items():
            if name in files:
                return kind(name, files, template)
        raise UserError(
            f"no tokenizer: looked for {' and '.join(KINDS)}, or vocab.json with merges.txt"
        )

    def __init__(self, name: str, files: Mapping[str, str], template: str | None):
        self.files = dict(files)
        self.fingerprint = hashlib.sha256(files[name].encode()).hexdigest()
        self._open(name, files[name])
        self._template_name = template
        self._template = choose_template(self, template) if template else None

    def __reduce__(self) -> tuple[Callable[..., "Tokenizer"], tuple[dict[str, str], str | None]]:
        return Tokenizer.from_files, (self.files, self._template_name)

    def with_template(self, name: str) -> "Tokenizer":
        """The same tokenizer with another chat template.

        Raises:
          UserError: it lacks a special token that the template needs.
        """
        other = copy.copy(self)
        other._template_name, other._template = name, choose_template(self, name)
        return other

    @property
    def template(self) -> Template:
        """The chat template that conversations are rendered in.

        Raises:
          UserError: the tokenizer has none that can be used, see `choose_template`.
        """
        if self._template is None:
            self._template = choose_template(self, self._template_name)
        return self._template

    @abstractmethod
    def _open(self, name: str, text: str) -> None:
        """Reads the vocabulary from the text of the file `name`; sets `vocab_size`."""

    @abstractmethod
    def special(self, token: str) -> int | None:
        """The id of a special token; None if there is none of that name."""

    @property
    @abstractmethod
    def special_tokens(self) -> dict[str, int]:
        """The special tokens: text -> id."""

    @abstractmethod
    def encode_rendered(
        self, texts: Sequence[str], spans: Sequence[Sequence[tuple[int, int]]]
    ) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """The ids of texts in which tokens such as <|im_end|> are parsed, and where spans are.

        Args:
          texts: in the tokenizer's normal form.
          spans: half-open character ranges of each text.

        Returns:
          For each text its ids, and for each span the half-open range of all tokens with a
          character in it.
        """

    @abstractmethod
    def normalize(self, text: str) -> str:
        """The text as offsets count in it: in NFC if the tokenizer normalises to NFC."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text; uses all cores."""

    @abstractmethod
    def use_one_thread(self) -> None:
        """Limits `encode_batch` to one core, for one of several processes that encode."""

    @abstractmethod
    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids, and the half-open character range of each in the normalised text.

        If the bytes of a character are split among tokens, it is in the range of each of them.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of the ids, including the text of special tokens."""

    def encode(self, text: str) -> list[int]:
        """The ids of one text."""
        return self.encode_batch([text])[0]


class JsonTokenizer(Tokenizer):
    """tokenizer.json, read by the tokenizers library."""

    def _open(self, name: str, text: str) -> None:
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"{name} is not a tokenizer: {error}") from None
        backend.encode_special_tokens = True
        # The file may set truncation, padding, and a post-processor that trims offsets.
        backend.no_truncation()
        backend.no_padding()
        backend.post_processor = None
        self._backend = backend
        # We normalise: the library's offsets count in the text before normalisation.
        self._nfc = isinstance(backend.normalizer, tokenizers.normalizers.NFC)
        self.vocab_size = max(backend.get_vocab().values(), default=-1) + 1

    @cached_property
    def _parsing(self) -> tokenizers.Tokenizer:
        """A copy that parses special tokens in a text."""
        return tokenizers.Tokenizer.from_str(self._backend.to_str())

    @property
    def special_tokens(self) -> dict[str, int]:
        added = self._backend.get_added_tokens_decoder()
        return {token.content: number for number, token in added.items() if token.special}

    def encode_rendered(
        self, texts: Sequence[str], spans: Sequence[Sequence[tuple[int, int]]]
    ) -> list[tuple[list[int], list[tuple[int, int]]]]:
        found = self._parsing.encode_batch(list(texts), add_special_tokens=False)
        return [
            (encoding.ids, [_token_range(encoding, *span) for span in wanted])
            for encoding, wanted in zip(found, spans, strict=True)
        ]

    def special(self, token: str) -> int | None:
        number = self._backend.token_to_id(token)
        return None if number is None or number in self.encode(token) else number

    def normalize(self, text: str) -> str:
        return unicodedata.normalize("NFC", text) if self._nfc else text

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        normal = [self.normalize(text) for text in texts]
        return [encoding.ids for encoding in self._backend.encode_batch_fast(normal)]

    def use_one_thread(self) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the library reads it at every call

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = self._backend.encode(self.normalize(text))
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)


def _token_range(encoding: tokenizers.Encoding, start: int, end: int) -> tuple[int, int]:
    """The tokens with a character in [start, end); a special token may swallow space around it."""
    tokens = [encoding.char_to_token(place) for place in (start, end - 1)]
    while tokens[0] is None:
        start += 1
        tokens[0] = encoding.char_to_token(start)
    while tokens[1] is None:
        end -= 1
        tokens[1] = encoding.char_to_token(end - 1)
    last = tokens[1]
    while (chars := encoding.token_to_chars(last + 1)) and chars[0] < end:
        last += 1  # the bytes of a character may be several tokens
    return tokens[0], last + 1


class TiktokenTokenizer(Tokenizer):
    """qwen.tiktoken, read by the tiktoken library."""

    def _open(self, name: str, text: str) -> None:
        try:
            lines = [line.split() for line in text.splitlines() if line]
            ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        except ValueError as error:
            raise UserError(
                f"{name} is not a tokenizer of base64 tokens and ranks: {error}"
            ) from None
        # tiktoken would panic in Rust.
        complete = all(bytes([byte]) in ranks for byte in range(256))
        if sorted(ranks.values()) != list(range(len(lines))) or not complete:
            raise UserError(f"{name} is not a tokenizer: a rank or one of the 256 bytes is missing")
        self._threads = os.cpu_count() or 1
        self._ranks = ranks
        self._specials = {s: len(ranks) + n for n, s in enumerate(QWEN_SPECIALS)}
        self._backend = tiktoken.Encoding(
            name,
            pat_str=QWEN_PATTERN,
            mergeable_ranks=ranks,
            special_tokens=self._specials,
        )
        self.vocab_size = self._backend.n_vocab

    def to_json(self) -> str:
        """The text of a tokenizer.json that gives the same ids."""
        return from_ranks(self._ranks, self._specials)

    @property
    def special_tokens(self) -> dict[str, int]:
        return dict(self._specials)

    def encode_rendered(
        self, texts: Sequence[str], spans: Sequence[Sequence[tuple[int, int]]]
    ) -> list[tuple[list[int], list[tuple[int, int]]]]:
        return [self._encode_one(text, wanted) for text, wanted in zip(texts, spans, strict=True)]

    def _encode_one(
        self, text: str, spans: Sequence[tuple[int, int]]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        ids: list[int] = []
        ranges: list[tuple[int, int]] = []
        at = 0
        for piece in re.split(f"({'|'.join(map(re.escape, self._specials))})", text):
            if piece in self._specials:
                found, inside = [self._specials[piece]], [(0, len(piece))]
            else:
                found, inside = self.encode_with_offsets(piece)
            ids += found
            ranges += [(at + start, at + end) for start, end in inside]
            at += len(piece)
        starts, ends = ([pair[side] for pair in ranges] for side in (0, 1))
        return ids, [(bisect_right(ends, start), bisect_left(starts, end)) for start, end in spans]

    def special(self, token: str) -> int | None:
        return self._specials.get(token)

    def normalize(self, text: str) -> str:
        return unicodedata.normalize("NFC", text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        normal = [self.normalize(text) for text in texts]
        if len(normal) <= TEXTS_PER_TASK or self._threads == 1:
            return self._encode_task(normal)
        # tiktoken's own batch makes a task of each text, which costs more than the threads gain.
        tasks = [normal[n : n + TEXTS_PER_TASK] for n in range(0, len(normal), TEXTS_PER_TASK)]
        with ThreadPoolExecutor(min(len(tasks), self._threads)) as threads:
            return [ids for task in threads.map(self._encode_task, tasks) for ids in task]

    def use_one_thread(self) -> None:
        self._threads = 1

    def _encode_task(self, texts: list[str]) -> list[list[int]]:
        return [self._backend.encode_ordinary(text) for text in texts]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        text = self.normalize(text)
        ids = self._backend.encode_ordinary(text)
        if not ids:
            return [], []
        ends = np.cumsum([len(token) for token in self._backend.decode_tokens_bytes(ids)])
        starts = np.concatenate([[0], ends[:-1]])
        # The character of each byte: every byte begins one, except UTF-8's continuation bytes.
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


def check_whole(tokenizer: Tokenizer, rows: int, where: Path | None) -> None:
    """Checks that a qwen.tiktoken was not cut at the end of a line, which the file itself hides.

    Args:
      rows: of the model's embedding; small ones belong to vocabularies of their own.
      where: what the file is part of, for the message.

    Raises:
      UserError: it has not all tokens, so the ids of its special tokens are wrong.
    """
    if not isinstance(tokenizer, TiktokenTokenizer) or rows < QWEN_RANKS + len(QWEN_SPECIALS):
        return
    found = tokenizer.special("<|endoftext|>")
    if found != QWEN_RANKS:
        raise UserError(
            f"qwen.tiktoken of {where} has {found:,} tokens, not the {QWEN_RANKS:,} of Qwen, so "
            f"its special tokens have wrong ids; copy the whole file again"
        )


def load_tokenizer(directory: Path, template: str | None = None) -> Tokenizer:
    """Reads tokenizer.json, qwen.tiktoken, or vocab.json with merges.txt from a directory.

    Args:
      template: see `Tokenizer.from_files`.

    Raises:
      UserError: the directory or the files are missing or hold no tokenizer, or the tokenizer
        lacks the template's special tokens.
    """
    directory = expand_home(directory)
    wanted = (*KINDS, *COMPANIONS)
    try:
        files = {
            name: (directory / name).read_text(encoding="utf-8")
            for name in wanted
            if (directory / name).is_file()
        }
        return Tokenizer.from_files(files, template)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the tokenizer in {directory}: {error}") from None
    except UserError as error:
        raise UserError(f"tokenizer directory {directory}: {error}") from None
