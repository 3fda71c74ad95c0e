"""The finding of one check: its verdict, in words and in figures."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from moi_jax.checkpoints.damage import DamagedCheckpoint
from moi_jax.common.errors import UserError

Verdict = Literal["ok", "FAILED", "not done"]
OK: Verdict = "ok"
FAILED: Verdict = "FAILED"
NOT_DONE: Verdict = "not done"


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
      text: what was checked; of a failed check what is wrong, where, and what to do.
      figures: JSON values, for audit.json.
      value: what later checks go on with; None if they cannot.
    """

    verdict: Verdict
    text: str
    figures: dict[str, Any] = field(default_factory=dict)
    value: Any = None


class NotDone(Exception):
    """A check that cannot be made; its message says why, and how it could be."""


def passed(text: str, value: Any = None, **figures: Any) -> Finding:
    """The finding of a check that found nothing wrong."""
    return Finding(OK, text, figures, value)


def failed(text: str, value: Any = None, **figures: Any) -> Finding:
    """The finding of a check that found something wrong and still has figures or a value."""
    return Finding(FAILED, text, figures, value)


def make_check(check: Callable[..., Finding], *needed: Any) -> Finding:
    """Makes a check with the values of earlier ones; it is not done if one of them is missing.

    A UserError of the check is what is wrong.
    """
    if any(value is None for value in needed):
        return Finding(NOT_DONE, "a check above has failed, on whose result it is based")
    try:
        return check(*needed)
    except NotDone as reason:
        return Finding(NOT_DONE, str(reason))
    except UserError as error:
        if isinstance(error, DamagedCheckpoint) and not error.step.exists():
            gone = f"the run has deleted checkpoint {error.step.name} meanwhile; audit again"
            return Finding(NOT_DONE, gone)
        return Finding(FAILED, str(error))
