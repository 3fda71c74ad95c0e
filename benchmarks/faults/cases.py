"""A case: a fault with a name, and the function that plays it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from verdicts import Verdict


@dataclass(frozen=True)
class Case:
    """A fault.

    Attributes:
      group, place, fault: a table of the report, its row and its column.
      play: lays the case out, brings the fault about, and judges.
      demands: the verdict that it must get; None for exact or a named stop.
    """

    group: str
    place: str
    fault: str
    play: Callable[[Any], Verdict]  # of a Workplace, or of a JoinedPlace
    demands: str | None = None

    @property
    def name(self) -> str:
        return f"{self.group} | {self.place} | {self.fault}"
