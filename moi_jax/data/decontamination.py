"""Decontamination: whether a text holds a question of a benchmark, by 13 words in a row."""

import csv
import gzip
import hashlib
import io
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

from moi_jax.common.errors import UserError

WORDS = 13  # in a row; Brown et al. 2020, appendix C
SHORTEST = 8  # words of a question that is looked for whole
# Words that so many records of a file share are its template: no evidence of any one question.
COMMON = 5
TELLING = 6  # different words of three letters or more, without which a run says little
RULE = 1  # part of the fingerprint; to be raised when the rule changes
# Keys a question is looked for under, the first of a row wins.
KEYS = ("question", "problem", "prompt", "text", "turns", "instruction", "query", "origin_prompt")
MBPP_TEST = range(11, 511)  # of the task_ids of an MBPP file, whose other rows are to train on
MMLU_CELLS = 6  # question, four choices, the letter of the answer

WORD = re.compile(r"[^\W_]+")
# Bytes of ASCII: letters to lower case, digits as they are, all else a space.
ASCII_WORDS = bytes(ord(c.lower()) if c.isalnum() else 32 for c in map(chr, range(128))).ljust(256)


@dataclass(frozen=True)
class Question:
    """A benchmark's question: `gsm8k/test.jsonl:12` (line, row or key), and its words."""

    where: str
    words: list[bytes]


@dataclass(frozen=True)
class Benchmarks:
    """The questions of a directory of benchmarks. Picklable: worker processes ask it.

    Attributes:
      fingerprint: sha256 hex of the rule and the questions.
      questions: how many were read.
      skipped: files in which no question was found.
    """

    fingerprint: str
    questions: int
    skipped: tuple[str, ...]
    long: "_Phrases"
    short: "_Phrases"

    @classmethod
    def read(cls, directory: Path) -> "Benchmarks":
        """Reads every file below `directory`: .jsonl, .json, .csv, .txt, also gzipped.

        Raises:
          UserError: it is no directory, holds no question, or a file cannot be read.
        """
        if not directory.is_dir():
            raise UserError(f"the benchmarks' directory {directory} does not exist")
        digest = hashlib.sha256(f"{RULE} {WORDS} {SHORTEST} {COMMON} {TELLING}".encode())
        long, short = _Phrases(WORDS), _Phrases(SHORTEST)
        skipped, count = [], 0
        for path in sorted(path for path in directory.rglob("*") if path.is_file()):
            name = path.relative_to(directory).as_posix()
            questions = [Question(where, words_of(text)) for where, text in _read(path, name)]
            if not questions:
                skipped.append(name)
            for question in questions:
                digest.update(question.where.encode() + b"\0" + b" ".join(question.words) + b"\0")
            count += len(questions)
            long.add(_windows(questions), len(questions))
            short.add(_short(questions), len(questions))
        if not count:
            raise UserError(
                f"no question in {directory}; expected .jsonl, .json, .csv or .txt files with a "
                f"key {', '.join(KEYS)}"
            )
        return cls(digest.hexdigest(), count, tuple(skipped), long, short)

    def hit(self, text: str) -> str | None:
        """Where a question stands that shares 13 words in a row with `text`, or is in it whole."""
        words = words_of(text)
        return self.long.find(words) or self.short.find(words)


def words_of(text: str) -> list[bytes]:
    """Runs of letters and digits, in lower case and NFKC; punctuation only parts them."""
    if text.isascii():
        return text.encode().translate(ASCII_WORDS).split()
    return " ".join(WORD.findall(unicodedata.normalize("NFKC", text).lower())).encode().split()


def _windows(questions: Iterable[Question]) -> Iterator[tuple[str, list[bytes]]]:
    """The runs that tell a question from others; all of them where none does."""
    for question in questions:
        starts = range(len(question.words) - WORDS + 1)
        runs = [question.words[start : start + WORDS] for start in starts]
        for run in list(filter(_tells, runs)) or runs:
            yield question.where, run


def _tells(run: list[bytes]) -> bool:
    """Whether a run is more than formula, code of a figure, or a row of numbers."""
    return len({word for word in run if len(word) > 2 and not word.isdigit()}) >= TELLING


def _short(questions: Iterable[Question]) -> Iterator[tuple[str, list[bytes]]]:
    for question in questions:
        if SHORTEST <= len(question.words) < WORDS:
            yield question.where, question.words


class _Phrases:
    """Runs of words, each at least `least` long, found in a text by looking here and there.

    Whatever holds a run of `least` words holds, at one of every `step` words, the `width` words
    that begin there, as step + width - 1 = least. So a text's windows of `width` words are looked
    up at every `step`-th word alone, and the runs around one that is known are compared in full.
    """

    def __init__(self, least: int):
        self.width = (least + 1) // 2
        self.step = least + 1 - self.width
        self.lengths: set[int] = set()
        self.anchors: set[int] = set()
        self.where: dict[bytes, str] = {}

    def add(self, phrases: Iterable[tuple[str, list[bytes]]], records: int) -> None:
        """Adds the phrases of a file of so many records, without those of its template."""
        phrases = list(phrases)
        # A phrase counts once a record.
        seen = Counter(key for key, _ in {(_key(words), where) for where, words in phrases})
        for where, words in phrases:
            times = seen[key := _key(words)]
            if times > COMMON or (times > 2 and 2 * times > records):
                continue
            self.lengths.add(len(words))
            self.where.setdefault(key, where)
            for start in range(self.step):
                self.anchors.add(crc32(b" ".join(words[start : start + self.width])))

    def find(self, words: list[bytes]) -> str | None:
        width, anchors = self.width, self.anchors
        for start in range(0, len(words) - width + 1, self.step):
            known = crc32(b" ".join(words[start : start + width])) in anchors
            if known and (where := self._around(words, start)):
                return where
        return None

    def _around(self, words: list[bytes], anchor: int) -> str | None:
        for start in range(max(0, anchor - self.step + 1), anchor + 1):
            for length in self.lengths:
                where = self.where.get(_key(words[start : start + length]))
                if where and start + length <= len(words):
                    return where
        return None


def _key(words: list[bytes]) -> bytes:
    """Eight bytes for a run of words: a million questions fit in memory, none collide by chance."""
    return hashlib.blake2b(b" ".join(words), digest_size=8).digest()


def _read(path: Path, name: str) -> Iterator[tuple[str, str]]:
    """The questions of a file with their places; none for a file of another kind."""
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if kind not in (".jsonl", ".json", ".csv", ".txt"):
        return
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = content.decode("utf-8-sig")
        found: Iterable[tuple[Any, str | None]]
        if kind == ".csv":
            found = _csv(text)
        elif kind == ".txt":
            found = enumerate(text.split("\n"), 1)
        else:
            found = ((where, _question(row)) for where, row in _json(text, lines=kind == ".jsonl"))
        for where, question in found:
            if question and question.strip():
                yield f"{name}:{where}" if where else name, question
    except (OSError, EOFError, ValueError, csv.Error) as error:
        raise UserError(f"cannot read the benchmark {path}: {error}") from None


def _json(text: str, lines: bool) -> Iterator[tuple[Any, Any]]:
    """Rows with their line, number or key; a file that is one row has none."""
    if lines:
        for line, content in enumerate(text.split("\n"), 1):
            if content.strip():
                yield line, json.loads(content)
        return
    content = json.loads(text)
    if isinstance(content, list):
        yield from enumerate(content, 1)
    elif isinstance(content, dict) and _question(content) is None:
        yield from content.items()
    else:
        yield None, content


def _csv(text: str) -> Iterator[tuple[int, str]]:
    """The rows of a file of MMLU, which has no header, or of one whose header names a key."""
    rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
    if rows and all(len(row) == MMLU_CELLS and row[-1] in set("ABCD") for row in rows):
        yield from ((number, row[0]) for number, row in enumerate(rows, 1))
    elif rows and (keys := [key for key in KEYS if key in rows[0]]):
        column = rows[0].index(keys[0])
        yield from ((number, row[column]) for number, row in enumerate(rows[1:], 2))


def _question(row: Any) -> str | None:
    if not isinstance(row, Mapping):
        return None
    if "test_list" in row and row.get("task_id") not in MBPP_TEST:
        return None
    return next((text for key in KEYS if (text := _text(row.get(key)))), None)


def _text(value: Any) -> str | None:
    """A question as text: itself, its turns, or what the user's messages say."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        users = [
            turn.get("content")
            for turn in value
            if isinstance(turn, Mapping) and turn.get("role") == "user"
        ]
        texts = [text for text in (users or value) if isinstance(text, str)]
        return "\n".join(texts)
    return None
