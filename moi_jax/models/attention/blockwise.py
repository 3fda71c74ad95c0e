"""Attention block by block in plain XLA: no S x S array, on any device.

A block of queries goes through the keys from the first one of its segments up to its last token,
one block of keys at a time, with the running softmax of FlashAttention (arXiv 2205.14135). Blocks
that no query sees cost nothing. The backward pass computes the scores again, in one pass for all
three gradients, in a fixed order.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from moi_jax.models.attention.sharded import (
    attend_on_mesh,
    in_order,
    pad_rows,
    part_of_device,
    segment_starts,
)
from moi_jax.models.attention.xla import xla_attention
from moi_jax.parallel.context import context_order

Arrays = tuple[jax.Array, ...]
# Queries and keys in a block. Smaller blocks skip more, and larger ones multiply faster.
BLOCK = 128


@dataclasses.dataclass(frozen=True)
class BlockwiseAttention:
    """The backend `blockwise`, see `AttentionFn`.

    Attributes:
      mesh: the mesh over which rows, heads and queries are split; None means one device.
      rows_apart: whether a device attends to one of its rows after the other, each through its own
        blocks. Rows that go together all go through the blocks that one of them sees, but in fewer
        and larger operations, of which a CPU has nothing.
    """

    mesh: Mesh | None = None
    rows_apart: bool = False

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        segment_ids: jax.Array,
        positions: jax.Array,
    ) -> jax.Array:
        """Computes attention as `AttentionFn` says. A row of one block is left to `xla`.

        The tokens of a row must be in order, or in that of `context_order` on a context axis.
        """
        if query.shape[1] <= BLOCK:
            return xla_attention(query, key, value, segment_ids, positions)
        attend = _attend_row_by_row if self.rows_apart else _attend_rows
        return attend_on_mesh(attend, self.mesh, query, key, value, segment_ids)


def _attend_row_by_row(*rows: jax.Array) -> jax.Array:
    """As `_attend_rows`, where each row goes through its own blocks alone."""

    def attend(row: Arrays) -> jax.Array:
        return _attend_rows(*(x[None] for x in row))[0]

    return jax.lax.map(attend, rows)


def _attend_rows(
    query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array
) -> jax.Array:
    """Computes [B, T, H, N] from query [B, T, H, N], key and value [B, S, K, N]."""
    rows, tokens, heads, width = query.shape
    kv_heads, shards = key.shape[2], key.shape[1] // tokens
    key, value, segment_ids = (in_order(x, shards) for x in (key, value, segment_ids))
    places = jnp.asarray(context_order(key.shape[1], shards))
    places = part_of_device(places, shards, axis=0)  # in the row, of this device's queries
    # A token of the padding sees itself alone, so that nothing is computed for the others.
    starts = jnp.take(segment_starts(segment_ids), places, axis=1)
    padding = jnp.take(segment_ids, places, axis=1) == 0
    first, last = jnp.where(padding, places, starts), jnp.broadcast_to(places, starts.shape)

    query, first, last = pad_rows(BLOCK, query, first, last)
    key, value = pad_rows(BLOCK, key, value)
    query = query.reshape(rows, -1, BLOCK, kv_heads, heads // kv_heads, width)
    query = query.transpose(1, 0, 3, 4, 2, 5)
    first, last = (x.reshape(rows, -1, BLOCK).swapaxes(0, 1) for x in (first, last))
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    output = _attend(query, key, value, first, last)
    return output.transpose(1, 0, 4, 2, 3, 5).reshape(rows, -1, heads, width)[:, :tokens]


@jax.custom_vjp
def _attend(
    query: jax.Array, key: jax.Array, value: jax.Array, first: jax.Array, last: jax.Array
) -> jax.Array:
    """Computes the attention of one block of queries after the other.

    Args:
      query: [blocks, B, K, G, Q, N], where G query heads share a KV head.
      key, value: [B, K, S, N].
      first, last: int32[blocks, B, Q], the first and the last key that each query sees.

    Returns:
      As `query`.
    """
    return _attend_forward(query, key, value, first, last)[0]


def _attend_forward(
    query: jax.Array, key: jax.Array, value: jax.Array, first: jax.Array, last: jax.Array
) -> tuple[jax.Array, Arrays]:
    wide = jnp.promote_types(query.dtype, jnp.float32)

    def block(inputs: Arrays) -> tuple[jax.Array, jax.Array]:
        query, first, last = inputs

        def add(index: jax.Array, sums: Arrays) -> Arrays:
            largest, total, mixed = sums
            keys, values = (_block_of(x, index) for x in (key, value))
            scores = _scores(query, keys, index, first, last)
            new = jnp.maximum(largest, jnp.max(scores, axis=-1))
            weights, fade = jnp.exp(scores - new[..., None]), jnp.exp(largest - new)
            total = total * fade + jnp.sum(weights, axis=-1)
            added = _einsum("bkgqt,bktn->bkgqn", weights.astype(value.dtype), values)
            return new, total, mixed * fade[..., None] + added

        least = jnp.full(query.shape[:-1], jnp.finfo(wide).min, wide)
        sums = least, jnp.zeros_like(least), jnp.zeros(query.shape, wide)
        largest, total, mixed = jax.lax.fori_loop(*_seen_blocks(first, last), add, sums)
        return (mixed / total[..., None]).astype(query.dtype), largest + jnp.log(total)

    output, log_sum = jax.lax.map(block, (query, first, last))
    output, log_sum = checkpoint_name(output, "context"), checkpoint_name(log_sum, "context")
    return output, (query, key, value, first, last, output, log_sum)


def _attend_backward(residuals: Arrays, gradient: jax.Array) -> tuple[jax.Array | None, ...]:
    query, key, value, first, last, output, log_sum = residuals
    wide = log_sum.dtype
    scale = 1 / math.sqrt(query.shape[-1])

    def block(sums: Arrays, inputs: Arrays) -> tuple[Arrays, jax.Array]:
        query, first, last, output, log_sum, gradient = inputs
        means = jnp.sum(gradient.astype(wide) * output.astype(wide), axis=-1, keepdims=True)

        def add(index: jax.Array, sums: Arrays) -> Arrays:
            of_query, of_key, of_value = sums
            keys, values = (_block_of(x, index) for x in (key, value))
            scores = _scores(query, keys, index, first, last)
            weights = jnp.exp(scores - log_sum[..., None])
            of_weights = _einsum("bkgqn,bktn->bkgqt", gradient, values)
            slope = (weights * (of_weights - means) * scale).astype(query.dtype)
            weights = weights.astype(query.dtype)
            of_query = of_query + _einsum("bkgqt,bktn->bkgqn", slope, keys)
            of_key = _add_block(of_key, index, _einsum("bkgqt,bkgqn->bktn", slope, query))
            of_value = _add_block(of_value, index, _einsum("bkgqt,bkgqn->bktn", weights, gradient))
            return of_query, of_key, of_value

        sums = (jnp.zeros(query.shape, wide), *sums)
        of_query, *sums = jax.lax.fori_loop(*_seen_blocks(first, last), add, sums)
        return tuple(sums), of_query.astype(query.dtype)

    zeros: Arrays = jnp.zeros(key.shape, wide), jnp.zeros(value.shape, wide)
    inputs: Arrays = query, first, last, output, log_sum, gradient
    (of_key, of_value), of_query = jax.lax.scan(block, zeros, inputs)
    return of_query, of_key.astype(key.dtype), of_value.astype(value.dtype), None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _seen_blocks(first: jax.Array, last: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the range of the blocks of keys that some query of a block sees."""
    return jnp.min(first) // BLOCK, jnp.max(last) // BLOCK + 1


def _scores(
    query: jax.Array, keys: jax.Array, index: jax.Array, first: jax.Array, last: jax.Array
) -> jax.Array:
    """Returns the scores [B, K, G, Q, T] of a block of keys, -inf where a query does not see."""
    scores = _einsum("bkgqn,bktn->bkgqt", query, keys) / math.sqrt(query.shape[-1])
    places = index * BLOCK + jnp.arange(BLOCK)
    visible = (places >= first[..., None]) & (places <= last[..., None])
    return jnp.where(visible[:, None, None], scores, -jnp.inf)


def _block_of(array: jax.Array, index: jax.Array) -> jax.Array:
    """[B, K, S, N] -> the block [B, K, T, N]."""
    return jax.lax.dynamic_slice_in_dim(array, index * BLOCK, BLOCK, axis=2)


def _add_block(total: jax.Array, index: jax.Array, block: jax.Array) -> jax.Array:
    """Adds a block [B, K, T, N] in its place of [B, K, S, N]."""
    block = block + _block_of(total, index)
    return jax.lax.dynamic_update_slice_in_dim(total, block, index * BLOCK, axis=2)


def _einsum(subscripts: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """Multiplies with sums in float32 or wider."""
    wide = jnp.promote_types(left.dtype, jnp.float32)
    return jnp.einsum(subscripts, left, right, preferred_element_type=wide)
