"""Attention of one new token for each row over its KV cache. Decoding uses it with any backend."""

import math

import jax
import jax.numpy as jnp


def cached_attention(
    query: jax.Array, keys: jax.Array, values: jax.Array, visible: jax.Array
) -> jax.Array:
    """Computes grouped-query attention of one token in each row over its cache.

    Args:
      query: [B, 1, H, N]; keys: [B, K, N, T]; values: [B, K, T, N].
      visible: bool[B, T], the places that the row owns.

    Returns:
      [B, 1, H, N] in the query's dtype; scores and softmax in float32 or wider.
    """
    b, _, h, n = query.shape
    k = keys.shape[1]
    wide = jnp.promote_types(query.dtype, jnp.float32)
    query = query.reshape(b, k, h // k, n)
    scores = jnp.einsum("bkgn,bknt->bkgt", query, keys, preferred_element_type=wide)
    scores = jnp.where(visible[:, None, None], scores / math.sqrt(n), -jnp.inf)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    mixed = jnp.einsum(
        "bkgt,bktn->bkgn", weights.astype(values.dtype), values, preferred_element_type=wide
    )
    return (mixed / total).astype(values.dtype).reshape(b, 1, h, n)
