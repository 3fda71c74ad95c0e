"""Merging fine-tuned runs of one base into one model: baselines beside Mixture-of-Instructions.

A task vector is what a run has added to its base (Ilharco et al. 2023, arXiv 2212.04089).
"""

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from moi_jax.checkpoints.combined import check_alike, shares, write_combined
from moi_jax.checkpoints.init_from import base_checkpoint
from moi_jax.checkpoints.items import ModelItems, find_step, read_items
from moi_jax.checkpoints.merged import Parameters, merged_parameters
from moi_jax.checkpoints.parameters import stored_parameters
from moi_jax.common.atomic_files import check_new
from moi_jax.common.errors import UserError
from moi_jax.config import Data

Method = Literal["average", "ties", "dare"]
METHODS = ("average", "ties", "dare")


@dataclasses.dataclass(frozen=True)
class MergeOptions:
    """How task vectors are put together.

    Attributes:
      weights: of each run, which are divided by their sum; None for equal ones.
      density: the share of each matrix that `ties` and `dare` keep.
      seed: of what `dare` drops.
    """

    method: Method = "average"
    weights: Sequence[float] | None = None
    density: float = 0.2
    seed: int = 0


def merge_runs(
    runs: Sequence[Path], base: Path, out: Path, options: MergeOptions, verify: bool = True
) -> None:
    """Writes base + merged task vectors as a checkpoint of all parameters at `out`.

        merge_runs([Path("runs/code"), Path("runs/math")], Path("base"), Path("merged"),
                   MergeOptions("ties"))

    One matrix of each run is in memory at a time, and one parameter of the result. Sums are float32
    or wider. The dtype of the result is the widest of base and runs. Prompts are those of the first
    run, with the prompts of the others' domains.

    Args:
      runs: steps, or runs (their newest steps), of full fine-tuning or with adapters.
      base: a checkpoint or published weights from which all of them began.
      verify: compare the files of the parameters with their checksums first.

    Raises:
      UserError: a checkpoint is missing or damaged, a run is of another model or another base, or
        `out` exists or cannot be written. Nothing is left behind.
    """
    check_new(out)
    steps = [find_step(run).absolute() for run in runs]
    place = base_checkpoint(base, Data.model_fields["cache_dir"].default)
    all_items, beside = [read_items(step) for step in steps], read_items(place)
    check_alike(steps, all_items)
    _check_base(steps, all_items, place, beside)
    counts = shares(options.weights, len(steps))
    if options.method == "ties" and min(counts) < 0:
        raise UserError("--weights must not be below zero for ties, whose votes they are")
    start = stored_parameters(place, beside.model, verify)
    tuned = [_open(s, i, verify, place) for s, i in zip(steps, all_items, strict=True)]
    merge = _method(options)

    def combine(path: str, layer: int | None) -> np.ndarray:
        from_base = start.get(path, layer)
        wide = from_base.astype(np.result_type(from_base, np.float32))
        vectors = [_wide(parameters.get(path, layer)) - wide for parameters in tuned]
        return wide + merge(vectors, counts, (path, layer))

    of = {"of": [str(step) for step in steps], "base": str(place), "weights": counts}
    made = {**dataclasses.asdict(options), **of}
    items = _merged_items(all_items, made)
    dtype = np.result_type(start.dtype, *(parameters.dtype for parameters in tuned))
    write_combined(out, items, dtype, combine)


def _wide(values: np.ndarray) -> np.ndarray:
    return values.astype(np.result_type(values, np.float32), copy=False)


def _open(step: Path, items: ModelItems, verify: bool, base: Path) -> Parameters:
    """The parameters of a run; OtherBase is raised where its adapters have another base.

    What a run has added beside a quantised base is s A B, without the error of the codes.
    """
    items = dataclasses.replace(items, model=items.model.unquantized)
    return merged_parameters(step, items, verify, base if items.base else None)


def _check_base(
    steps: Sequence[Path], all_items: Sequence[ModelItems], place: Path, base: ModelItems
) -> None:
    """Raises UserError where a run has another architecture, or began from other weights."""
    for step, items in zip(steps, all_items, strict=True):
        if items.model.base != base.model:
            raise UserError(f"{step} has another architecture than the base {place}")
        theirs, ours = (i.provenance.get("base") for i in (items, base))
        # The base of adapters is known by its fingerprint, whatever its name.
        if items.base is None and theirs != ours:
            raise UserError(
                f"{step} began from {theirs or 'random parameters'}, and the base {place} is "
                f"{ours or 'of random parameters'}; give the base of all runs"
            )


def _merged_items(all_items: Sequence[ModelItems], made: dict) -> ModelItems:
    """The items of the first run as those of a model without adapters."""
    first = all_items[0]
    domains = {k: v for items in reversed(all_items) for k, v in items.prompts["domains"].items()}
    return dataclasses.replace(
        first,
        model=first.model.base,
        base=None,
        prompts={**first.prompts, "domains": domains},
        provenance={**first.provenance, "combined": made},
    )


Vectors = Sequence[np.ndarray]
# (task vectors of a matrix, their weights with the sum 1, where it is) -> what is added to the base
Merge = Callable[[Vectors, Sequence[float], tuple[str, int | None]], np.ndarray]


def _method(options: MergeOptions) -> Merge:
    def kept_at_random(vectors: Vectors, weights: Sequence[float], place: tuple) -> np.ndarray:
        keys = [[options.seed, number, _number(place)] for number in range(len(vectors))]
        kept = [dropped(v, options.density, key) for v, key in zip(vectors, keys, strict=True)]
        return weighted(kept, weights)

    return {
        "average": lambda vectors, weights, _: weighted(vectors, weights),
        "ties": lambda vectors, weights, _: ties(vectors, weights, options.density),
        "dare": kept_at_random,
    }[options.method]


def _number(place: tuple[str, int | None]) -> int:
    return zlib.crc32(repr(place).encode())


def weighted(vectors: Vectors, weights: Sequence[float]) -> np.ndarray:
    """The weighted sum of arrays of one shape."""
    total = np.zeros_like(vectors[0])
    for vector, weight in zip(vectors, weights, strict=True):
        total += vector * weight
    return total


def ties(vectors: Vectors, weights: Sequence[float], density: float) -> np.ndarray:
    """Trim, elect sign, disjoint merge (Yadav et al. 2023, arXiv 2306.01708, algorithm 1).

    The largest values are those of one matrix, not of the whole model, so that no more than a
    matrix is in memory.
    """
    trimmed = [_trimmed(vector, density) for vector in vectors]
    sign = np.sign(weighted(trimmed, weights))
    total, agreeing = np.zeros_like(sign), np.zeros_like(sign)
    for vector, weight in zip(trimmed, weights, strict=True):
        agrees = (np.sign(vector) == sign) & (sign != 0)
        total += np.where(agrees, vector, 0) * weight
        agreeing += np.where(agrees, weight, 0)
    return np.divide(total, agreeing, out=np.zeros_like(total), where=agreeing > 0)


def _trimmed(vector: np.ndarray, density: float) -> np.ndarray:
    """The share `density` of the values that are largest in size; the others are zero."""
    kept = max(1, round(density * vector.size))
    sizes = np.abs(vector)
    least = np.partition(sizes, vector.size - kept, axis=None)[vector.size - kept]
    return np.where(sizes >= least, vector, 0)


def dropped(vector: np.ndarray, density: float, seed: Sequence[int]) -> np.ndarray:
    """Drops values at random and scales the rest by 1 / density (Yu et al. 2024, arXiv 2311.03099).

    The expected value stays the vector itself.

    Args:
      density: the probability of each value to stay.
      seed: of the generator.
    """
    stays = np.random.default_rng(seed).random(vector.shape, np.float32) < density
    return np.where(stays, vector, 0) * (1 / density)
