"""How a model computes: the settings that change speed and rounding, never the architecture."""

import dataclasses

import jax

from moi_jax.models.attention import Attention
from moi_jax.models.attention.xla import xla_attention


@dataclasses.dataclass(frozen=True)
class Compute:
    """Settings of one model on one platform.

    Attributes:
      dtype: of activations and of the matrix products.
      remat: none, full (recompute each layer backward), dots (keep the projections).
      attention: the implementation, see `models.attention.choose_attention`.
    """

    dtype: jax.typing.DTypeLike = "float32"
    remat: str = "none"
    attention: Attention = xla_attention


def resolve_dtype(name: str, platform: str) -> str:
    """The dtype that `auto` means on a platform: float32 on a CPU, bfloat16 elsewhere."""
    if name != "auto":
        return name
    return "float32" if platform == "cpu" else "bfloat16"
