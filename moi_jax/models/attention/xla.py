"""Causal attention inside segments in plain XLA: the reference for every other backend."""

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name


def xla_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array,
    positions: jax.Array,
) -> jax.Array:
    """Computes grouped-query causal attention inside the segment of each token.

    Args:
      query: [B, S, H, N]; key, value: [B, S, K, N], where H is a multiple of K.
      segment_ids, positions: int32[B, S]. A token sees the tokens of its own segment whose
        position is not after its own. Row, chunk and instruction masks differ in these two only.
        The arrays may hold the tokens of a row in any order.

    Returns:
      [B, S, H, N] in the query's dtype. Scores and softmax are in float32 or wider.
    """
    b, s, h, n = query.shape
    k = key.shape[2]
    wide = jnp.promote_types(query.dtype, jnp.float32)
    query = query.reshape(b, s, k, h // k, n).transpose(0, 2, 3, 1, 4)
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    scores = jnp.einsum("bkgsn,bktn->bkgst", query, key, preferred_element_type=wide)
    same_segment = segment_ids[:, :, None] == segment_ids[:, None, :]
    visible = same_segment & (positions[:, :, None] >= positions[:, None, :])
    scores = jnp.where(visible[:, None, None], scores / math.sqrt(n), -jnp.inf)
    # The softmax divides after the sum over values: S x N divisions instead of S x S.
    largest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - largest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    output = jnp.einsum(
        "bkgst,bktn->bkgsn", weights.astype(value.dtype), value, preferred_element_type=wide
    )
    output = (output / total).astype(value.dtype)
    return checkpoint_name(output.transpose(0, 3, 1, 2, 4).reshape(b, s, h, n), "context")
