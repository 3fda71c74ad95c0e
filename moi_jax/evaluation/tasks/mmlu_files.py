"""Reads the questions of MMLU's CSV files, as published and as other releases write them."""

import ast
import io
import tokenize
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moi_jax.common.errors import UserError
from moi_jax.evaluation.tasks.data_files import csv_rows, malformed
from moi_jax.evaluation.tasks.letters import LETTERS

# The columns of a file with a header. Other columns, such as an index, are ignored.
QUESTION, CHOICES, ANSWER, ERROR = "question", "choices", "answer", "error_type"
LETTER_COLUMNS = tuple(LETTERS.lower())
# What the hub's datasets are stored in.
OTHER_FORMATS = (".arrow", ".parquet", ".json", ".jsonl", ".tar", ".zip")


@dataclass(frozen=True)
class Question:
    """A row of a file.

    Attributes:
      letter: the gold answer.
      faulty: MMLU-Redux found an error in the question or its gold answer.
    """

    text: str
    choices: tuple[str, ...]
    letter: str
    faulty: bool = False


def read_questions(path: Path) -> list[Question]:
    """The questions of a CSV file.

    Without a header (data.tar of hendrycks/test) a row is: question, four choices, answer. With a
    header the columns are found by their names: question, answer, and A to D or choices (a list
    as Python or numpy prints it); error_type is MMLU-Redux's. An answer is A to D or 0 to 3.

    Raises:
      UserError: a row has another form.
    """
    questions: list[Question] = []
    header: list[str] | None = None
    for number, (where, row) in enumerate(csv_rows(path)):
        cells = [cell.strip() for cell in row]
        if not number and _is_header(cells):
            header = [cell.lower() for cell in cells]
            _check_header(header, where)
        elif header is None:
            questions.append(_question(cells[0], cells[1:-1], cells[-1], where, "six cells"))
        elif len(cells) != len(header):
            raise malformed(where, f"there must be {len(header)} cells, as in the header")
        else:
            questions.append(_named(dict(zip(header, cells, strict=True)), where))
    return questions


def _is_header(cells: Sequence[str]) -> bool:
    """Whether a first row names columns: its last cell, or two cells, are such names."""
    names = [cell.lower() for cell in cells]
    return names[-1] == ANSWER or {QUESTION, ANSWER} <= set(names)


def _check_header(header: Sequence[str], where: str) -> None:
    if not {QUESTION, ANSWER} <= set(header) or not (
        CHOICES in header or set(LETTER_COLUMNS) <= set(header)
    ):
        raise malformed(
            where,
            f"the header names {', '.join(header)}; there must be question, answer, and either A, "
            f"B, C, D or choices",
        )


def _named(row: Mapping[str, str], where: str) -> Question:
    if CHOICES in row:
        choices = _listed(row[CHOICES])
    else:
        choices = [row[column] for column in LETTER_COLUMNS]
    faulty = row.get(ERROR, "") not in ("", "ok")
    return _question(row[QUESTION], choices, row[ANSWER], where, "a row of the header", faulty)


def _question(
    text: str, choices: Sequence[str], answer: str, where: str, form: str, faulty: bool = False
) -> Question:
    letter = dict(zip("0123", LETTERS, strict=True)).get(answer, answer.upper())
    if len(choices) != len(LETTERS) or not text or letter not in tuple(LETTERS):
        raise malformed(
            where, f"there must be {form}: a question, four choices, and A to D or 0 to 3"
        )
    return Question(text, tuple(choices), letter, faulty)


def _listed(cell: str) -> list[str]:
    """The texts of a list as Python prints it, or numpy, which leaves out the commas."""
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(cell).readline))
        quoted = [token.string for token in tokens if token.type == tokenize.STRING]
        texts = [ast.literal_eval(text) for text in quoted]
    except (tokenize.TokenError, SyntaxError, ValueError):
        return []
    return [text.strip() for text in texts if isinstance(text, str)]


def check_format(directory: Path) -> None:
    """Raises UserError where a directory without CSV files holds the data in another format."""
    others = (path for path in sorted(directory.rglob("*")) if path.suffix in OTHER_FORMATS)
    if other := next(others, None):
        raise UserError(
            f"mmlu: {other} is not a CSV file; write each subject into {directory} as "
            f"SUBJECT_test.csv, for example by to_csv() of the datasets library"
        )
