"""Writing a checkpoint whose parameters are computed from those of others, a matrix at a time."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from moi_jax.checkpoints.hf.model_card import model_card
from moi_jax.checkpoints.items import ModelItems
from moi_jax.checkpoints.parameter_files import Stream
from moi_jax.checkpoints.parameters import save_model
from moi_jax.common.atomic_files import atomic_directory, write_texts
from moi_jax.common.errors import UserError
from moi_jax.models.parameters import parameter_specs

# (dotted path, layer of a stacked parameter or None) -> that matrix, in float32 or wider.
Combine = Callable[[str, int | None], np.ndarray]

log = logging.getLogger(__name__)


def write_combined(out: Path, items: ModelItems, dtype: np.dtype, combine: Combine) -> None:
    """Writes a checkpoint with the parameters that `combine` gives.

    Args:
      dtype: of the parameters but for adapters.

    Raises:
      UserError: `out` exists or cannot be written. Nothing is left behind.
    """
    with atomic_directory(out) as staging:
        save_model(staging, _stream(items, dtype, combine), dtype, items)
        (staging / "README.md").write_text(model_card(items), encoding="utf-8")
        write_texts(staging, items.provenance.get("files", {}))
    log.info(f"wrote {out}")


def _stream(items: ModelItems, dtype: np.dtype, combine: Combine) -> Stream:
    for path, spec in parameter_specs(items.model).items():
        if items.base is None or spec.adapter:
            yield path, _whole(path, spec.shape, spec.dtype(dtype), combine)


def _whole(path: str, shape: tuple[int, ...], dtype: np.dtype, combine: Combine) -> np.ndarray:
    """A parameter in its dtype; only one layer of it is computed at a time."""
    if not path.startswith("layers."):
        return combine(path, None).astype(dtype)
    stacked = np.empty(shape, dtype)
    for layer in range(len(stacked)):
        stacked[layer] = combine(path, layer)
    return stacked


def shares(weights: Sequence[float] | None, count: int) -> list[float]:
    """The weights of `count` checkpoints over their sum; None for equal ones.

    Raises:
      UserError: there are more or fewer weights, or their sum is not above zero.
    """
    weights = weights or [1.0] * count
    if len(weights) != count:
        raise UserError(
            f"--weights has {len(weights)} numbers for {count} checkpoints; give each one"
        )
    if not sum(weights) > 0:
        raise UserError("--weights must have a sum above zero")
    return [weight / sum(weights) for weight in weights]


def check_alike(steps: Sequence[Path], all_items: Sequence[ModelItems]) -> None:
    """Checks that checkpoints are of one model, with one tokenizer and one chat template.

    Raises:
      UserError: they are not; the message names the first that differs, and in what.
    """
    first = all_items[0]
    for step, items in zip(steps, all_items, strict=True):
        for what, differs in _differences(first, items):
            if differs:
                raise UserError(
                    f"{step} has another {what} than {steps[0]}; only checkpoints of one model can "
                    f"be put together"
                )
    for step, times in Counter(steps).items():
        if times > 1:
            log.warning(f"{step} is given {times} times, and counts so often")


def _differences(first: ModelItems, other: ModelItems) -> Iterator[tuple[str, bool]]:
    yield "architecture", first.model.base != other.model.base
    yield "tokenizer", first.tokenizer != other.tokenizer
    names = ("chat_template", "template_hash")
    yield "chat template", any(first.prompts[n] != other.prompts[n] for n in names)
