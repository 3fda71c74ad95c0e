"""The compute settings of a model: they change speed and rounding, never the architecture."""

import dataclasses

import jax

from moi_jax.models.attention import AttentionFn
from moi_jax.models.attention.xla import xla_attention
from moi_jax.models.remat import RematPolicy


@dataclasses.dataclass(frozen=True)
class Compute:
    """Settings of one model on one platform.

    Attributes:
      dtype: the dtype of the activations and of the matrix products.
      remat: what the backward pass recomputes; None keeps everything.
      attention: the backend, see `models.attention.choose_attention`.
    """

    dtype: jax.typing.DTypeLike = "float32"
    remat: RematPolicy | None = None
    attention: AttentionFn = xla_attention


def resolve_dtype(name: str, platform: str) -> str:
    """Resolves the dtype `auto` for a platform: float32 on a CPU, bfloat16 elsewhere."""
    if name != "auto":
        return name
    return "float32" if platform == "cpu" else "bfloat16"
