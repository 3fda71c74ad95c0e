"""Which step on the disks of the hosts is whole, when all of them have told what they have."""

import logging
from collections.abc import Sequence

from moi_jax.checkpoints.local_copies import Json, step_number

log = logging.getLogger(__name__)


def newest_whole(reports: Sequence[Json]) -> str | None:
    """The name of the newest step each part of which is held by a process that needs it.

    Args:
      reports: of each process, the parts that are "needed" there, and those that are "held" of
        each step.
    """
    return next((name for name, lost in _lost_parts(reports).items() if not lost), None)


def _lost_parts(reports: Sequence[Json]) -> dict[str, set[int]]:
    """Name of a step, from the newest on -> the parts that no process holds that needs them."""
    needed = {part for report in reports for part in report["needed"]}
    names = {name for report in reports for name in report["held"]}
    return {
        name: needed.difference(
            *(set(report["needed"]) & set(report["held"].get(name, ())) for report in reports)
        )
        for name in sorted(names, key=step_number, reverse=True)
    }


def tell_not_whole(reports: Sequence[Json], newest: str | None) -> None:
    """Logs which step is newer than the one that is taken, but not whole, and where parts lack.

    The copies of it are removed when the run begins: its history is then another one.
    """
    for name, lost in _lost_parts(reports).items():
        if name == newest:
            return
        lacking = [f"process {n}" for n, report in enumerate(reports) if lost & {*report["needed"]}]
        log.warning(
            "step %d on the hosts' own disks is not used: not all of its parts are on the hosts "
            "that need them (%s); hosts must come back with the numbers that they had",
            step_number(name), ", ".join(lacking),
        )  # fmt: skip
