"""Rotary position embedding: Llama 3's scaling, layers without it, Qwen v1's NTK and log-n."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moi_jax.models.config import ModelConfig, RopeScaling

# No row is longer than 2^24 times the trained length.
_MAX_DOUBLINGS = 24


class Rotary(NamedTuple):
    """The factors for queries and keys at the positions of a batch [B, S].

    R is `ModelConfig.rotary_dim`, the number of rotated numbers of each head.
    """

    cos: jax.Array  # [B, S, R/2]
    sin: jax.Array  # [B, S, R/2]
    query_scale: jax.Array | None  # [B, S], of log-n attention; None means 1
    # bool[L], or bool[] for one layer: whether it rotates. None means that all layers do.
    rotates: jax.Array | None = None

    def of_layer(self, number: int) -> "Rotary":
        """Returns the factors for one layer of the model."""
        return self if self.rotates is None else self._replace(rotates=self.rotates[number])


# The axes of `Rotary` for a scan over the layers.
LAYER_AXES = Rotary(cos=None, sin=None, query_scale=None, rotates=0)  # type: ignore[arg-type]


def position_angles(
    config: ModelConfig,
    positions: jax.Array,
    rope_alpha: jax.Array | None,
    dtype: jax.typing.DTypeLike,
    *,
    log_n: bool,
) -> Rotary:
    """Computes the rotary angles of positions [B, S] for a model.

    Args:
      rope_alpha: NTK factor per token [B, S]; None means 1 everywhere.
      dtype: the compute dtype; the angles are in float32 or wider.
      log_n: use log-n attention, if the model has it.
    """
    wide = jnp.promote_types(dtype, jnp.float32)
    cos, sin = rotary_angles(
        positions, config.rotary_dim, config.rope_base, config.rope_scaling, rope_alpha, wide
    )
    query_scale = None
    if log_n and config.logn_attention:
        query_scale = logn_scale(positions, config.seq_length, wide)
    rotates = None if config.rope_layers is None else jnp.array(config.rope_layers)
    return Rotary(cos, sin, query_scale, rotates)


def rotary_angles(
    positions: jax.Array,
    rotary_dim: int,
    base: float,
    scaling: RopeScaling | None,
    alpha: jax.Array | None,
    dtype: jax.typing.DTypeLike,
) -> tuple[jax.Array, jax.Array]:
    """Computes cos and sin [B, S, R/2] of the half-split rotary embedding.

    Args:
      positions: int32[B, S]; they restart with each segment.
      rotary_dim: R, the number of rotated numbers of each head.
      scaling: Llama 3's scaling of the frequencies; None means no scaling.
      alpha: NTK factor per token [B, S]; None means 1. base' = base alpha^(R/(R-2)).
      dtype: the dtype of the angles, at least float32.
    """
    exponents = jnp.arange(0, rotary_dim, 2, dtype=dtype) / rotary_dim
    if alpha is None:
        inverse_frequencies = 1.0 / (jnp.asarray(base, dtype) ** exponents)
    else:
        scaled = base * alpha.astype(dtype) ** (rotary_dim / (rotary_dim - 2))
        inverse_frequencies = 1.0 / (scaled[..., None] ** exponents)
    if scaling is not None:
        inverse_frequencies = _llama3(inverse_frequencies, scaling)
    angles = positions[..., None].astype(dtype) * inverse_frequencies
    return jnp.cos(angles), jnp.sin(angles)


def _llama3(inverse_frequencies: jax.Array, scaling: RopeScaling) -> jax.Array:
    """Scales the frequencies by the number of their turns within the original length.

    Above high_freq_factor turns a frequency stays. Below low_freq_factor turns it is divided by
    `factor`. In between, the two are mixed linearly.
    """
    turns = scaling.original_max_position_embeddings * inverse_frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = jnp.clip(kept, 0, 1)
    return inverse_frequencies * (kept + (1 - kept) / scaling.factor)


def apply_rotary(x: jax.Array, angles: Rotary) -> jax.Array:
    """Rotates x [B, S, heads, N] in the dtype of the angles; returns x's dtype.

    Args:
      angles: of one layer. If it does not rotate, x comes back unchanged.
    """
    width = 2 * angles.cos.shape[-1]
    first, second = jnp.split(x[..., :width].astype(angles.cos.dtype), 2, axis=-1)
    cos, sin = angles.cos[:, :, None, :], angles.sin[:, :, None, :]
    if angles.rotates is not None:
        # A layer that does not rotate has the angle 0. If we chose between x and the rotated x
        # instead, XLA would gather both where a row is split.
        cos, sin = jnp.where(angles.rotates, cos, 1), jnp.where(angles.rotates, sin, 0)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    rotated = rotated.astype(x.dtype)
    if width < x.shape[-1]:
        rotated = jnp.concatenate([rotated, x[..., width:]], axis=-1)
    return rotated


def ntk_alpha(lengths: jax.Array, seq_length: int) -> jax.Array:
    """Computes Qwen's NTK factor max(2^ceil(log2(length / seq_length) + 1) - 1, 1), int32.

    It compares integers: a float log2 rounds up or down at the jumps (seq_length + 1, ...).
    """
    limits = [min(seq_length << doublings, 2**31 - 1) for doublings in range(_MAX_DOUBLINGS)]
    doublings = jnp.sum(lengths[..., None] > jnp.asarray(limits, jnp.int32), axis=-1)
    return (2 << doublings) - 1


def logn_scale(positions: jax.Array, seq_length: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Computes the query factor [B, S]: log(p + 1) / log(seq_length) past seq_length, else 1."""
    count = positions + 1
    scale = jnp.log(count.astype(dtype)) / math.log(seq_length)
    return jnp.where(count > seq_length, scale, 1.0).astype(dtype)


def segment_lengths(segment_ids: jax.Array) -> jax.Array:
    """Returns int32[B, S]: for every token, the number of tokens in its segment."""
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return jnp.sum(same, axis=-1, dtype=jnp.int32)


def segment_positions(segment_ids: jax.Array) -> jax.Array:
    """Returns int32[B, S] positions, which restart with each run of equal segment ids."""
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32), segment_ids.shape)
    starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
