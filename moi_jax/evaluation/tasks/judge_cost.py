"""A limit on the cost of judge calls that also holds while several calls are in progress."""

import math
import threading


class CostLimitExceeded(Exception):
    """The next call could exceed the limit. The message gives the amounts."""


class CostLimit:
    """Dollars spent on finished calls, and dollars reserved for calls in progress.

    Their sum stays within the limit, as far as the cost of a call is known in advance.
    """

    def __init__(self, price: tuple[float, float] | None, limit: float | None):
        self.price = price or (0.0, 0.0)
        self.limit = math.inf if limit is None else limit
        self._lock = threading.Lock()
        self._spent = self._reserved = 0.0

    def cost(self, prompt: int, judgment: int) -> float:
        """US dollars for these numbers of tokens."""
        return (prompt * self.price[0] + judgment * self.price[1]) / 1e6

    def reserve(self, most: float) -> None:
        """Reserves the largest cost that a call may have, in US dollars.

        Raises:
          CostLimitExceeded: the call could exceed the limit.
        """
        with self._lock:
            # The tolerance allows a limit that equals the cost, whatever the rounding of the sums.
            if self._spent + self._reserved + most > self.limit + 1e-9:
                raise CostLimitExceeded(
                    f"${self._spent:.4g} are spent, and the calls in progress with the next one "
                    f"could exceed --judge-max-cost {self.limit:g}"
                )
            self._reserved += most

    def settle(self, most: float, cost: float) -> None:
        """Replaces the reserved `most` of a finished call by its real cost."""
        with self._lock:
            self._reserved -= most
            self._spent += cost
