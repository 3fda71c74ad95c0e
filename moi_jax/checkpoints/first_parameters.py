"""The parameters that a run begins with, which are those of its model before any training."""

from pathlib import Path

import jax
from jax.sharding import Mesh

from moi_jax.checkpoints.base import tree_fingerprint
from moi_jax.checkpoints.items import read_items
from moi_jax.checkpoints.parameters import read_parameters, read_quantized
from moi_jax.models.config import ModelConfig
from moi_jax.models.decoder import Tree
from moi_jax.models.parameters import add_new_adapters, random_parameters


def first_parameters(
    checkpoint: Path | None,
    config: ModelConfig,
    seed: int,
    dtype: jax.typing.DTypeLike,
    mesh: Mesh,
    verify: bool = True,
) -> tuple[Tree, str | None]:
    """Reads a checkpoint, or makes random parameters; adapters that it lacks are added.

    Args:
      checkpoint: None for random parameters.
      seed: train.seed of the run.
      dtype: of the parameters but for adapters.
      verify: compare the files with their checksums first.

    Returns:
      The parameters, and the fingerprint of the base to which adapters were added, before it was
      quantised.

    Raises:
      UserError: see `read_parameters`.
    """
    if checkpoint is None:
        return random_parameters(config, seed, dtype, mesh), None
    if config.adapter is None or read_items(checkpoint).model.adapter:
        return read_parameters(checkpoint, config, dtype, mesh, verify), None
    if config.adapter.quantization:
        base, fingerprint = read_quantized(checkpoint, config, dtype, mesh, verify)
    else:
        base = read_parameters(checkpoint, config.base, dtype, mesh, verify)
        fingerprint = tree_fingerprint(base)
    return add_new_adapters(config, base, seed, dtype, mesh), fingerprint
