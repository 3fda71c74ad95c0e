"""The next token from logits: greedy, or drawn by temperature, top-k and top-p."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Halvings of the range of the logits, after which the bound is as exact as float32.
_HALVINGS = 32


class Draws(NamedTuple):
    """How each row chooses, [B] each; see requests.Request."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    seed: jax.Array  # uint32


def choose(logits: jax.Array, draws: Draws | None, index: jax.Array) -> jax.Array:
    """int32[B] ids from logits [B, V]; `index` int32[B] counts the tokens of each answer.

    A row's draw depends on its logits, seed and index alone. Without `draws` all are greedy.
    """
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if draws is None:
        return best
    drawn = jax.vmap(_draw)(logits.astype(jnp.float32), draws, index)
    return jnp.where(draws.temperature > 0, drawn, best)


def _draw(logits: jax.Array, draws: Draws, index: jax.Array) -> jax.Array:
    """One id from logits [V]: temperature first, then top-k, then top-p of what is left."""
    logits = logits / jnp.where(draws.temperature > 0, draws.temperature, 1)
    top_k = jnp.where(draws.top_k > 0, draws.top_k, logits.size)
    logits = _keep_likeliest(logits, jnp.ones_like(logits), top_k)
    # At least the likeliest id is kept, however little is asked for.
    top_p = jnp.maximum(draws.top_p, jnp.finfo(jnp.float32).tiny)
    top_p = jnp.where(top_p < 1, top_p, jnp.inf)
    logits = _keep_likeliest(logits, jax.nn.softmax(logits), top_p)
    key = jax.random.fold_in(jax.random.key(draws.seed), index)
    return jax.random.categorical(key, logits).astype(jnp.int32)


def _keep_likeliest(logits: jax.Array, weights: jax.Array, bound: jax.Array) -> jax.Array:
    """-inf for ids that are less likely than others whose weights already reach the bound.

    By halving the range of the logits: sorting a vocabulary costs more than the model's step.
    Ids as likely as the last one kept are kept too.
    """
    lowest = jnp.min(logits, initial=jnp.inf, where=jnp.isfinite(logits)) - 1

    def halve(_: int, edges: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = edges
        middle = (low + high) / 2
        reached = jnp.sum(weights, where=logits > middle) >= bound
        return jnp.where(reached, middle, low), jnp.where(reached, high, middle)

    low, _ = jax.lax.fori_loop(0, _HALVINGS, halve, (lowest, jnp.max(logits)))
    return jnp.where(logits > low, logits, -jnp.inf)
