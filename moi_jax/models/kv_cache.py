"""The KV cache: it keeps the keys and values of earlier tokens, so a step computes one token."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moi_jax.models.config import ModelConfig
from moi_jax.parallel.axes import constrain

# The logical axes of a layer's keys [B, K, N, T], and of its values [B, K, T, N].
KV_AXES = ("batch", "kv_heads", None, None)


class Cache(NamedTuple):
    """A ring buffer with the keys and values of the newest T tokens of every row.

    In a step all rows write at the same place, whatever their lengths. So a step is one update in
    place. A row of n tokens owns the place `newest` and the n - 1 places before it, around the
    ring. The content of its other places is never used.

    Attributes:
      keys, values: for each layer an array of keys [B, K, N, T] and one of values [B, K, T, N], in
        the compute dtype. Keys are rotated. Both products of attention then read them in order; on
        a CPU keys [B, K, T, N] would take twice as long.
      newest: int32[], the place written last.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    newest: jax.Array

    @property
    def length(self) -> int:
        """T, the number of tokens that it can hold for a row."""
        return self.values[0].shape[2]

    def ages(self) -> jax.Array:
        """Returns int32[T]: how many tokens ago each place was written; the newest is 0."""
        return (self.newest - jnp.arange(self.length)) % self.length


def value_shape(config: ModelConfig, rows: int, length: int) -> tuple[int, int, int, int]:
    """Returns the shape (B, K, T, N) of the values of a layer. Its keys are of the same size."""
    return rows, config.num_kv_heads, length, config.head_dim


def empty_cache(config: ModelConfig, rows: int, length: int, dtype: jax.typing.DTypeLike) -> Cache:
    """Makes a cache for `rows` rows of `length` tokens, filled with zeros."""
    b, k, t, n = value_shape(config, rows, length)

    def layers(*shape: int) -> tuple[jax.Array, ...]:
        return tuple(constrain(jnp.zeros(shape, dtype), *KV_AXES) for _ in range(config.num_layers))

    return Cache(layers(b, k, n, t), layers(b, k, t, n), jnp.zeros((), jnp.int32))


def resize(cache: Cache, length: int) -> Cache:
    """Copies the newest tokens into a longer or shorter ring."""
    places = (cache.newest - jnp.arange(length)[::-1]) % cache.length

    def take(layers: Sequence[jax.Array], axis: int) -> tuple[jax.Array, ...]:
        return tuple(constrain(jnp.take(old, places, axis), *KV_AXES) for old in layers)

    newest = jnp.asarray(length - 1, jnp.int32)
    return Cache(take(cache.keys, 3), take(cache.values, 2), newest)


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

    def put(old: jax.Array, new: jax.Array, order: tuple[int, ...]) -> jax.Array:
        there = jnp.take_along_axis(new, jnp.maximum(index, 0)[..., None, None], axis=1)
        # Zeros elsewhere: a value that is not finite would change the new prompt even with
        # attention weight zero (0 * inf is nan).
        there = jnp.where(ours, there, 0).transpose(order)
        return constrain(old.at[rows].set(there, mode="drop"), *KV_AXES)

    keys, values = zip(*kept, strict=True)
    return cache._replace(
        keys=tuple(put(*pair, (0, 2, 3, 1)) for pair in zip(cache.keys, keys, strict=True)),
        values=tuple(put(*pair, (0, 2, 1, 3)) for pair in zip(cache.values, values, strict=True)),
    )


def write_key(keys: jax.Array, key: jax.Array, place: jax.Array) -> jax.Array:
    """Writes the key [B, 1, K, N] of one token of every row into the keys of a layer."""
    return _write(keys, key.transpose(0, 2, 3, 1), place, 3)


def write_value(values: jax.Array, value: jax.Array, place: jax.Array) -> jax.Array:
    """Writes the value [B, 1, K, N] of one token of every row into the values of a layer."""
    return _write(values, value.transpose(0, 2, 1, 3), place, 2)


def _write(layer: jax.Array, new: jax.Array, place: jax.Array, axis: int) -> jax.Array:
    return constrain(jax.lax.dynamic_update_slice_in_dim(layer, new, place, axis), *KV_AXES)
