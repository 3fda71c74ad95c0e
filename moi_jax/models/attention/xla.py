"""Causal attention inside segments. The plain XLA path here is the reference for any other."""

import math

import jax
import jax.numpy as jnp


def attention(
    query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array
) -> jax.Array:
    """Grouped-query causal attention that never looks outside a token's segment.

    Args:
      query: [B, S, H, N]; key, value: [B, S, K, N], H a multiple of K.
      segment_ids: int32[B, S]; row, chunk and instruction masks differ in these ids alone.

    Returns:
      [B, S, H, N] in the query's dtype; scores and softmax in float32 or wider.
    """
    b, s, h, n = query.shape
    k = key.shape[2]
    statistics = jnp.promote_types(query.dtype, jnp.float32)
    query = query.reshape(b, s, k, h // k, n).transpose(0, 2, 3, 1, 4)
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    scores = jnp.einsum("bkgsn,bktn->bkgst", query, key, preferred_element_type=statistics)
    index = jnp.arange(s)
    visible = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (index[:, None] >= index)
    scores = jnp.where(visible[:, None, None], scores / math.sqrt(n), -jnp.inf)
    # Softmax, divided after the sum over values: S x N divisions instead of S x S.
    largest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - largest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    mixed = jnp.einsum(
        "bkgst,bktn->bkgsn", weights.astype(value.dtype), value, preferred_element_type=statistics
    )
    mixed = (mixed / total).astype(value.dtype)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(b, s, h, n)
