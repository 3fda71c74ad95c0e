"""Early stopping: ends a run whose held-out evaluations give no new best any more."""

import math
from collections.abc import Mapping
from typing import Any

from moi_jax.common.errors import UserError
from moi_jax.config import Config


class EarlyStopping:
    """Counts held-out evaluations since the last new best (lowest) of checkpoint.best_metric.

    Attributes:
      patience: the count at which the run ends; with None it never ends early.
      best: the lowest finite value of the metric so far; None before the first one.
      without_best: the number of evaluations since `best` was found.
    """

    def __init__(self, config: Config, saved: dict[str, Any]):
        """
        Args:
          saved: what `to_json` returned earlier in the run; {} at its start. It is ignored if
            its metric is another one.
        """
        self.patience = config.train.early_stopping_patience
        self.metric = config.checkpoint.best_metric
        if saved.get("metric") != self.metric:
            saved = {}
        self.best: float | None = saved.get("best")
        self.without_best: int = saved.get("without_best", 0)

    @property
    def ended(self) -> bool:
        """Whether the run ends now."""
        return self.patience is not None and self.without_best >= self.patience

    def count(self, losses: Mapping[str, Any]) -> None:
        """Counts a held-out evaluation; None among its losses is a number that is not finite.

        Raises:
          UserError: the run has a patience, but its metric was never finite so far.
        """
        value = math.nan if losses[self.metric] is None else losses[self.metric]
        finite = math.isfinite(value)
        if self.patience and self.best is None and not finite:
            raise UserError(
                f"train.early_stopping_patience watches {self.metric}, which is {value}; hold out "
                f"rows of that domain (data.held_out) or set another checkpoint.best_metric"
            )
        if finite and (self.best is None or value < self.best):
            self.best, self.without_best = value, 0
        else:
            self.without_best += 1

    def to_json(self) -> dict[str, Any]:
        """Returns the count for a checkpoint, so that a resumed run stops at the same step."""
        return {
            "metric": self.metric,
            "best": self.best,
            "without_best": self.without_best,
        }

    def __str__(self) -> str:
        best = "none is finite" if self.best is None else f"the best is {self.best:.4f}"
        return f"{self.without_best} evaluations without a new best of {self.metric} ({best})"
