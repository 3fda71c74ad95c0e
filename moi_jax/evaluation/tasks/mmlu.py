"""MMLU: questions of 57 subjects with four choices, by generated letter or by likelihood."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import fmean

import numpy as np

from moi_jax.common.errors import UserError
from moi_jax.evaluation.options import BenchmarkOptions
from moi_jax.evaluation.protocol import Item, Json, Response, Score, Task
from moi_jax.evaluation.tasks.data_files import missing
from moi_jax.evaluation.tasks.letters import LETTERS, find_letter
from moi_jax.evaluation.tasks.mmlu_files import Question, check_format, read_questions
from moi_jax.text.conversations import Message

SUBJECTS = 57
MOST_SHOTS = 5
# The sentence of the official chat evaluation of Qwen.
INSTRUCTION = (
    "The following is a multiple-choice question. Please choose the most suitable one among A, B, "
    "C and D as the answer to this question."
)


class MMLU(Task):
    """The prompt is the one of the official chat evaluation of Qwen.

    Shots, up to five, are the first rows of the subject's dev file. Each is a turn that is answered
    by the letter alone. With options.mmlu_method "generate", the model writes free text and
    `find_letter` finds its choice. With "likelihood", the choice is the most likely of the four
    letters right after the assistant's header. The score is the mean over all questions.

    Upstream finds the choice in another way. First it replaces the words of every choice by its
    letter; we do so only where they hold a letter or are stated as the answer. It takes the first
    statement (we take the last), else the first letter that stands alone, else the choice that is
    most similar to the text. So it always finds one, and we may find none.
    """

    name = "mmlu"
    files = (
        "mmlu/test/SUBJECT_test.csv, and for --shots mmlu/dev/SUBJECT_dev.csv, from data.tar of "
        "github.com/hendrycks/test; or the subjects of MMLU-Redux as CSV with a header"
    )
    scoring = "An answer is right if the letter that it chooses is the gold one"
    takes_shots = True
    published_sizes = (14042,)

    def __init__(self, options: BenchmarkOptions):
        super().__init__(options)
        self.shots = options.shots or 0
        self._faulty = 0  # questions that the data marks as faulty
        if self.shots > MOST_SHOTS:
            raise UserError(
                f"mmlu: --shots {self.shots}, but a subject has {MOST_SHOTS} worked examples; use "
                f"0 to {MOST_SHOTS}"
            )

    def load(self) -> list[Item]:
        directory = self.options.data / "mmlu" / "test"
        items = []
        self._faulty = 0
        for path in sorted(directory.glob("*.csv")):
            subject = path.stem.removesuffix("_test")
            examples = self._examples(subject)
            choices = tuple(LETTERS) if self.options.mmlu_method == "likelihood" else ()
            for number, question in enumerate(read_questions(path), 1):
                self._faulty += question.faulty
                if question.faulty and self.options.mmlu_errors == "skip":
                    continue
                messages = (*examples, Message("user", format_question(question)))
                gold = {"letter": question.letter, "choices": list(question.choices)}
                name = f"{subject}/{number}"
                items.append(Item(name, messages, gold, group=subject, choices=choices))
        if not items:
            if self._faulty:
                raise UserError(
                    f"mmlu: all {self._faulty} questions in {directory} have an error_type; "
                    f"use --mmlu-errors keep"
                )
            check_format(directory)
            raise missing(self, directory)
        return items

    def _examples(self, subject: str) -> list[Message]:
        """The worked examples of a subject, as turns."""
        if not self.shots:
            return []
        path = self.options.data / "mmlu" / "dev" / f"{subject}_dev.csv"
        questions = read_questions(path) if path.is_file() else []
        if len(questions) < self.shots:
            raise UserError(
                f"mmlu: --shots {self.shots}, but {path} has {len(questions)} questions; use "
                f"fewer, or download {self.files}"
            )
        turns = []
        for question in questions[: self.shots]:
            turns += [
                Message("user", format_question(question)),
                Message("assistant", question.letter),
            ]
        return turns

    def score(self, responses: Iterable[tuple[Item, Response]]) -> Iterator[Score]:
        for item, response in responses:
            if item.choices:
                letters = [_likeliest(response.log_likelihoods)]
            else:
                letters = [find_letter(text, item.gold["choices"]) for text in response.texts]
            failure = None if any(letters) else "no answer"
            right = fmean(letter == item.gold["letter"] for letter in letters)
            yield Score({"accuracy": right}, failure, {"extracted": letters})

    def weights(self, counts: Mapping[str, int]) -> dict[str, float]:
        return {"accuracy": 1.0}

    def settings(self) -> Json:
        settings = {"shots": self.shots, "method": self.options.mmlu_method}
        return settings | ({"faulty_questions": self.options.mmlu_errors} if self._faulty else {})

    def notes(self, items: Sequence[Item], scores: Sequence[Score]) -> list[str]:
        subjects = len({item.group for item in items})
        notes = [f"{subjects} of {SUBJECTS} subjects"] if subjects < SUBJECTS else []
        if self._faulty:
            skip = self.options.mmlu_errors == "skip"
            done = "are left out" if skip else "count as their file says"
            notes.append(f"MMLU-Redux: {self._faulty} questions with an error_type {done}")
        return notes


def format_question(question: Question) -> str:
    """The user's message for a question; it ends in a newline, as upstream."""
    choices = (
        f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=True)
    )
    return "\n".join([INSTRUCTION, "", question.text, *choices, ""])


def _likeliest(log_likelihoods: Sequence[float]) -> str | None:
    """The most likely letter; None where a likelihood is not finite or missing."""
    finite = len(log_likelihoods) == len(LETTERS) and np.isfinite(log_likelihoods).all()
    return LETTERS[int(np.argmax(log_likelihoods))] if finite else None
