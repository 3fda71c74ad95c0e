"""Compares evaluations: differences with intervals, differing settings, and example items."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moi_jax.common.errors import UserError
from moi_jax.evaluation import bootstrap
from moi_jax.evaluation.results import read_results
from moi_jax.evaluation.tasks import TASKS

Json = dict[str, Any]
Samples = dict[str, Json]
# A difference, and the two ends of its interval.
Gap = tuple[float, float, float]

# Scores that the authors of Qwen-7B-Chat give in their README, each with its settings: one greedy
# answer of at most 512 tokens, in a context that is never too short for it.
GREEDY: Json = {"samples": 1, "max_new_tokens": 512}
PUBLISHED: dict[str, tuple[float, Json]] = {
    "gsm8k": (50.3, {**GREEDY, "shots": 0}),
    "mmlu": (55.8, {**GREEDY, "shots": 0, "method": "generate"}),
    "humaneval": (37.2, GREEDY),
}
PUBLISHED_BY = {"system_prompt": "You are a helpful assistant.", "chat_template": "chatml"}
PUBLISHED_CONTEXT = 2048
# Properties of the model that must be the same on both sides of a comparison.
SHARED = ("system_prompt", "chat_template", "template_hash", "dtype")
# Settings that do not influence the scores.
UNIMPORTANT = {"judge_url"}
EXAMPLES = 3  # items shown for each direction


@dataclass(frozen=True)
class Evaluation:
    """A directory of results. `samples` is task -> item id -> sample."""

    name: str
    made_by: Json
    tasks: dict[str, Json]
    overall: float | None
    samples: dict[str, Samples]


@dataclass(frozen=True)
class Comparison:
    """One task in all evaluations. The others are compared with the first evaluation.

    Attributes:
      results: one per evaluation; None where it did not run the task.
      gaps: 100 * (score - score of the first), over the items that both have, with its 95 %
        interval.
      warnings: reasons why a difference is not due to the checkpoints alone.
      published: the score of Qwen-7B-Chat, where one of the evaluations has the same protocol.
      examples: items on which the evaluations disagree, each with its sample in every
        evaluation. With a single evaluation, its worst items.
    """

    name: str
    results: list[Json | None]
    gaps: list[Gap | None]
    warnings: list[list[str]]
    published: float | None
    examples: list[list[Json | None]]


def read_evaluations(directories: Sequence[Path]) -> list[Evaluation]:
    """Reads evaluations. Their names are the shortest distinct ends of their paths.

    Raises:
      UserError: a directory has no results.json, or a file is damaged.
    """
    paths = list(dict.fromkeys(directory.resolve() for directory in directories))
    length = 1
    while len({path.parts[-length:] for path in paths}) < len(paths):
        length += 1
    evaluations = []
    for path in paths:
        results = read_results(path / "results.json")
        tasks = results["tasks"]
        samples = {name: _read_samples(path / "samples" / f"{name}.jsonl") for name in tasks}
        name = "/".join(path.parts[-length:])
        evaluations.append(
            Evaluation(name, results["checkpoint"], tasks, results.get("overall"), samples)
        )
    return evaluations


def _read_samples(path: Path) -> Samples:
    """The samples of a task by item id; {} where the file is missing."""
    if not path.is_file():
        return {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        return {sample["id"]: sample for sample in map(json.loads, filter(None, lines))}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); evaluate again to rewrite it") from None


def compare(evaluations: Sequence[Evaluation]) -> list[Comparison]:
    """Compares every task that at least one evaluation ran, in the order of the seven."""
    names = dict.fromkeys(name for one in evaluations for name in one.tasks)
    order = [name for name in TASKS if name in names]
    order += [name for name in names if name not in TASKS]
    return [_compare_task(name, evaluations) for name in order]


def _compare_task(name: str, evaluations: Sequence[Evaluation]) -> Comparison:
    first, *others = evaluations
    before, old = first.tasks.get(name), first.samples.get(name, {})
    gaps: list[Gap | None] = [None]
    warnings: list[list[str]] = [[]]
    for other in others:
        now, new = other.tasks.get(name), other.samples.get(name, {})
        gaps.append(None)
        warnings.append([])
        if before and now:
            gaps[-1] = gap(before, now, old, new)
            warnings[-1] += _other_settings(_settings(first, name), _settings(other, name))
            warnings[-1] += _other_items(old, new)
    return Comparison(
        name,
        [one.tasks.get(name) for one in evaluations],
        gaps,
        warnings,
        next((figure for one in evaluations if (figure := published(name, one))), None),
        _examples([one.samples.get(name, {}) for one in evaluations]),
    )


def gap(before: Json, now: Json, old: Samples, new: Samples) -> Gap | None:
    """The difference of two scores over the items that both have; None where it is unknown."""
    weights = before.get("weights")
    shared = [name for name in old if name in new]
    if not weights or not shared or set(weights) != set(now.get("weights") or ()):
        return None
    a, b = (
        np.array(
            [
                [samples[name]["metrics"].get(metric, np.nan) for metric in weights]
                for name in shared
            ]
        )
        for samples in (old, new)
    )
    found = bootstrap.difference(a, b, 100 * np.array(list(weights.values())))
    return None if np.isnan(found).any() else found


def _settings(evaluation: Evaluation, task: str) -> Json:
    model = {key: evaluation.made_by.get(key) for key in SHARED}
    return {**model, **evaluation.tasks[task]["settings"]}


def _other_settings(before: Json, now: Json) -> list[str]:
    told = []
    for key in dict.fromkeys([*before, *now]):
        old, new = before.get(key), now.get(key)
        if old == new or key in UNIMPORTANT:
            continue
        what = key.replace("_", " ")
        told.append(f"{what} is {_short(new)}, not {_short(old)}")
        if key.startswith("judge"):
            told[-1] += "; ratings by different judges cannot be compared"
    return told


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:79]}…"


def _other_items(old: Samples, new: Samples) -> list[str]:
    if not old or not new:
        return ["there are no samples to compare item by item"]
    shared = [name for name in old if name in new]
    told = []
    if not len(shared) == len(old) == len(new):
        told.append(
            f"the items differ, {len(new)} and {len(old)}; the difference is over the "
            f"{len(shared)} that both have"
        )
    changed = sum(_asked(old[name]) != _asked(new[name]) for name in shared)
    if changed:
        told.append(
            f"question or gold answer differ in {changed} of {len(shared)} items: other data"
        )
    return told


def _asked(sample: Json) -> list[Any]:
    return [sample["messages"][-1], sample.get("follow_ups"), sample["gold"]]


def published(name: str, evaluation: Evaluation) -> float | None:
    """The published score, if every setting that influences the answers is as published."""
    result = evaluation.tasks.get(name)
    if not result or name not in PUBLISHED:
        return None
    figure, protocol = PUBLISHED[name]
    settings = result["settings"]
    same = (
        result.get("complete")
        and all(evaluation.made_by.get(key) == value for key, value in PUBLISHED_BY.items())
        and not settings.get("temperature")
        and settings.get("context", 0) >= PUBLISHED_CONTEXT
        and all(settings.get(key) == value for key, value in protocol.items())
    )
    return figure if same else None


def _examples(samples: Sequence[Samples]) -> list[list[Json | None]]:
    """The items that rose most against the first evaluation, then those that fell most."""
    ran = [of_task for of_task in samples if of_task]
    names = [name for name in ran[0] if all(name in of_task for of_task in ran)] if ran else []
    if not names:
        return []
    values = np.array([[_value(of_task[name]) for of_task in ran] for name in names])
    steps = values - (values[:, :1] if len(ran) > 1 else values.max())
    step = steps[np.arange(len(names)), np.abs(steps).argmax(axis=1)]
    up = [n for n in np.argsort(-step, kind="stable")[:EXAMPLES] if step[n] > 0]
    down = [n for n in np.argsort(step, kind="stable")[:EXAMPLES] if step[n] < 0]
    return [[of_task.get(names[n]) for of_task in samples] for n in [*up, *down]]


def _value(sample: Mapping[str, Any]) -> float:
    """The mean of an item's metrics, by which items are ranked."""
    return float(np.mean(list(sample["metrics"].values()) or [0.0]))
