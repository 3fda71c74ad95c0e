"""Checks the scorers on right and wrong answers: python benchmarks/scorers.py DATA

DATA is the directory of benchmark files. For GSM8K and MATH it prints the score of the gold answers
(100 %) and of the same answers with another value in the same form (0 %). For MMLU it prints the
numbers of files, questions and gold letters, how many letters are read back from an answer such as
"B. text", and how many choices from an answer that only quotes one.
"""

import argparse
import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from moi_jax.cli.command import run_command
from moi_jax.evaluation.options import BenchmarkOptions
from moi_jax.evaluation.protocol import Item, Response, Task
from moi_jax.evaluation.tasks import make_task
from moi_jax.evaluation.tasks.letters import LETTERS, find_letter
from moi_jax.evaluation.tasks.math_equivalence import Equivalence
from moi_jax.evaluation.tasks.mmlu_files import Question, read_questions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    options = BenchmarkOptions(parser.parse_args().data, Path("."))
    console = Console(width=120)
    table = Table("benchmark", "items", "gold answers", "other values", "seconds")
    gsm8k, maths = make_task("gsm8k", options), make_task("math", options)
    problems = maths.load()
    for task, items, say, gold in (
        (gsm8k, gsm8k.load(), "The answer is {}.".format, lambda item: item.gold),
        (maths, problems, "So \\boxed{{{}}}.".format, lambda item: item.gold["answer"]),
    ):
        start = time.perf_counter()
        right = told(task, items, [say(gold(item)) for item in items])
        wrong = told(task, items, [say(another_value(gold(item))) for item in items])
        seconds = time.perf_counter() - start
        table.add_row(task.name, str(len(items)), right, wrong, f"{seconds:.1f}")
    console.print(table)
    with Equivalence() as equivalence:
        golds = [item.gold["answer"] for item in problems]
        equal = sum(equivalence.equal(gold, gold) is True for gold in golds)
    console.print(f"gold equals gold by math-verify alone: {equal} of {len(golds)}")
    console.print(mmlu(options.data / "mmlu"))


def told(task: Task, items: Sequence[Item], texts: Sequence[str]) -> str:
    """Describes scores: per cent, the right items if they are few, and failures by kind."""
    answered = [
        (item, Response((text,), ("stop",))) for item, text in zip(items, texts, strict=True)
    ]
    scores = list(task.score(answered))
    right = [n for n, score in enumerate(scores) if score.metrics["accuracy"]]
    lines = [f"{100 * len(right) / len(items):.1f} %"]
    if len(right) <= 10:
        lines += [f"{items[n].id}: {texts[n]} for {items[n].gold}" for n in right]
    failures = Counter(score.failure for score in scores if score.failure)
    return "\n".join([*lines, *(f"{count} {kind}" for kind, count in failures.items())])


def another_value(answer: str) -> str:
    """Raises the first number by one; without numbers, changes a letter or adds 1."""
    changed, count = re.subn(r"\d+", lambda number: str(int(number[0]) + 1), answer, count=1)
    if count:
        return changed
    if word := re.search(r"\\text\{\(?(\w)", answer):
        letter = "B" if word[1] != "B" else "C"
        return answer[: word.start(1)] + letter + answer[word.end(1) :]
    return f"{answer} + 1"


def mmlu(directory: Path) -> Table:
    """Counts for each part: files, questions, gold letters, and answers that are read."""
    table = Table("MMLU", "files", "questions", *LETTERS, "said and read", "quoted and read")
    for part in ("dev", "test"):
        files = sorted((directory / part).glob("*.csv"))
        questions = [question for path in files for question in read_questions(path)]
        letters = Counter(question.letter for question in questions)
        read = sum(
            find_letter(f"{question.letter}. {choice}", question.choices) == question.letter
            for question in questions
            for choice in [question.choices[LETTERS.index(question.letter)]]
        )
        counts = [str(letters[letter]) for letter in LETTERS]
        table.add_row(
            part, str(len(files)), str(len(questions)), *counts, f"{read}", quoted(questions)
        )
    return table


def quoted(questions: Sequence[Question]) -> str:
    """How many choices are found that are quoted in full, of questions with four different ones."""
    found: Counter[bool | None] = Counter()
    for question in questions:
        if len({choice.lower().rstrip(".") for choice in question.choices}) < len(LETTERS):
            continue
        for letter, choice in zip(LETTERS, question.choices, strict=True):
            read = find_letter(f"The answer is: {choice}", question.choices)
            found[None if read is None else read == letter] += 1
    return f"{found[True]} of {found.total()}; {found[False]} misread, {found[None]} not found"


if __name__ == "__main__":
    run_command(main)
