"""Rotary position embedding, its scaling in Llama 3, dynamic NTK and log-n attention of Qwen v1."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moi_jax.models.config import ModelConfig, RopeScaling

# 2^24 times the trained length is beyond any row.
_MAX_DOUBLINGS = 24


class Rotary(NamedTuple):
    """What the positions of a batch [B, S] do to queries and keys."""

    cos: jax.Array  # [B, S, N/2]
    sin: jax.Array  # [B, S, N/2]
    query_scale: jax.Array | None  # [B, S], log-n attention; None is 1


def position_angles(
    config: ModelConfig,
    positions: jax.Array,
    rope_alpha: jax.Array | None,
    dtype: jax.typing.DTypeLike,
    *,
    log_n: bool,
) -> Rotary:
    """The angles of positions [B, S] in a model.

    Args:
      rope_alpha: NTK factor per token [B, S]; None is 1 everywhere.
      dtype: of the computation; the angles are in float32 or wider.
      log_n: whether log-n attention acts, in a model that has it.
    """
    wide = jnp.promote_types(dtype, jnp.float32)
    cos, sin = rotary_angles(
        positions, config.head_dim, config.rope_base, config.rope_scaling, rope_alpha, wide
    )
    query_scale = None
    if log_n and config.logn_attention:
        query_scale = logn_scale(positions, config.seq_length, wide)
    return Rotary(cos, sin, query_scale)


def rotary_angles(
    positions: jax.Array,
    head_dim: int,
    base: float,
    scaling: RopeScaling | None,
    alpha: jax.Array | None,
    dtype: jax.typing.DTypeLike,
) -> tuple[jax.Array, jax.Array]:
    """cos and sin [B, S, N/2] of the half-split rotary embedding.

    Args:
      positions: int32[B, S], restarting with each segment.
      scaling: Llama 3's, of the frequencies; None is none.
      alpha: NTK factor per token [B, S]; None is 1 everywhere. base' = base alpha^(N/(N-2)).
      dtype: of the angles, at least float32.
    """
    exponents = jnp.arange(0, head_dim, 2, dtype=dtype) / head_dim
    if alpha is None:
        inverse_frequencies = 1.0 / (jnp.asarray(base, dtype) ** exponents)
    else:
        scaled = base * alpha.astype(dtype) ** (head_dim / (head_dim - 2))
        inverse_frequencies = 1.0 / (scaled[..., None] ** exponents)
    if scaling is not None:
        inverse_frequencies = _llama3(inverse_frequencies, scaling)
    angles = positions[..., None].astype(dtype) * inverse_frequencies
    return jnp.cos(angles), jnp.sin(angles)


def _llama3(inverse_frequencies: jax.Array, scaling: RopeScaling) -> jax.Array:
    """Waves that turn often within the original length stay, slow ones are stretched by factor.

    Between high_freq_factor and low_freq_factor turns the two are mixed linearly.
    """
    turns = scaling.original_max_position_embeddings * inverse_frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = jnp.clip(kept, 0, 1)
    return inverse_frequencies * (kept + (1 - kept) / scaling.factor)


def apply_rotary(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates x [B, S, heads, N] in the dtype of the angles, and returns x's own dtype."""
    first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def ntk_alpha(lengths: jax.Array, seq_length: int) -> jax.Array:
    """Qwen's NTK factor max(2^ceil(log2(length / seq_length) + 1) - 1, 1), int32.

    By integer comparison: a float log2 rounds either way at the jumps (seq_length + 1, ...).
    """
    limits = [min(seq_length << doublings, 2**31 - 1) for doublings in range(_MAX_DOUBLINGS)]
    doublings = jnp.sum(lengths[..., None] > jnp.asarray(limits, jnp.int32), axis=-1)
    return (2 << doublings) - 1


def logn_scale(positions: jax.Array, seq_length: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Query factor [B, S]: log(p + 1) / log(seq_length) past the trained length, else 1."""
    count = positions + 1
    scale = jnp.log(count.astype(dtype)) / math.log(seq_length)
    return jnp.where(count > seq_length, scale, 1.0).astype(dtype)


def segment_lengths(segment_ids: jax.Array) -> jax.Array:
    """For every token of [B, S] the number of tokens in its segment."""
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return jnp.sum(same, axis=-1, dtype=jnp.int32)


def segment_positions(segment_ids: jax.Array) -> jax.Array:
    """int32[B, S] positions that restart with each run of equal segment ids."""
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32), segment_ids.shape)
    starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
