"""Drafts of the next tokens, looked up in a row's own text.

A model reads several tokens in about the time that it takes for one, because its weights and the
cache are read once for all of them. So a step gets the newest token and some guesses at the next
ones, and keeps those guesses that are what the model itself says. But for rounding the answer
stays what it is, and takes fewer steps. The guesses are free here: answers repeat their prompts and
themselves. The method is prompt lookup decoding (Saxena 2023,
https://github.com/apoorvumang/prompt-lookup-decoding).
"""

import jax
import jax.numpy as jnp

# Tokens before a place that are compared. The longest match wins, then the latest.
NGRAM = 3


def look_up(tokens: jax.Array, lengths: jax.Array, count: int) -> jax.Array:
    """Returns int32[B, count], what followed when each row last had the tokens that it ends with.

    Where that text ends before `count` tokens, it is taken to repeat. A row that ends with
    something new gets arbitrary tokens of its text.

    Args:
      tokens: int32[B, T].
      lengths: int32[B]; what stands past it is not looked at.
    """
    place = jnp.arange(tokens.shape[1])
    last = lengths[:, None] - 1
    same, matched = jnp.asarray(True), jnp.zeros(tokens.shape, jnp.int32)
    for back in range(NGRAM):
        wanted = jnp.take_along_axis(tokens, last - back, axis=1)
        same &= (jnp.roll(tokens, back, axis=1) == wanted) & (place >= back)
        matched += same
    score = jnp.where(place < last, matched * tokens.shape[1] + place, -1)
    found = jnp.argmax(score, axis=1, keepdims=True)
    period = jnp.maximum(last - found, 1)
    return jnp.take_along_axis(tokens, found + 1 + jnp.arange(count) % period, axis=1)
