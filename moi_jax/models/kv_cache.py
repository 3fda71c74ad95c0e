"""The KV cache: what attention needs of earlier tokens, kept so that a step computes one token."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moi_jax.models.config import ModelConfig
from moi_jax.parallel.axes import constrain

# Logical axes of the keys and values of a layer.
AXES = ("batch", "kv_heads", None, None)


class Cache(NamedTuple):
    """Keys and values of the newest T tokens of every row: a ring with one place to write.

    All rows write at the same place in a step, which is then one update in place, however long
    each of them is. A row of n tokens owns `newest` and the n - 1 places before it, round the
    ring; what lies in the others is never looked at.

    Attributes:
      keys, values: one [B, K, T, N] a layer, in the compute dtype; keys are rotated already.
      newest: int32[], the place written last.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    newest: jax.Array

    @property
    def length(self) -> int:
        """T, the tokens it can hold of a row."""
        return self.keys[0].shape[2]

    def ages(self) -> jax.Array:
        """int32[T]: how many tokens ago each place was written; the newest is 0."""
        return (self.newest - jnp.arange(self.length)) % self.length


def cache_shape(config: ModelConfig, rows: int, length: int) -> tuple[int, int, int, int]:
    """Of the keys of a layer, and of the values."""
    return rows, config.num_kv_heads, length, config.head_dim


def empty_cache(config: ModelConfig, rows: int, length: int, dtype: jax.typing.DTypeLike) -> Cache:
    """A cache of so many rows of nothing."""
    shape = cache_shape(config, rows, length)

    def layers() -> tuple[jax.Array, ...]:
        return tuple(constrain(jnp.zeros(shape, dtype), *AXES) for _ in range(config.num_layers))

    return Cache(layers(), layers(), jnp.zeros((), jnp.int32))


def resize(cache: Cache, length: int) -> Cache:
    """The same newest tokens in a longer or shorter ring."""
    places = (cache.newest - jnp.arange(length)[::-1]) % cache.length

    def take(old: jax.Array) -> jax.Array:
        return constrain(jnp.take(old, places, axis=2), *AXES)

    keys, values = (tuple(map(take, layers)) for layers in (cache.keys, cache.values))
    return Cache(keys, values, jnp.asarray(length - 1, jnp.int32))


def insert(
    cache: Cache, rows: jax.Array, keys: jax.Array, values: jax.Array, lengths: jax.Array
) -> Cache:
    """Whole prompts take the place of what the rows held before.

    Args:
      rows: int32[m], of the cache; one that it has not is left out.
      keys, values: [L, m, S, K, N] as `decoding.prefill` gives them.
      lengths: int32[m], of the prompts; none is longer than the ring.
    """
    index = lengths[:, None] - 1 - cache.ages()
    ours = (index >= 0)[..., None, None]

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        there = jnp.take_along_axis(new, jnp.maximum(index, 0)[..., None, None], axis=1)
        # Zeros elsewhere: what is not finite in a row before must not reach this one, as it
        # would even at weight zero.
        there = jnp.where(ours, there, 0).transpose(0, 2, 1, 3)
        return constrain(old.at[rows].set(there, mode="drop"), *AXES)

    return cache._replace(
        keys=tuple(map(put, cache.keys, keys)), values=tuple(map(put, cache.values, values))
    )


def write(layer: jax.Array, new: jax.Array, place: jax.Array) -> jax.Array:
    """A layer's keys or values [B, K, T, N] with those of one more token [B, 1, K, N]."""
    new = new.transpose(0, 2, 1, 3)
    return constrain(jax.lax.dynamic_update_slice_in_dim(layer, new, place, axis=2), *AXES)


def cached_attention(
    query: jax.Array, keys: jax.Array, values: jax.Array, visible: jax.Array
) -> jax.Array:
    """Grouped-query attention of one token a row over its cache.

    Args:
      query: [B, 1, H, N]; keys, values: [B, K, T, N].
      visible: bool[B, T], the row's own tokens.

    Returns:
      [B, 1, H, N] in the query's dtype; scores and softmax in float32 or wider.
    """
    b, _, h, n = query.shape
    k = keys.shape[1]
    statistics = jnp.promote_types(query.dtype, jnp.float32)
    query = query.reshape(b, k, h // k, n)
    scores = jnp.einsum("bkgn,bktn->bkgt", query, keys, preferred_element_type=statistics)
    scores = jnp.where(visible[:, None, None], scores / math.sqrt(n), -jnp.inf)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    mixed = jnp.einsum(
        "bkgt,bktn->bkgn", weights.astype(values.dtype), values, preferred_element_type=statistics
    )
    return (mixed / total).astype(values.dtype).reshape(b, 1, h, n)
