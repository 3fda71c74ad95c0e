"""Exporting a checkpoint in the published layout: safetensors with all files beside them."""

import dataclasses
import logging
import math
from pathlib import Path

import numpy as np

from moi_jax.checkpoints.hf.companion_files import companion_files, where_exact
from moi_jax.checkpoints.hf.model_card import model_card
from moi_jax.checkpoints.hf.safetensors_writer import write_tensors
from moi_jax.checkpoints.hf.weights import export_tensors, published_shapes
from moi_jax.checkpoints.init_from import chosen_base
from moi_jax.checkpoints.items import find_step, read_items
from moi_jax.checkpoints.merged import merged_parameters
from moi_jax.common.atomic_files import atomic_directory, check_new, write_texts
from moi_jax.common.progress import byte_bar
from moi_jax.models.config import in_family

MAX_SHARD_SIZE = 5 * 10**9  # bytes

log = logging.getLogger(__name__)


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    dtype: str | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    as_family: str | None = None,
    verify: bool = True,
    base: Path | None = None,
) -> None:
    """Writes the parameters of a checkpoint in their family's published layout, with all files.

        export_checkpoint(Path("runs/qwen_7b_moi"), Path("exported"))

    Args:
      checkpoint: a step, or a run (its newest step).
      dtype: of the tensors, float32 or bfloat16; None keeps the stored one.
      max_shard_size: bytes of a safetensors file; only a single larger tensor exceeds it.
      as_family: "qwen2" writes a Qwen v1 model with the names of Qwen2.
      verify: compare the files of the parameters with their checksums first.
      base: of a checkpoint of adapters, which are merged, see `moi_jax.load`.

    Raises:
      UserError: `checkpoint` is damaged, its base is missing, or `out` exists or cannot be
        written. Nothing is left behind.
    """
    check_new(out)
    step = find_step(checkpoint)
    items = read_items(step)
    stored = merged_parameters(step, items, verify, chosen_base(step, items, base))
    items = dataclasses.replace(items, model=items.model.base)
    model = in_family(items.model, as_family or items.model.family)
    wanted = np.dtype(dtype or stored.dtype)
    shapes = published_shapes(model)
    total = sum(math.prod(shape) for shape in shapes.values()) * wanted.itemsize
    with atomic_directory(out) as staging, byte_bar("writing", total) as progress:
        staging.mkdir()
        tensors = export_tensors(items.model, stored.get, as_family)
        write_tensors(staging, shapes, wanted, tensors, max_shard_size, progress)
        (staging / "README.md").write_text(model_card(items, step), encoding="utf-8")
        write_texts(staging, companion_files(items, as_family, str(wanted), step))
    log.info(f"wrote {out}: {len(shapes)} tensors, {total / 1e9:.2f} GB, {wanted}")
    if model != items.model:
        log.info(where_exact(items))
    if items.provenance.get("base") and not items.provenance["files"]:
        log.warning(
            f"{items.provenance['base']} came without a licence file; find out its terms first"
        )
