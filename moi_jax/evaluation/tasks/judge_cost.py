"""What calls of a judge cost, so that a limit holds while several are under way."""

import math
import threading


class CostLimitExceeded(Exception):
    """The next call could cost too much; says how, in a few words."""


class CostLimit:
    """Dollars spent on calls, and held back for those under way.

    Together they are within the limit, as far as a call's cost is known before it is made.
    """

    def __init__(self, price: tuple[float, float] | None, limit: float | None):
        self.price = price or (0.0, 0.0)
        self.limit = math.inf if limit is None else limit
        self._lock = threading.Lock()
        self._spent = self._reserved = 0.0

    def cost(self, prompt: int, judgment: int) -> float:
        """Of so many tokens."""
        return (prompt * self.price[0] + judgment * self.price[1]) / 1e6

    def reserve(self, most: float) -> None:
        """Holds back what a call may cost.

        Raises:
          CostLimitExceeded: that could go above the limit.
        """
        with self._lock:
            # A limit of exactly what it costs is kept, however the sums are rounded.
            if self._spent + self._reserved + most > self.limit + 1e-9:
                raise CostLimitExceeded(
                    f"${self._spent:.4g} are spent, and the calls under way with the next could "
                    f"go above --judge-max-cost {self.limit:g}"
                )
            self._reserved += most

    def settle(self, most: float, cost: float) -> None:
        """Of a call that held back `most`."""
        with self._lock:
            self._reserved -= most
            self._spent += cost
