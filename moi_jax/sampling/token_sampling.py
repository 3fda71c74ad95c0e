"""The next token from logits: greedy, or sampled with temperature, top-k and top-p."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# After so many halvings of the logits' range, the bound is as exact as float32.
_HALVINGS = 32


class SamplingParams(NamedTuple):
    """How the token of each row is sampled, [B] each; see `requests.GenerationConfig`."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    seed: jax.Array  # uint32


def sample_tokens(logits: jax.Array, params: SamplingParams | None, index: jax.Array) -> jax.Array:
    """int32[B] ids from logits [B, V].

    A row's id depends on its own logits, params and index alone.

    Args:
      params: None means greedy decoding for all rows.
      index: int32[B], the number of tokens that each completion has already.
    """
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if params is None:
        return best
    sampled = jax.vmap(_sample)(logits.astype(jnp.float32), params, index)
    return jnp.where(params.temperature > 0, sampled, best)


def _sample(logits: jax.Array, params: SamplingParams, index: jax.Array) -> jax.Array:
    """One id from logits [V]: temperature first, then top-k, then top-p of what is left."""
    logits = logits / jnp.where(params.temperature > 0, params.temperature, 1)
    top_k = jnp.where(params.top_k > 0, params.top_k, logits.size)
    logits = _keep_likeliest(logits, jnp.ones_like(logits), top_k)
    # The likeliest id is always kept, even with a tiny top_p.
    top_p = jnp.maximum(params.top_p, jnp.finfo(jnp.float32).tiny)
    top_p = jnp.where(top_p < 1, top_p, jnp.inf)
    logits = _keep_likeliest(logits, jax.nn.softmax(logits), top_p)
    key = jax.random.fold_in(jax.random.key(params.seed), index)
    return jax.random.categorical(key, logits).astype(jnp.int32)


def _keep_likeliest(logits: jax.Array, weights: jax.Array, bound: jax.Array) -> jax.Array:
    """Sets ids to -inf that are less likely than others whose weights already reach the bound.

    Works by halving the range of the logits: sorting a vocabulary costs more than the model's
    step. Ids that are as likely as the last kept one are kept too.
    """
    lowest = jnp.min(logits, initial=jnp.inf, where=jnp.isfinite(logits)) - 1

    def halve(_: int, edges: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = edges
        middle = (low + high) / 2
        reached = jnp.sum(weights, where=logits > middle) >= bound
        return jnp.where(reached, middle, low), jnp.where(reached, high, middle)

    low, _ = jax.lax.fori_loop(0, _HALVINGS, halve, (lowest, jnp.max(logits)))
    return jnp.where(logits > low, logits, -jnp.inf)
