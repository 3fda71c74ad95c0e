"""Attention inside segments. Each backend is a file; it is chosen here and passed to the model."""

import logging
from typing import Protocol

import jax
from jax.sharding import Mesh

from moi_jax.common.errors import UserError
from moi_jax.config import Model
from moi_jax.models.attention.blockwise import BlockwiseAttention
from moi_jax.models.attention.refusals import refusal
from moi_jax.models.attention.xla import xla_attention
from moi_jax.models.config import ModelConfig

log = logging.getLogger(__name__)

# What `auto` takes on each platform, unless the backend refuses.
AUTOMATIC = {"cpu": "blockwise", "tpu": "splash", "gpu": "mosaic_gpu"}


class AttentionFn(Protocol):
    """The signature of every backend: causal attention inside the segment of each token.

    A backend is hashable and equal to itself, since it is part of what a compiled program is
    cached by. It is traced once for all layers, under scan and rematerialisation, and divides the
    scores by sqrt(N) itself. Padding has segment 0 and positions 0; what comes out there is unused.
    A segment is one run of equal ids, whose positions rise along the row; where a context axis
    splits the rows, their tokens lie in the order of `parallel.context.context_order`.

    What the backward pass keeps of the results has the name "context" for rematerialisation
    (`jax.ad_checkpoint.checkpoint_name`). A policy that saves this name does not run a kernel
    again; `xla` computes its scores again all the same.
    """

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        segment_ids: jax.Array,
        positions: jax.Array,
    ) -> jax.Array:
        """Computes the same as the reference, `xla.xla_attention`.

        Args:
          query: [B, S, H, N]; key, value: [B, S, K, N]; segment_ids, positions: int32[B, S].

        Returns:
          [B, S, H, N] in the query's dtype.
        """
        ...


def choose_attention(
    settings: Model,
    model: ModelConfig,
    device: jax.Device,
    mesh: Mesh | None,
    dtype: jax.typing.DTypeLike,
) -> AttentionFn:
    """Returns the backend that `model.attention` names.

    Args:
      settings: the section `model` of a config.
      device: one of the devices on which the model will run; it may be one of a topology.
      mesh: the mesh over which rows, heads and queries are split; None means one device.
      dtype: of the activations.

    Raises:
      UserError: the backend cannot compute this model here. `auto` takes blockwise instead, with a
        warning.
    """
    automatic = settings.attention == "auto"
    name = AUTOMATIC.get(device.platform, "blockwise") if automatic else settings.attention
    reason = refusal(name, model, device, mesh, dtype)
    if reason and automatic:
        log.warning(f"attention is blockwise, in plain XLA operations, not {name}: {reason}")
        name = "blockwise"
    elif reason:
        raise UserError(f"model.attention {name}: {reason}; use auto or blockwise")
    # A kernel's packages are imported where it is used; tokamax is an extra.
    if name == "splash":
        from moi_jax.models.attention.splash import SplashAttention

        return SplashAttention(settings.splash_blocks, mesh)
    if name == "mosaic_gpu":
        from moi_jax.models.attention.mosaic_gpu import MosaicGpuAttention

        return MosaicGpuAttention(mesh)
    if name == "blockwise":
        return BlockwiseAttention(mesh, rows_apart=device.platform == "cpu")
    return xla_attention
