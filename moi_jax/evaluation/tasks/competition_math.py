"""MATH: competition problems. math-verify compares the boxed answer with the gold one."""

import importlib.util
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from moi_jax.common.errors import UserError
from moi_jax.evaluation.options import BenchmarkOptions
from moi_jax.evaluation.protocol import Item, Json, Response, Score, Task
from moi_jax.evaluation.tasks.data_files import json_rows, malformed, missing
from moi_jax.evaluation.tasks.math_equivalence import Equivalence
from moi_jax.text.conversations import Message

INSTRUCTION = "Reason step by step, and put your final answer within \\boxed{}."
BOXED = re.compile(r"\\f?boxed\s*")
UNBRACED = re.compile(r"[\w.]*")
BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
# "The final answer is $5$." in a text without a box.
FINAL = re.compile(r"\banswer[*_ ]*(?:\bis\b\s*:?|:)([^\n]+)", re.IGNORECASE)
INLINE = re.compile(r"\$([^$]+)\$")


class CompetitionMath(Task):
    """The prompt is the problem and a request for \\boxed{}; there are no worked examples.

    The answer is the content of the last complete \\boxed{}. Without a box, it follows the last
    "answer is" or "answer:" of the text: the first $...$ in that line, else the rest of the
    sentence. It is right if it equals the gold text, or if math-verify says so: 1/2 equals 0.5,
    and x = 5 equals 5. But for math-verify 2516_8 equals 2516 too, and 1,2 equals 2,1.
    """

    name = "math"
    files = (
        "math/test500.jsonl (MATH-500, from huggingface.co/datasets/HuggingFaceH4/MATH-500) or "
        "math/test/SUBJECT/N.json (the whole MATH, from github.com/hendrycks/math)"
    )
    scoring = "An answer is right if math-verify finds its last box equal to the gold answer"
    max_new_tokens = 1024
    published_sizes = (500, 5000)

    def __init__(self, options: BenchmarkOptions):
        super().__init__(options)
        if importlib.util.find_spec("math_verify") is None:
            raise UserError("math needs math-verify: pip install 'moi_jax[eval]'")
        directory = options.data / "math"
        self._lines, self._single = directory / "test500.jsonl", directory / "test"

    def load(self) -> list[Item]:
        if self._lines.is_file():
            items = [
                _item(row, row.get("unique_id") or f"math/{number}", where)
                for number, (where, row) in enumerate(json_rows(self._lines, problem=str), 1)
            ]
        else:
            items = [
                _item(row, str(path.relative_to(self._single.parent)), where)
                for path in sorted(self._single.glob("*/*.json"), key=_by_number)
                for where, row in json_rows(path, problem=str, solution=str)
            ]
        if not items:
            raise missing(self, self._lines)
        return items

    def score(self, responses: Iterable[tuple[Item, Response]]) -> Iterator[Score]:
        with Equivalence() as equivalence:
            for item, response in responses:
                found = [final_answer(text) for text in response.texts]
                equal = [_equal(item.gold["answer"], text, equivalence) for text in found]
                failure = "timeout" if None in equal else None
                if not any(found):
                    failure = "no answer"
                details = {"extracted": found, "level": item.gold["level"]}
                yield Score({"accuracy": fmean(map(bool, equal))}, failure, details)

    def weights(self, counts: Mapping[str, int]) -> dict[str, float]:
        return {"accuracy": 1.0}

    def settings(self) -> Json:
        return {"data": "MATH-500" if self._lines.is_file() else "MATH"}

    def notes(self, items: Sequence[Item], scores: Sequence[Score]) -> list[str]:
        levels: dict[str, list[float]] = {}
        for item, score in zip(items, scores, strict=True):
            levels.setdefault(item.gold["level"], []).append(score.metrics["accuracy"])
        means = (f"{level} {100 * fmean(levels[level]):.1f}" for level in sorted(levels) if level)
        return [f"by level: {line}"] if (line := ", ".join(means)) else []


def final_answer(text: str) -> str | None:
    """The final answer of a solution; None where there is none."""
    if boxed := last_boxed(text):
        return boxed
    if not (told := FINAL.findall(text)):
        return None
    if inline := INLINE.search(told[-1]):
        return inline.group(1).strip()
    sentence = re.split(r"\.(?:\s|$)", told[-1])[0]
    return sentence.strip("*_ ") or None


def last_boxed(text: str) -> str | None:
    """The content of the last \\boxed{...} that is closed and not empty. \\boxed 5 gives 5."""
    for match in reversed(list(BOXED.finditer(text))):
        start = match.end()
        if text.startswith("{", start):
            content = text[start + 1 : _closing(text, start)].strip()
        else:
            unbraced = UNBRACED.match(text, start)
            content = unbraced.group() if unbraced else ""
        if content:
            return content
    return None


def _closing(text: str, start: int) -> int:
    """The index of the brace that closes the one at `start`; `start` where there is none."""
    depth = 0
    for brace in BRACES.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if not depth:
            return brace.start()
    return start


def _equal(gold: str, answer: str | None, equivalence: Equivalence) -> bool | None:
    if not answer:
        return False
    return gold == answer or equivalence.equal(gold, answer)


def _item(row: Json, name: str, where: str) -> Item:
    answer = row.get("answer") or last_boxed(str(row.get("solution", "")))
    if not isinstance(answer, str) or not answer.strip():
        raise malformed(where, "there must be an 'answer', or a 'solution' with a \\boxed{} answer")
    question = Message("user", f"{row['problem']}\n\n{INSTRUCTION}")
    gold = {"answer": answer.strip(), "level": str(row.get("level", ""))}
    subject = str(row.get("subject") or row.get("type") or "")
    return Item(str(name), (question,), gold, group=subject)


def _by_number(path: Path) -> tuple[str, int, str]:
    return path.parent.name, int(path.stem) if path.stem.isdecimal() else 0, path.stem
