"""Causal attention inside segments. The plain XLA path here is the reference for any other."""

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
    grouped = query.reshape(b, s, k, h // k, n)
    scores = jnp.einsum("bskgn,btkn->bkgst", grouped, key, preferred_element_type=statistics)
    index = jnp.arange(s)
    visible = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (index[:, None] >= index)
    scores = jnp.where(visible[:, None, None], scores / jnp.sqrt(n).astype(statistics), -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bkgst,btkn->bskgn", weights, value).reshape(b, s, h, n)
