"""The KV cache: it keeps the keys and values of earlier tokens, so a step computes one token."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moi_jax.models.config import ModelConfig
from moi_jax.parallel.axes import constrain

# The logical axes of a layer's keys, and of its values: [B, K, T, N].
KV_AXES = ("batch", "kv_heads", None, None)


class Cache(NamedTuple):
    """A ring buffer with the keys and values of the newest T tokens of every row.

    In a step all rows write at the same place, whatever their lengths. So a step is one update in
    place. A row of n tokens owns the place `newest` and the n - 1 places before it, around the
    ring. The content of its other places is never used.

    Attributes:
      keys, values: one array [B, K, T, N] for each layer, in the compute dtype. Keys are rotated.
      newest: int32[], the place written last.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    newest: jax.Array

    @property
    def length(self) -> int:
        """T, the number of tokens that it can hold for a row."""
        return self.keys[0].shape[2]

    def ages(self) -> jax.Array:
        """Returns int32[T]: how many tokens ago each place was written; the newest is 0."""
        return (self.newest - jnp.arange(self.length)) % self.length


def cache_shape(config: ModelConfig, rows: int, length: int) -> tuple[int, int, int, int]:
    """Returns the shape (B, K, T, N) of the keys of a layer, which is also that of the values."""
    return rows, config.num_kv_heads, length, config.head_dim


def empty_cache(config: ModelConfig, rows: int, length: int, dtype: jax.typing.DTypeLike) -> Cache:
    """Makes a cache for `rows` rows of `length` tokens, filled with zeros."""
    shape = cache_shape(config, rows, length)

    def layers() -> tuple[jax.Array, ...]:
        return tuple(constrain(jnp.zeros(shape, dtype), *KV_AXES) for _ in range(config.num_layers))

    return Cache(layers(), layers(), jnp.zeros((), jnp.int32))


def resize(cache: Cache, length: int) -> Cache:
    """Copies the newest tokens into a longer or shorter ring."""
    places = (cache.newest - jnp.arange(length)[::-1]) % cache.length

    def take(old: jax.Array) -> jax.Array:
        return constrain(jnp.take(old, places, axis=2), *KV_AXES)

    keys, values = (tuple(map(take, layers)) for layers in (cache.keys, cache.values))
    return Cache(keys, values, jnp.asarray(length - 1, jnp.int32))


def take_rows(cache: Cache, rows: jax.Array) -> Cache:
    """A cache of some of the rows, int32[m]."""

    def take(layer: jax.Array) -> jax.Array:
        return constrain(layer[rows], *KV_AXES)

    keys, values = (tuple(map(take, layers)) for layers in (cache.keys, cache.values))
    return Cache(keys, values, cache.newest)


def insert(
    cache: Cache,
    rows: jax.Array,
    kept: Sequence[tuple[jax.Array, jax.Array]],
    lengths: jax.Array,
) -> Cache:
    """Replaces the content of some rows with whole prompts.

    Args:
      rows: int32[m], rows of the cache. A row outside the cache is ignored.
      kept: for each layer the keys and values [m, S, K, N], as `decoding.prefill` returns them.
      lengths: int32[m], the lengths of the prompts; none is longer than the ring.
    """
    index = lengths[:, None] - 1 - cache.ages()
    ours = (index >= 0)[..., None, None]

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        there = jnp.take_along_axis(new, jnp.maximum(index, 0)[..., None, None], axis=1)
        # Zeros elsewhere: a value that is not finite would change the new prompt even with
        # attention weight zero (0 * inf is nan).
        there = jnp.where(ours, there, 0).transpose(0, 2, 1, 3)
        return constrain(old.at[rows].set(there, mode="drop"), *KV_AXES)

    keys, values = zip(*kept, strict=True)
    return cache._replace(
        keys=tuple(map(put, cache.keys, keys)), values=tuple(map(put, cache.values, values))
    )


def write(layer: jax.Array, new: jax.Array, place: jax.Array) -> jax.Array:
    """Writes one token [B, 1, K, N] of every row into a layer's keys or values [B, K, T, N]."""
    new = new.transpose(0, 2, 1, 3)
    return constrain(jax.lax.dynamic_update_slice_in_dim(layer, new, place, axis=2), *KV_AXES)
