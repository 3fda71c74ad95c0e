"""Loss spikes: how high the loss of a step may be, for its update to be applied."""

import statistics
from collections import deque
from collections.abc import Iterable

import numpy as np

# The median is that of so many applied steps, at least and at most.
FEWEST, MOST = 8, 64


class LossLimit:
    """A multiple of the median of the latest losses.

    The limit of a step leaves out the loss of the step before it: that one is not known yet, except
    after an evaluation, a checkpoint or a restart. The limit must not depend on these.
    """

    def __init__(self, ratio: float | None, saved: Iterable[tuple[int, float]] = ()):
        """
        Args:
          ratio: train.max_loss_ratio; None sets no limit.
          saved: what `to_json` returned earlier in the run.
        """
        self.ratio = ratio
        self._losses: deque[tuple[int, float]] = deque(saved, MOST + 1)

    def add(self, step: int, loss: float) -> None:
        """Takes the loss of a step whose update was applied."""
        self._losses.append((step, loss))

    def median(self, step: int) -> float | None:
        """The median loss before `step`; None where too few steps were made."""
        known = [loss for number, loss in self._losses if number < step - 1][-MOST:]
        return statistics.median(known) if len(known) >= FEWEST else None

    def before(self, step: int) -> np.float32:
        """The highest loss at which the update of `step` is applied."""
        median = self.median(step)
        if self.ratio is None or median is None:
            return np.float32(np.inf)
        return np.float32(median * self.ratio)

    def to_json(self) -> list[tuple[int, float]]:
        """Returns the losses for a checkpoint, so that a resumed run skips the same steps."""
        return list(self._losses)
