"""Decontamination: finds texts that share 13 words in a row with a benchmark question.

benchmarks = Benchmarks.read(Path("benchmarks"))
benchmarks.hit(text)  # "gsm8k/test.jsonl:12", or None
"""

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
SHORTEST = 8  # words of the shortest question that is searched for as a whole
# Words that more records than this share are the template of the file, and identify no question.
COMMON = 5
TELLING = 6  # different words of three or more letters that a run needs to identify a question
RULE = 1  # part of the fingerprint; raise it when the rule changes
# Keys that may hold a question; the first one that a row has wins.
KEYS = ("question", "problem", "prompt", "text", "turns", "instruction", "query", "origin_prompt")
MBPP_TEST = range(11, 511)  # task_ids of MBPP's test split; the other rows of the file may be used
MMLU_CELLS = 6  # question, four choices, letter of the answer

WORD = re.compile(r"[^\W_]+")
# For ASCII bytes: letters become lower case, digits stay, everything else becomes a space.
ASCII_WORDS = bytes(ord(c.lower()) if c.isalnum() else 32 for c in map(chr, range(128))).ljust(256)


@dataclass(frozen=True)
class Question:
    """A benchmark's question: `gsm8k/test.jsonl:12` (line, row or key), and its words."""

    where: str
    words: list[bytes]


@dataclass(frozen=True)
class Benchmarks:
    """The questions of a directory of benchmarks. It can be pickled for worker processes.

    Attributes:
      fingerprint: sha256 hex of the rule and the questions.
      questions: number of questions.
      skipped: files that hold no question.
    """

    fingerprint: str
    questions: int
    skipped: tuple[str, ...]
    long: "_Phrases"
    short: "_Phrases"

    @classmethod
    def read(cls, directory: Path) -> "Benchmarks":
        """Reads every .jsonl, .json, .csv and .txt file below `directory`, gzipped or not.

        Raises:
          UserError: the directory does not exist or holds no question, or a file cannot be read.
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
        """The place of a question that shares 13 words in a row with `text`, or None.

        A question of 8 to 12 words is found if the text holds it whole.
        """
        words = words_of(text)
        return self.long.find(words) or self.short.find(words)


def words_of(text: str) -> list[bytes]:
    """The runs of letters and digits, in lower case and NFKC, as UTF-8."""
    if text.isascii():
        return text.encode().translate(ASCII_WORDS).split()
    return " ".join(WORD.findall(unicodedata.normalize("NFKC", text).lower())).encode().split()


def _windows(questions: Iterable[Question]) -> Iterator[tuple[str, list[bytes]]]:
    """The runs of 13 words that identify a question, or all its runs if none does."""
    for question in questions:
        starts = range(len(question.words) - WORDS + 1)
        runs = [question.words[start : start + WORDS] for start in starts]
        for run in list(filter(_tells, runs)) or runs:
            yield question.where, run


def _tells(run: list[bytes]) -> bool:
    """Whether a run is more than a formula, the code of a figure, or a row of numbers."""
    return len({word for word in run if len(word) > 2 and not word.isdigit()}) >= TELLING


def _short(questions: Iterable[Question]) -> Iterator[tuple[str, list[bytes]]]:
    for question in questions:
        if SHORTEST <= len(question.words) < WORDS:
            yield question.where, question.words


class _Phrases:
    """A set of phrases of at least `least` words, and a fast search for them in a text.

    A text that holds a phrase also holds, at one of every `step` words, `width` words in a row of
    it, because step + width - 1 = least. So the search looks up `width` words at every `step`-th
    word only, and compares whole phrases around the places where it finds something.
    """

    def __init__(self, least: int):
        self.width = (least + 1) // 2
        self.step = least + 1 - self.width
        self.lengths: set[int] = set()
        self.anchors: set[int] = set()
        self.where: dict[bytes, str] = {}

    def add(self, phrases: Iterable[tuple[str, list[bytes]]], records: int) -> None:
        """Adds the phrases of a file with this number of records, except those of its template."""
        phrases = list(phrases)
        # A phrase counts once for each record.
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
    """Eight bytes for a run of words: a million questions fit in memory without collisions."""
    return hashlib.blake2b(b" ".join(words), digest_size=8).digest()


def _read(path: Path, name: str) -> Iterator[tuple[str, str]]:
    """(place, question) for each question of a file; nothing for a file of another kind."""
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
    """(line, number or key, row) of each row; (None, row) if the file is one row."""
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
    """(row number, question) of an MMLU file, which has no header, or of a file with a header."""
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
    """A question as text: a string, a list of turns, or the user's messages of a chat."""
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
