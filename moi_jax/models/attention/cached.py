"""Attention of the new tokens of each row over its KV cache. Decoding uses it with any backend."""

import math

import jax
import jax.numpy as jnp


def cached_attention(
    query: jax.Array, keys: jax.Array, values: jax.Array, visible: jax.Array
) -> jax.Array:
    """Computes grouped-query attention of W tokens in each row over its cache.

    Args:
      query: [B, W, H, N]; keys: [B, K, N, T]; values: [B, K, T, N].
      visible: bool[B, W, T], the places that each token sees.

    Returns:
      [B, W, H, N] in the query's dtype; scores and softmax in float32 or wider.
    """
    b, w, h, n = query.shape
    k = keys.shape[1]
    wide = jnp.promote_types(query.dtype, jnp.float32)
    # The tokens and heads that share keys are one axis, so both are plain batched products.
    query = query.reshape(b, w, k, h // k, n).swapaxes(1, 2).reshape(b, k, -1, n)
    seen = jnp.repeat(visible, h // k, axis=1)[:, None]
    scores = jnp.einsum("bkqn,bknt->bkqt", query, keys, preferred_element_type=wide)
    scores = jnp.where(seen, scores / math.sqrt(n), -jnp.inf)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    mixed = jnp.einsum(
        "bkqt,bktn->bkqn", weights.astype(values.dtype), values, preferred_element_type=wide
    )
    mixed = (mixed / total).astype(values.dtype).reshape(b, k, w, h // k, n)
    return mixed.swapaxes(1, 2).reshape(b, w, h, n)
