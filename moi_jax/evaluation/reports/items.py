"""Pages with every item of a task: why an answer counts as it does, then what was asked."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moi_jax.evaluation.reports.comparison import Comparison, Evaluation, Samples

Json = dict[str, Any]

LONGEST_LINE = 100  # characters of a value that stands on one line
# What a scored program has in a sample's details.
PROGRAM = {"code", "failure", "error"}


@dataclass(frozen=True)
class Value:
    """A named value. A block has line breaks of its own."""

    name: str
    text: str
    block: bool


@dataclass(frozen=True)
class ScoredProgram:
    """A program that was run: what became of it, the assertion or error, and its text."""

    failure: str
    why: str
    code: str


@dataclass(frozen=True)
class Answer:
    """What one evaluation has of an item.

    Attributes:
      metrics: "accuracy 1, pass@1 0.5", for example.
      found: what was extracted from the answer, and whatever else the task tells.
      programs: of a code task, one for each sample.
      texts: what the model wrote.
    """

    outcome: str
    finishes: str
    metrics: str
    found: list[Value]
    programs: list[ScoredProgram]
    texts: list[str]


@dataclass(frozen=True)
class Filter:
    """The outcomes in one evaluation with their numbers of items, the most frequent first."""

    evaluation: int
    counts: list[tuple[str, int]]

    def number(self, sample: Json | None) -> int:
        """The place of a sample's outcome; -1 where the evaluation has no such item."""
        return [name for name, _ in self.counts].index(outcome(sample)) if sample else -1


@dataclass(frozen=True)
class ItemPage:
    """All items of a task, each with its sample in every evaluation, or None."""

    items: list[list[Json | None]]
    filters: list[Filter]


def item_page(task: Comparison, evaluations: Sequence[Evaluation]) -> ItemPage | None:
    """What the page of a task shows; None where no evaluation has samples of it."""
    samples: list[Samples] = [one.samples.get(task.name, {}) for one in evaluations]
    names = dict.fromkeys(name for of_task in samples for name in of_task)
    if not names:
        return None
    filters = [
        Filter(number, Counter(map(outcome, of_task.values())).most_common())
        for number, of_task in enumerate(samples)
        if of_task
    ]
    return ItemPage([[of_task.get(name) for of_task in samples] for name in names], filters)


def outcome(sample: Json) -> str:
    """The outcome of a sample, which files of older versions do not have."""
    if "outcome" in sample:
        return sample["outcome"]
    values = list(sample["metrics"].values())
    return sample["failure"] or ("right" if values and min(values) >= 1 else "wrong")


def answer(sample: Json) -> Answer:
    """A sample as the page shows it."""
    details = dict(sample["details"])
    runs = details.pop("samples", [details] if "code" in details else [])
    programs = [
        ScoredProgram(run["failure"] or "passed", run["error"], run["code"]) for run in runs
    ]
    rest = {key: value for key, value in details.items() if not (programs and key in PROGRAM)}
    likelihoods = sample.get("log_likelihoods")
    if likelihoods:
        rest["log-likelihoods"] = [round(value, 3) for value in likelihoods]
    metrics = ", ".join(f"{name} {value:g}" for name, value in sample["metrics"].items())
    return Answer(
        outcome(sample),
        ", ".join(dict.fromkeys(sample["finishes"])),
        metrics,
        values(rest),
        programs,
        sample["answers"],
    )


def values(content: Any, name: str = "") -> list[Value]:
    """JSON as named values for people: texts with their line breaks, and no quotes or escapes."""
    if isinstance(content, Mapping):
        return [value for key, part in content.items() for value in values(part, str(key))]
    if isinstance(content, list) and all(not isinstance(part, list | dict) for part in content):
        texts = list(map(_plain, content))
        one_line = ", ".join(texts)
        text = one_line if len(one_line) <= LONGEST_LINE else "\n".join(texts)
    elif isinstance(content, list):
        text = json.dumps(content, indent=1, ensure_ascii=False)
    else:
        text = _plain(content)
    return [Value(name, text, "\n" in text or len(text) > LONGEST_LINE)]


def _plain(content: Any) -> str:
    if content is None or content == "":
        return "none"
    return content if isinstance(content, str) else json.dumps(content)
