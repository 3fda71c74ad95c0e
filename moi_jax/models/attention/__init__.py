"""Attention inside segments. Each backend is a file; it is chosen here and passed to the model."""

from typing import Protocol

import jax
from jax.sharding import Mesh

from moi_jax.common.errors import UserError
from moi_jax.models.attention.xla import xla_attention


class AttentionFn(Protocol):
    """The signature of every backend: causal attention inside the segment of each token.

    A backend is hashable and equal to itself, since it is part of what a compiled program is
    cached by. It is traced once for all layers, under scan and rematerialisation, and divides the
    scores by sqrt(N) itself. Padding has segment 0 and positions 0; what comes out there is unused.
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


def choose_attention(name: str, platform: str, mesh: Mesh | None) -> AttentionFn:
    """Returns the backend that model.attention names, for a platform and a mesh.

    Args:
      name: auto, or the name of a backend.
      platform: cpu, gpu or tpu.
      mesh: the mesh over which rows and heads are split; None means one device.

    Raises:
      UserError: there is no such backend.
    """
    del platform, mesh  # so far, one backend serves all of them
    if name in ("auto", "xla"):
        return xla_attention
    raise UserError(f"model.attention {name} is not built yet; use auto or xla")
