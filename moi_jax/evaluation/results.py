"""From scores to results: means with intervals, groups, counts of failures, overall score."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moi_jax.common.errors import UserError
from moi_jax.evaluation import bootstrap
from moi_jax.evaluation.protocol import Item, Response, Score, Task
from moi_jax.evaluation.tasks import PAPER_TASKS

Json = dict[str, Any]
Scored = tuple[Item, Response, Score]
Interval = Callable[[np.ndarray, np.ndarray], tuple[float, float]]

# The keys of a task that a report reads.
TASK_KEYS = {
    *("score", "interval", "items", "complete", "weights", "metrics", "groups", "failures"),
    *("skipped", "notes", "settings"),
}
# Failures that follow from the way an answer ended.
ENDS = {"length": "cut at its length", "too_long": "too long", "not_finite": "not finite"}


def summarize(task: Task, scored: Sequence[Scored], skipped: int, all_items: bool) -> Json:
    """The results of a task.

    Args:
      skipped: number of items left out because they do not fit the context.
      all_items: whether all items of the data were run.
    """
    metrics, values = metric_values([score for _, _, score in scored])
    counts = dict(zip(metrics, np.sum(~np.isnan(values), axis=0).tolist(), strict=True))
    weights = task.weights(counts)
    items, scores = [item for item, _, _ in scored], [score for _, _, score in scored]
    total = interval = None
    if weights and scored:
        row = 100 * np.array([weights.get(metric, 0.0) for metric in metrics])
        total = bootstrap.score(values, row)
        interval = _interval_of(task)(values, row)
    return {
        "score": total,
        "interval": interval,
        "items": len(scored),
        "complete": bool(
            total is not None and all_items and not skipped and task.is_complete(items)
        ),
        "weights": weights,
        "metrics": _metric_table(metrics, values, _interval_of(task)),
        "groups": _groups(items, metrics, values),
        "outcomes": _outcomes(task, scored),
        "failures": _failures(scored),
        "skipped": skipped,
        "notes": _notes(task, scored, items, scores, skipped),
        "settings": task.settings(),
    }


def metric_values(scores: Sequence[Score]) -> tuple[list[str], np.ndarray]:
    """The names of all metrics, and float64[items, metrics] with nan where an item lacks one."""
    metrics = sorted({metric for score in scores for metric in score.metrics})
    rows = [[score.metrics.get(metric, np.nan) for metric in metrics] for score in scores]
    return metrics, np.array(rows, np.float64).reshape(len(scores), len(metrics))


def _interval_of(task: Task) -> Interval:
    """The interval of a score of the task, a function of values and weights."""
    return bootstrap.interval if task.rated else bootstrap.share_interval


def _metric_table(metrics: Sequence[str], values: np.ndarray, interval: Interval) -> Json:
    table = {}
    for column, metric in enumerate(metrics):
        known = values[~np.isnan(values[:, column]), column, None]
        table[metric] = {
            "mean": bootstrap.score(known, np.ones(1)),
            "items": len(known),
            "interval": interval(known, np.ones(1)),
        }
    return table


def _groups(items: Sequence[Item], metrics: Sequence[str], values: np.ndarray) -> Json:
    """group -> its number of items and the mean of each metric."""
    groups = sorted({item.group for item in items if item.group})
    members = np.array([item.group for item in items])
    table = {}
    for group in groups:
        of_group = values[members == group]
        means = {
            metric: float(np.nanmean(of_group[:, column]))
            for column, metric in enumerate(metrics)
            if not np.all(np.isnan(of_group[:, column]))
        }
        table[group] = {"items": len(of_group), **means}
    return table


def outcome(task: Task, response: Response, score: Score) -> str:
    """How an item ended, in a few words. Each item has one outcome."""
    for finish in ("too_long", "not_finite"):
        if finish in response.finishes:
            return ENDS[finish]
    values = list(score.metrics.values())
    if score.failure:
        return score.failure
    if task.rated or not values:
        return "rated" if values else "not scored"
    return "right" if min(values) == 1 else "partly right" if max(values) > 0 else "wrong"


def _outcomes(task: Task, scored: Sequence[Scored]) -> dict[str, int]:
    """Outcome -> number of items; the numbers add up to all items."""
    kinds = Counter(outcome(task, response, score) for _, response, score in scored)
    return dict(kinds.most_common())


def _failures(scored: Sequence[Scored]) -> dict[str, int]:
    kinds: Counter[str] = Counter()
    for _, response, score in scored:
        ends = {ENDS[finish] for finish in response.finishes if finish in ENDS}
        # If the reason of a missing answer is known, the failure that follows is not counted.
        if score.failure and not ends & {ENDS["too_long"], ENDS["not_finite"]}:
            ends.add(score.failure)
        kinds.update(ends)
    return dict(kinds.most_common())


def _notes(
    task: Task,
    scored: Sequence[Scored],
    items: Sequence[Item],
    scores: Sequence[Score],
    skipped: int,
) -> list[str]:
    notes = task.notes(items, scores)
    if skipped:
        notes.append(f"{skipped} items do not fit the context and are left out")
    broken = [item.id for item, response, _ in scored if "not_finite" in response.finishes]
    if broken:
        notes.append(
            f"the model's logits are not finite for {len(broken)} items, the first {broken[0]}: "
            f"check the weights"
        )
    return notes


def overall(tasks: Json) -> float | None:
    """The plain mean of the seven scores; None unless all seven are complete."""
    if all(tasks.get(name, {}).get("complete") for name in PAPER_TASKS):
        return float(np.mean([tasks[name]["score"] for name in PAPER_TASKS]))
    return None


def describe(summary: Json) -> str:
    """The results of a task in one line."""
    if summary["score"] is None:
        metrics = summary["metrics"].items()
        means = ", ".join(f"{name} {metric['mean']:.3f}" for name, metric in metrics)
        return f"no score; {means or 'nothing was measured'} over {summary['items']} items"
    low, high = summary["interval"]
    line = f"{summary['score']:.1f} ({low:.1f} to {high:.1f}) over {summary['items']} items"
    outcomes = summary.get("outcomes", {})  # results of older versions have none
    more = {kind: count for kind, count in summary["failures"].items() if kind not in outcomes}
    for counts in filter(None, (outcomes, more)):
        line += "; " + ", ".join(f"{count} {kind}" for kind, count in counts.items())
    return line


def read_results(path: Path) -> Json:
    """Raises UserError where the file is missing or damaged."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if results["checkpoint"].keys() and all(
            task.keys() >= TASK_KEYS for task in results["tasks"].values()
        ):
            return results
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; name a directory of results") from None
    except (AttributeError, KeyError, TypeError):
        pass
    raise UserError(
        f"{path} is not the results.json of an evaluation, or it is damaged; evaluate again"
    )
