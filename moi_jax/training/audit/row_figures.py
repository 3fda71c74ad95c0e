"""What the plan says of each row of a run: its tokens, labels and instructions by domain."""

from dataclasses import dataclass

import numpy as np

from moi_jax.data.planning.epoch import EpochPlan
from moi_jax.training.audit.saved_run import PlannedRun


@dataclass(frozen=True)
class RowFigures:
    """The figures of the rows [0, R) of a run.

    Attributes:
      tokens: int64[R].
      domain_tokens, domain_loss_tokens, occurrences: int64[R, domains]; occurrences counts
        instructions.
      loss_token_totals: float64[R, domains], T_d of the epoch of each row.
      epochs: int64[R].
    """

    tokens: np.ndarray
    domain_tokens: np.ndarray
    domain_loss_tokens: np.ndarray
    occurrences: np.ndarray
    loss_token_totals: np.ndarray
    epochs: np.ndarray


def row_figures(data: PlannedRun, rows: int) -> RowFigures:
    """Counts the first `rows` rows of a run from its plan and the lengths in the cache."""
    parts: list[list[np.ndarray]] = []
    first = epoch = 0
    while first < rows:
        plan = data.plan.epoch_plan(epoch)
        kept = min(plan.rows, rows - first)
        totals = np.tile(plan.domain_loss_tokens, (kept, 1))
        counted = [part[:kept] for part in _count(plan)]
        parts.append([*counted, totals, np.full(kept, epoch)])
        first, epoch = first + plan.rows, epoch + 1
    return RowFigures(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _count(plan: EpochPlan) -> list[np.ndarray]:
    """tokens int64[R]; tokens, loss tokens and instructions by domain, int64[R, domains]."""
    corpus, domains = plan.corpus, len(plan.corpus.names)
    row_of = np.repeat(np.arange(plan.rows), np.diff(plan.instruction_starts))
    cell = row_of * domains + corpus.domain_of(plan.instructions)
    by_domain = [
        np.bincount(cell, weights, minlength=plan.rows * domains)
        .astype(np.int64)
        .reshape(plan.rows, domains)
        for weights in (
            corpus.lengths[plan.instructions],
            corpus.loss_lengths[plan.instructions],
            None,
        )
    ]
    return [by_domain[0].sum(axis=1), *by_domain]
