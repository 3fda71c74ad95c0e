"""What the kernels share: they run on the rows and heads of a device, whose rows they pad."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from moi_jax.parallel.axes import partition_spec
from moi_jax.parallel.context import context_order

# Attention of one device: query [B, T, H, N], its own tokens of each row, in which there are S; key
# and value [B, S, K, N]; segment_ids int32[B, S] -> [B, T, H, N].
LocalAttention = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def attend_on_mesh(
    local: LocalAttention,
    mesh: Mesh | None,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array,
) -> jax.Array:
    """Computes `local` for the rows, heads and queries that each device holds.

    XLA cannot partition a kernel by itself. Rows and heads need nothing from one another, so a
    device computes its own and nothing is communicated. Where a context axis splits the rows, a
    device gathers their keys and values. What does not divide over the mesh is computed by each
    device.

    Args:
      mesh: the mesh that the arrays are laid out on; None means one device.
      query: [B, S, H, N]; key, value: [B, S, K, N]; segment_ids: int32[B, S].

    Returns:
      [B, S, H, N] in the query's dtype.
    """
    if mesh is None:
        return local(query, key, value, segment_ids)
    sizes = dict(mesh.shape)
    of_query = partition_spec(("batch", "sequence", "heads", None), query.shape, sizes)
    of_key = partition_spec(("batch", None, "kv_heads", None), key.shape, sizes)
    if of_query[2] != of_key[2]:
        # The query heads are split and the KV heads do not divide. Each query head gets its own
        # copy of its KV head, so that a device has the ones that its query heads need.
        group = query.shape[2] // key.shape[2]
        key, value = (jnp.repeat(heads, group, axis=2) for heads in (key, value))
    of_key = PartitionSpec(of_query[0], None, of_query[2], None)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(of_query, of_key, of_key, PartitionSpec(of_query[0], None)),
        out_specs=of_query,
        check_vma=False,  # the kernels do not say which mesh axes their outputs vary over
    )(query, key, value, segment_ids)


def pad_rows(multiple: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Appends zeros to arrays [B, S, ...] until S is a multiple.

    No token of a row sees what is added behind it, and its gradient is zero.
    """
    count = -arrays[0].shape[1] % multiple
    return tuple(
        jnp.pad(array, [(0, 0), (0, count)] + [(0, 0)] * (array.ndim - 2)) for array in arrays
    )


def part_of_device(array: jax.Array, shards: int, axis: int) -> jax.Array:
    """Returns the part of an array that belongs to this device's place on the context axis."""
    if shards == 1:
        return array
    size = array.shape[axis] // shards
    return jax.lax.dynamic_slice_in_dim(array, jax.lax.axis_index("context") * size, size, axis)


def in_order(array: jax.Array, shards: int) -> jax.Array:
    """Puts the tokens of [B, S, ...], which lie as they are split, into the order of the row."""
    if shards == 1:
        return array
    chunks = array.reshape(array.shape[0], 2 * shards, -1, *array.shape[2:])
    return chunks[:, np.argsort(context_order(2 * shards, shards))].reshape(array.shape)


def segment_starts(segment_ids: jax.Array) -> jax.Array:
    """Returns the place of the first token of each token's run of equal ids, int32[B, S]."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    first = jnp.pad(changes, ((0, 0), (1, 0)), constant_values=True)
    return jax.lax.cummax(jnp.where(first, index, 0), axis=1)
