"""Checks steps: replayed from a checkpoint, they give what was logged and saved after it."""

import math
from typing import Any

from moi_jax.checkpoints.checksums import ARRAYS
from moi_jax.checkpoints.parameters import read_state
from moi_jax.common.errors import UserError
from moi_jax.training.audit.compare import compare
from moi_jax.training.audit.finding import Finding, NotDone, passed
from moi_jax.training.audit.records import read_records
from moi_jax.training.audit.saved_run import PlannedRun, SavedRun
from moi_jax.training.audit.stretch import Replayed, Stretch, choose_stretch, replay
from moi_jax.training.audit.windows import Record
from moi_jax.training.versions import differences, versions

# Where versions or devices differ: the largest difference of a parameter, and the root mean square
# of all, over the sum of the learning rates. Adam moves a value by about the learning rate at each
# step, and by rounding alone a value whose gradient is near zero may move the other way.
STATE_BARS = {"float64": (1e-4, 1e-6), "float32": (0.05, 1e-3), "bfloat16": (2.0, 0.05)}
NORM_BAR = 0.01  # of the gradient norm, relative
RATE_BAR = 1e-6  # of the learning rate, relative


def check_replay(run: SavedRun, data: PlannedRun, most: int) -> Finding:
    """Replays steps between two checkpoints: bit for bit, or within bars where versions differ.

    Args:
      most: the most steps to replay.
    """
    stretch = choose_stretch(run, most)
    recorded = {record["step"]: record for record in read_records(run) if "fill" in record}
    logged = [step for step in recorded if stretch.first < step <= stretch.last]
    if not stretch.whole and not logged:
        raise NotDone(
            f"{stretch} have no logged record to compare with; "
            f"--steps {stretch.end.step - stretch.first} replays them all"
        )
    loosened = _why_not_bit_for_bit(run, stretch)
    replayed = replay(run, data, stretch, set(logged))
    if lost := set(logged) - {record["step"] for record in replayed.records}:
        raise UserError(
            f"metrics.jsonl, step {min(lost)} has figures, but replayed from {stretch.origin} all "
            f"steps before it are skipped; the record or the checkpoint has changed since the run "
            f"wrote it: restore them from a copy"
        )
    exact, worst = True, 0.0
    for record in replayed.records:
        before = recorded[record["step"]]
        found = _compare_record(run, stretch, before, record, loose=bool(loosened))
        exact = exact and not found
        losses = [found[key] for key in found if key.endswith("loss")]
        worst = max([worst, *losses])
    figures: dict[str, Any] = {"steps": stretch.count, "from": stretch.first, "worst_loss": worst}
    if stretch.whole:
        compared = _compare_state(run, stretch, replayed, loose=bool(loosened))
        exact = exact and not compared["different"]
        figures |= {"to": stretch.end.step, **compared}
    figures |= {"bit_for_bit": exact, "loosened_by": loosened, "logged": logged}
    return passed(_text(stretch, exact, figures), **figures)


def _text(stretch: Stretch, exact: bool, figures: dict[str, Any]) -> str:
    what = "all figures that were logged there"
    if stretch.whole:
        what = f"the parameters and the optimizer of checkpoint {stretch.end.step}, and {what}"
    if exact:
        return f"{stretch} give {what}, bit for bit"
    text = f"{stretch} give {what} within the bars: losses within {figures['worst_loss']:.1e} nats"
    if stretch.whole:
        text += (
            f", parameters within {figures['worst_value']:.1e} (bar {figures['value_bar']:.1e}, "
            f"root mean square {figures['rms']:.1e}, bar {figures['rms_bar']:.1e})"
        )
    return f"{text}; not bit for bit, because {', '.join(figures['loosened_by'])}"


def _why_not_bit_for_bit(run: SavedRun, stretch: Stretch) -> list[str]:
    """Why the replay may differ in its bits; empty if it may not."""
    recorded = stretch.end.position.get("versions")
    if recorded is None:
        return ["the checkpoint records no versions"]
    reasons = differences(recorded, versions(run.mesh))
    before, now = stretch.end.config.train, run.config.train
    if before.microbatch_rows != now.microbatch_rows:
        reasons.append(f"microbatch_rows {before.microbatch_rows} -> {now.microbatch_rows}")
    if run.mesh.devices.flat[0].platform == "gpu" and not now.deterministic:
        reasons.append("train.deterministic is off on a GPU")
    return reasons


def _compare_record(
    run: SavedRun, stretch: Stretch, recorded: Record, replayed: Record, *, loose: bool
) -> dict[str, float]:
    """How far each figure that differs is off; raises UserError with the first that is wrong."""
    found = {}
    for key, figure in replayed.items():
        before, now = recorded.get(key), None if math.isnan(figure) else figure
        if before == now:
            continue
        bar = run.loss_bar
        if key in ("grad_norm", "learning_rate"):
            bar = abs(figure) * (NORM_BAR if key == "grad_norm" else RATE_BAR)
        if not loose or before is None or now is None or abs(before - now) > bar:
            raise UserError(
                f"metrics.jsonl, step {recorded['step']}: {key} is {before}, and replayed from "
                f"{stretch.origin} it is {now}; the record or the checkpoint has changed since the "
                f"run wrote it: restore them from a copy"
            )
        found[key] = abs(before - now)
    return found


def _compare_state(
    run: SavedRun, stretch: Stretch, replayed: Replayed, *, loose: bool
) -> dict[str, Any]:
    """Compares the replayed state with the checkpoint; raises UserError where it is another one."""
    figures: dict[str, Any] = {"different": []}
    bars = [bar * replayed.learning_rates for bar in STATE_BARS[stretch.compute_dtype]]
    wrong = False
    model = run.experiment.model
    saved = read_state(stretch.end.path, model, *replayed.abstract, run.base)
    for item, now, before in zip(ARRAYS, replayed.state.items(), saved, strict=True):
        found = compare(item, now, before)
        figures["different"] += found.different
        if item == "parameters":
            figures |= {"worst_value": found.worst, "value_bar": bars[0]}
            figures |= {"rms": found.rms, "rms_bar": bars[1]}
            wrong = found.worst > bars[0] or found.rms > bars[1]
        if found.different and (wrong or not loose):
            more = len(found.different) - 1
            raise UserError(
                f"{stretch} do not give checkpoint {stretch.end.step}: {found.first}"
                f"{f' (and {more} more arrays)' if more else ''}; one of the two has changed since "
                f"it was saved: restore it from a copy"
            )
    return figures
