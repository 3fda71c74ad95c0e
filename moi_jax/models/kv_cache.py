"""The KV cache: the keys and values of earlier tokens, so that a step computes only new ones."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moi_jax.models.config import ModelConfig
from moi_jax.parallel.axes import constrain

# The logical axes of a layer's keys [B, K, N, T], and of its values [B, K, T, N].
KV_AXES = ("batch", "kv_heads", None, None)
# Of places that rise and differ. A TPU's compiler then makes one scatter, and no loop over rows.
_IN_ORDER: Any = {"mode": "drop", "unique_indices": True, "indices_are_sorted": True}


class Cache(NamedTuple):
    """The keys and values of the first T tokens of every row.

    A token's place is its position in the row. What stands past the end of a row is noise that
    nobody reads, and that is written over before the row gets there.

    Attributes:
      keys, values: for each layer an array of keys [B, K, N, T] and one of values [B, K, T, N], in
        the compute dtype. Keys are rotated. Both products of attention then read them in order; on
        a CPU keys [B, K, T, N] would take twice as long.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]

    @property
    def length(self) -> int:
        """T, the number of tokens that it can hold for a row."""
        return self.values[0].shape[2]


def value_shape(config: ModelConfig, rows: int, length: int) -> tuple[int, int, int, int]:
    """Returns the shape (B, K, T, N) of the values of a layer. Its keys are of the same size."""
    return rows, config.num_kv_heads, length, config.head_dim


def empty_cache(config: ModelConfig, rows: int, length: int, dtype: jax.typing.DTypeLike) -> Cache:
    """Makes a cache for `rows` rows of `length` tokens, filled with zeros."""
    b, k, t, n = value_shape(config, rows, length)

    def layers(*shape: int) -> tuple[jax.Array, ...]:
        return tuple(constrain(jnp.zeros(shape, dtype), *KV_AXES) for _ in range(config.num_layers))

    return Cache(layers(b, k, n, t), layers(b, k, t, n))


def resize(cache: Cache, length: int) -> Cache:
    """Makes it longer or shorter. A shorter one loses what stands past its end."""

    def fit(layer: jax.Array, axis: int) -> jax.Array:
        return constrain(fit_length(layer, length, axis), *KV_AXES)

    return Cache(
        tuple(fit(keys, 3) for keys in cache.keys), tuple(fit(values, 2) for values in cache.values)
    )


def fit_length(array: jax.Array, length: int, axis: int) -> jax.Array:
    """Cuts an axis, or pads it with zeros, to this length."""
    kept = jax.lax.slice_in_dim(array, 0, min(length, array.shape[axis]), axis=axis)
    missing = length - kept.shape[axis]
    return jnp.pad(kept, [(0, missing if a == axis else 0) for a in range(array.ndim)])


def take_rows(cache: Cache, rows: jax.Array) -> Cache:
    """A cache of some of the rows, int32[m]."""
    return jax.tree.map(lambda layer: constrain(layer[rows], *KV_AXES), cache)


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
      lengths: int32[m], the lengths of the prompts; none is longer than the cache.
    """

    def put(old: jax.Array, new: jax.Array, order: tuple[int, ...]) -> jax.Array:
        # Zeros past the end: a value that is not finite would change the new prompt even with
        # attention weight zero (0 * inf is nan).
        ours = jnp.arange(new.shape[1]) < lengths[:, None]
        new = fit_length(jnp.where(ours[..., None, None], new, 0), cache.length, 1)
        return constrain(old.at[rows].set(new.transpose(order), mode="drop"), *KV_AXES)

    keys, values = zip(*kept, strict=True)
    return Cache(
        tuple(put(*pair, (0, 2, 3, 1)) for pair in zip(cache.keys, keys, strict=True)),
        tuple(put(*pair, (0, 2, 1, 3)) for pair in zip(cache.values, values, strict=True)),
    )


def write_keys(layer: jax.Array, keys: jax.Array, places: jax.Array) -> jax.Array:
    """Writes keys [B, W, K, N] of W tokens of every row at their places, int32[B, W]."""

    def write(row: jax.Array, new: jax.Array, places: jax.Array) -> jax.Array:
        return row.at[..., places].set(new, **_IN_ORDER)

    return constrain(jax.vmap(write)(layer, keys.transpose(0, 2, 3, 1), places), *KV_AXES)


def write_values(layer: jax.Array, values: jax.Array, places: jax.Array) -> jax.Array:
    """Writes values [B, W, K, N] of W tokens of every row at their places, int32[B, W]."""

    def write(row: jax.Array, new: jax.Array, places: jax.Array) -> jax.Array:
        return row.at[:, places].set(new, **_IN_ORDER)

    return constrain(jax.vmap(write)(layer, values.transpose(0, 2, 1, 3), places), *KV_AXES)
