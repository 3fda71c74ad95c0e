"""Recomputes the figures of a logged record from the rows that its steps have read."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moi_jax.common.errors import UserError
from moi_jax.config import Config
from moi_jax.training.audit.row_figures import RowFigures

Record = dict[str, Any]


@dataclass(frozen=True)
class Window:
    """The steps (after, step] that a logged record sums.

    Attributes:
      first_row: the first row of these steps.
      skipped: the rows [first, next) of the steps among them whose update was skipped.
    """

    record: Record
    after: int
    first_row: int
    skipped: tuple[tuple[int, int], ...]

    @property
    def step(self) -> int:
        return self.record["step"]

    def rows(self) -> np.ndarray:
        """int64[r]: the rows whose figures are in the record."""
        rows = np.arange(self.first_row, self.record["row"])
        for first, after in self.skipped:
            rows = rows[(rows < first) | (rows >= after)]
        return rows


def check_window(
    window: Window, figures: RowFigures, names: Sequence[str], config: Config, bar: float
) -> None:
    """Compares a record with its rows.

    Args:
      names: of the domains.
      bar: the largest difference of losses that are added up in another order, in nats.

    Raises:
      UserError: the first figure that differs.
    """
    record, batch_rows = window.record, config.train.global_batch_rows
    _equal("row", record["row"], _next_row(window, len(figures.tokens), batch_rows))
    last = window.first_row + (window.step - window.after - 1) * batch_rows
    rows = window.rows()
    if last >= record["row"] or not len(rows):
        raise UserError("the rows before it, or those that were skipped, leave no row for its step")
    _equal("epoch", number(record, "epoch"), int(figures.epochs[last]))
    tokens = int(figures.tokens[rows].sum())
    _equal("fill", number(record, "fill"), tokens / (len(rows) * config.data.sequence_length))
    labels = figures.domain_loss_tokens[rows].sum(axis=0)
    rates = [number(record, key) for key in ("loss_tokens_per_second", "tokens_per_second")]
    if not math.isclose(rates[0] * tokens, rates[1] * labels.sum(), rel_tol=1e-9):
        raise UserError(
            f"loss_tokens_per_second {rates[0]} and tokens_per_second {rates[1]} do not fit the "
            f"rows, which have {labels.sum():,} loss tokens among {tokens:,}"
        )
    losses = _domain_losses(record, names, labels)
    _near("token_loss", record, float(losses @ labels / labels.sum()), bar)
    weights = _domain_weights(figures, rows, config.loss.normalization)
    if weights is not None:
        weighted = weights * labels
        _near("loss", record, float(losses @ weighted / weighted.sum()), bar)
    if not record.get("skipped"):
        number(record, "grad_norm")


def _next_row(window: Window, rows: int, batch_rows: int) -> int:
    """The row after the window; the last batch of a run may not be full."""
    return min(window.first_row + (window.step - window.after) * batch_rows, rows)


def _domain_losses(record: Record, names: Sequence[str], labels: np.ndarray) -> np.ndarray:
    """float64[domains]; 0 for a domain without labels in these rows, whose loss is null."""
    losses = np.zeros(len(names))
    for index, name in enumerate(names):
        loss = record.get(f"domain/{name}/loss")
        if (loss is not None) != bool(labels[index]):
            raise UserError(f"domain/{name}/loss is {loss}, with {labels[index]:,} loss tokens")
        losses[index] = loss or 0
    return losses


def _domain_weights(figures: RowFigures, rows: np.ndarray, normalization: str) -> np.ndarray | None:
    """float64[domains]: the weight of a label up to a factor; None if it is not one a domain."""
    totals = figures.loss_token_totals[rows]
    if normalization == "token":
        return np.ones(totals.shape[1])
    if normalization == "instruction" or (totals != totals[0]).any():
        return None
    return np.divide(1, totals[0], out=np.zeros(totals.shape[1]), where=totals[0] > 0)


def _equal(key: str, recorded: Any, right: float) -> None:
    if recorded != right:
        raise UserError(f"{key} is {recorded}, and the plan gives {right}")


def _near(key: str, record: Record, right: float, bar: float) -> None:
    recorded = number(record, key)
    if abs(recorded - right) > bar:
        raise UserError(f"{key} is {recorded}, and the losses of the domains give {right}")


def number(record: Record, key: str) -> float:
    """A figure of a record; raises UserError where it is missing or not finite."""
    value = record.get(key)
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{key} is {value}, which is no number")
    return value
