"""Faults that end the process: SIGKILL, SIGTERM and SIGINT, once and twice, at every place."""

import signal
from collections.abc import Iterator
from functools import partial

from cases import Case
from verdicts import EXACT, Verdict, judge_stop
from workplace import Trap, Workplace

SIGNALS = {
    "SIGKILL": [signal.SIGKILL],
    "SIGTERM": [signal.SIGTERM],
    "SIGTERM twice": [signal.SIGTERM, signal.SIGTERM],
    "SIGINT": [signal.SIGINT],
    "SIGINT twice": [signal.SIGINT, signal.SIGINT],
}


def places(steps: int) -> dict[str, tuple[str, str, float]]:
    """Each place in the run as (event, pattern, seconds after it), see `Trap`."""
    every = steps // 4
    middle = 2 * every
    saving = f"checkpoints/{middle}.orbax-checkpoint-tmp"
    return {
        "while jax is imported": ("import", "^jax ", 0),
        "before a block of the cache is complete": ("os.rename", r"\.part .*/blocks/", 0),
        "before a domain of the cache is complete": ("open", r"\.part/manifest.json w", 0),
        "before the run is described": ("os.rename", r"run/config\.yaml$", 0),
        "in the evaluation before the first step": ("open", "run/metrics.jsonl a", 0.3),
        "in step 1": ("log", f"^step 0/{steps}  held-out", 0.05),
        "in a step in the middle": ("log", f"^step {middle + every // 2}/{steps}  loss", 0),
        "in an evaluation": ("log", f"^step {middle}/{steps}  loss", 0.02),
        "when a save begins": ("os.mkdir", f"{saving} ", 0),
        "0.1 s into a save": ("os.mkdir", f"{saving} ", 0.1),
        "between the arrays and the commit": ("open", f"{saving}/optimizer.*/_METADATA w", 0),
        "before the checksums are written": ("os.rename", f"{saving} ", 0),
        "before a checkpoint gets its name": ("os.rename", f"checkpoints/{middle}$", 0),
        "after a checkpoint got its name": ("os.rename", f"checkpoints/{middle}$", 0.005),
        "before the deletion of an old checkpoint": ("shutil.rmtree", f"/{every} ", 0),
        "in the deletion of an old checkpoint": ("os.rmdir", "^parameters ", 0),
        "after the last step": ("log", f"^step {steps}/{steps}  loss", 0),
        "while the report is written": ("open", r"report\.html\S* w", 0),
    }  # fmt: skip


def interruptions(steps: int) -> Iterator[Case]:
    for place, (event, pattern, after) in places(steps).items():
        for fault, signals in SIGNALS.items():
            trap = Trap(event, pattern, after, signals)
            yield Case("interruptions", place, fault, partial(_interrupt, trap), EXACT)


def _interrupt(trap: Trap, place: Workplace) -> Verdict:
    place.begin("new")
    statuses = {128 + sent for sent in trap.signals}
    if len(trap.signals) > 1 or signal.SIGKILL in trap.signals:
        statuses |= {-sent for sent in trap.signals}  # it ends at once
    return judge_stop(place, place.train(trap=trap), statuses)
