"""Averaging the parameters of checkpoints: uniformly, weighted, or exponentially over a run."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moi_jax.checkpoints.combined import check_alike, shares, write_combined
from moi_jax.checkpoints.items import ModelItems, all_steps, find_step, read_items
from moi_jax.checkpoints.parameters import stored_parameters
from moi_jax.common.atomic_files import check_new
from moi_jax.common.errors import UserError
from moi_jax.common.home import expand_home
from moi_jax.models.parameters import parameter_specs


def average_checkpoints(
    checkpoints: Sequence[Path],
    out: Path,
    weights: Sequence[float] | None = None,
    ema: float | None = None,
    verify: bool = True,
) -> None:
    """Writes the average of checkpoints of one model as a checkpoint at `out`.

        average_checkpoints([Path("runs/qwen_7b_moi")], Path("averaged"))

    Sums are float32 or wider, and are stored in the dtype of the checkpoints. Prompts are those of
    the last one.

    Args:
      checkpoints: steps, or runs (their newest steps). A single run stands for all of its steps, in
        their order.
      weights: of each, which are divided by their sum; None for equal ones.
      ema: instead of weights, the decay d of an exponential moving average over the checkpoints in
        their order: it begins with the first one, and each next one counts 1 - d.
      verify: compare the files of the parameters with their checksums first.

    Raises:
      UserError: a checkpoint is missing or damaged, they are not of one model or have not one base,
        there is one alone, or `out` exists or cannot be written. Nothing is left behind.
    """
    check_new(out)
    steps = _steps(checkpoints)
    all_items = [read_items(step) for step in steps]
    check_alike(steps, all_items)
    _check_adapters(steps, all_items)
    counts = shares(weights, len(steps)) if ema is None else decayed(ema, len(steps))
    stored = [stored_parameters(s, i.model, verify) for s, i in zip(steps, all_items, strict=True)]

    def average(path: str, layer: int | None) -> np.ndarray:
        total = None
        for share, parameters in zip(counts, stored, strict=True):
            value = parameters.get(path, layer)
            term = value.astype(np.result_type(value, np.float32)) * share
            total = term if total is None else total + term
        assert total is not None
        return total

    items = all_items[-1]
    made = {"method": "average" if ema is None else "ema", "weights": counts}
    provenance = {**items.provenance, "combined": {**made, "of": [str(step) for step in steps]}}
    specs = parameter_specs(items.model)
    held = [path for path in stored[0].arrays if not specs[path].adapter] or list(stored[0].arrays)
    dtype = np.result_type(*(parameters.dtype_of(path) for parameters in stored for path in held))
    write_combined(out, dataclasses.replace(items, provenance=provenance), dtype, average)


def decayed(decay: float, count: int) -> list[float]:
    """How much each of `count` checkpoints counts in their exponential moving average."""
    counts = [(1 - decay) * decay**age for age in reversed(range(count))]
    return [decay ** (count - 1), *counts[1:]]


def _steps(checkpoints: Sequence[Path]) -> list[Path]:
    """The steps to average, in their order."""
    steps = [find_step(checkpoint).absolute() for checkpoint in checkpoints]
    if len(steps) == 1 and steps[0] != expand_home(checkpoints[0]).absolute():
        steps = all_steps(steps[0].parent)[::-1]
    if len(steps) < 2:
        raise UserError(
            f"{steps[0]} is one checkpoint, and there is nothing to average; name several, or a "
            f"run that kept several (checkpoint.keep_last)"
        )
    return steps


def _check_adapters(steps: Sequence[Path], all_items: Sequence[ModelItems]) -> None:
    """Raises UserError unless all checkpoints have the same adapters on the same base, or none."""

    def kind(items: ModelItems) -> tuple:
        return items.model.adapter, items.base and items.base.fingerprint

    for step, items in zip(steps, all_items, strict=True):
        if kind(items) != kind(all_items[0]):
            raise UserError(
                f"{step} has other adapters or another base than {steps[0]}; "
                f"python -m moi_jax.convert merge puts the runs of one base together"
            )
