"""Attention inside segments, one file a backend: chosen here once, and handed to the model."""

from typing import Protocol

import jax
from jax.sharding import Mesh

from moi_jax.common.errors import UserError
from moi_jax.models.attention.xla import xla_attention


class Attention(Protocol):
    """What every backend computes: causal attention that never leaves a token's segment."""

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        segment_ids: jax.Array,
        order: jax.Array,
    ) -> jax.Array:
        """See `xla.xla_attention`, the reference."""
        ...


def choose_attention(name: str, platform: str, mesh: Mesh | None) -> Attention:
    """The implementation that model.attention names, for a platform and a mesh.

    Args:
      name: auto, or a backend.
      platform: cpu, gpu or tpu.
      mesh: the mesh that rows and heads are split over; None is one device.

    Raises:
      UserError: there is no such backend.
    """
    del platform, mesh  # one backend serves them all, so far
    if name in ("auto", "xla"):
        return xla_attention
    raise UserError(f"model.attention {name} is not built yet; use auto or xla")
