"""Compares plans as T-Eval does: matches similar steps, then counts those in the right order.

Method of Chen et al., T-Eval (2023): maximum-weight matching, longest increasing subsequence.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from moi_jax.evaluation.teval.embedder import Similarity

NAME_WEIGHT, ARGS_WEIGHT = 0.75, 0.25
THRESHOLD = 0.8  # steps are matched only above this similarity
FINISH = "FinishAction"
# Equal steps can be matched in several ways of the same weight. The way nearest to the order of
# both plans is taken, so that a plan that equals the gold one always scores 1 (with upstream it may
# not). The value is far smaller than any meaningful difference of weights.
NEARNESS = 1e-9


@dataclass(frozen=True, slots=True)
class Step:
    name: str
    args: str


def compare_plans(
    answer: Sequence[Step], gold: Sequence[Step], similarity: Similarity, *, compat: bool = False
) -> dict[str, float]:
    """Precision, recall and f1 of the answer's steps.

    Args:
      gold: has at least one step other than a last FinishAction.
      compat: as upstream, one step counts as right even where none was matched.
    """
    answer, gold = _without_finish(answer), _without_finish(gold)
    right = 0
    if answer:
        matched = match(_alike(answer, gold, similarity))
        right = longest_increasing([matched[row] for row in sorted(matched)])
        right = max(right, int(compat))
    return {
        "precision": right / max(len(answer), 1),
        "recall": right / len(gold),
        "f1": 2 * right / (len(answer) + len(gold)),
    }


def _without_finish(steps: Sequence[Step]) -> Sequence[Step]:
    return steps[:-1] if steps and steps[-1].name == FINISH else steps


def _alike(answer: Sequence[Step], gold: Sequence[Step], similarity: Similarity) -> np.ndarray:
    """The similarity of steps, float64[answer, gold]."""
    names = similarity([step.name for step in answer], [step.name for step in gold])
    args = similarity([step.args for step in answer], [step.args for step in gold])
    return NAME_WEIGHT * names + ARGS_WEIGHT * args


def match(alike: np.ndarray) -> dict[int, int]:
    """The matching {row: column} of the largest sum; all pairs are above the threshold."""
    edges = alike > THRESHOLD
    rows, columns = np.indices(alike.shape)
    weights = np.where(edges, alike - NEARNESS * (rows - columns) ** 2, 0)
    pairs = zip(*linear_sum_assignment(weights, maximize=True), strict=True)
    return {int(row): int(column) for row, column in pairs if edges[row, column]}


def longest_increasing(numbers: Sequence[int]) -> int:
    """The length of the longest strictly increasing subsequence."""
    smallest_last: list[int] = []  # the smallest last number of subsequences of length 1, 2, ...
    for number in numbers:
        at = bisect_left(smallest_last, number)
        smallest_last[at : at + 1] = [number]
    return len(smallest_last)
