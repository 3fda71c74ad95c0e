"""GSM8K: grade-school maths word problems. The last number of the answer is compared."""

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from statistics import fmean

from moi_jax.common.errors import UserError
from moi_jax.evaluation.options import BenchmarkOptions
from moi_jax.evaluation.protocol import Item, Json, Response, Score, Task
from moi_jax.evaluation.tasks.data_files import json_rows, malformed, missing
from moi_jax.text.conversations import Message

NUMBER = re.compile(r"-?\d+(\.\d+)?")
TOLERANCE = 1e-4
# The training set has calculator marks in its arithmetic: 3 * 4 = <<3*4=12>>12.
CALCULATOR = re.compile(r"<<[^<>]*>>")

EXAMPLES = (
    (
        "A baker fills 6 trays with 14 rolls each. By noon 57 rolls are sold. How many are left?",
        "The baker has 6 * 14 = 84 rolls in all.\nAfter 57 are sold, 84 - 57 = 27 rolls are left.",
        "27",
    ),
    (
        "Ines reads 12 pages on Monday and twice as many on Tuesday. Her book has 90 pages. She "
        "wants to finish it in the next 3 days and read equally much on each. How many pages a "
        "day is that?",
        "On Tuesday she reads 2 * 12 = 24 pages.\nSo far she has read 12 + 24 = 36 pages, and "
        "90 - 36 = 54 are left.\nIn 3 days that is 54 / 3 = 18 pages a day.",
        "18",
    ),
    (
        "A coat costs $80. In the sale it is 25% off, and Tom pays with a voucher of $15 as well. "
        "How much does Tom pay for the coat, in dollars?",
        "A quarter of $80 is 80 * 0.25 = $20.\nIn the sale the coat costs 80 - 20 = $60.\nWith "
        "the voucher Tom pays 60 - 15 = $45.",
        "45",
    ),
    (
        "A tap fills a tub of 180 litres at 9 litres a minute, but 3 litres a minute leak out. "
        "How many minutes pass until the tub is full?",
        "Each minute the tub gains 9 - 3 = 6 litres.\nIt is full after 180 / 6 = 30 minutes.",
        "30",
    ),
)


class GSM8K(Task):
    """The prompt is the question alone, as in the official chat evaluation of Qwen.

    With shots, one text has the worked examples and then the question. Each begins with
    "Question: ..." and a line that asks for steps; a worked answer ends in "The answer is N". This
    is the form of the official few-shot evaluation. The examples are the first rows of
    gsm8k/train.jsonl if that file exists, else four of our own.
    """

    name = "gsm8k"
    files = (
        "gsm8k/test.jsonl from github.com/openai/grade-school-math, and gsm8k/train.jsonl for its "
        "own worked examples"
    )
    scoring = "An answer is right if its last number equals the gold one within 1e-4"
    takes_shots = True
    published_sizes = (1319,)

    def __init__(self, options: BenchmarkOptions):
        super().__init__(options)
        self.shots = options.shots or 0
        self._train = options.data / "gsm8k" / "train.jsonl"

    def load(self) -> list[Item]:
        path = self.options.data / "gsm8k" / "test.jsonl"
        if not path.is_file():
            raise missing(self, path)
        examples = self._examples()
        items: list[Item] = []
        for where, row in json_rows(path, question=str, answer=str):
            question = row["question"]
            if examples:
                question = "\n\n".join([*examples, _few_shot(question)])
            gold = _gold(row["answer"], where)[1]
            items.append(Item(f"gsm8k/{len(items) + 1}", (Message("user", question),), gold))
        if not items:
            raise missing(self, path)
        return items

    def _examples(self) -> list[str]:
        examples = list(EXAMPLES)
        if self.shots and self._train.is_file():
            rows = islice(json_rows(self._train, question=str, answer=str), self.shots)
            examples = [(row["question"], *_gold(row["answer"], where)) for where, row in rows]
        if len(examples) < self.shots:
            raise UserError(
                f"gsm8k: --shots {self.shots}, but there are {len(examples)} worked examples; use "
                f"fewer, or put more into {self._train}"
            )
        return [
            f"{_few_shot(question)}\n{steps}\nThe answer is {number}"
            for question, steps, number in examples[: self.shots]
        ]

    def score(self, responses: Iterable[tuple[Item, Response]]) -> Iterator[Score]:
        for item, response in responses:
            found = [last_number(text) for text in response.texts]
            right = [
                number is not None and abs(float(number) - float(item.gold)) <= TOLERANCE
                for number in found
            ]
            failure = None if any(found) else "no answer"
            yield Score({"accuracy": fmean(right)}, failure, {"extracted": found})

    def weights(self, counts: Mapping[str, int]) -> dict[str, float]:
        return {"accuracy": 1.0}

    def settings(self) -> Json:
        if not self.shots:
            return {"shots": 0}
        examples = "gsm8k/train.jsonl" if self._train.is_file() else "moi_jax's own"
        return {"shots": self.shots, "examples": examples}


def last_number(text: str) -> str | None:
    """The last number of a text, without its commas; None where there is none."""
    numbers = [match.group() for match in NUMBER.finditer(text.replace(",", ""))]
    return numbers[-1] if numbers else None


def _few_shot(question: str) -> str:
    return f"Question: {question}\nLet's think step by step"


def _gold(answer: str, where: str) -> tuple[str, str]:
    """The steps and the number of a published answer, which ends in "#### N"."""
    steps, mark, number = CALCULATOR.sub("", answer).rpartition("####")
    number = number.strip().replace(",", "")
    if not mark or not NUMBER.fullmatch(number):
        raise malformed(where, "'answer' must end in '#### ' and a number")
    return steps.strip(), number
