"""Places pytrees on a mesh: parameters by their logical axes, batches by rows and tokens."""

import math
from collections.abc import Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moi_jax.common.errors import UserError
from moi_jax.parallel.axes import RULES, partition_spec
from moi_jax.parallel.context import context_order, context_shards, padded_length

T = TypeVar("T")


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that is whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def named_sharding(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array of this shape with these logical axes."""
    return NamedSharding(mesh, partition_spec(axes, shape, dict(mesh.shape)))


def batch_shards(mesh: Mesh | None) -> int:
    """Returns the number of parts into which the rows of a batch are split; 1 without a mesh."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in RULES["batch"])


def round_up(rows: int, mesh: Mesh | None) -> int:
    """Rounds up to a number of rows that divides over the mesh."""
    shards = batch_shards(mesh)
    return -(-rows // shards) * shards


def check_rows(rows: int, mesh: Mesh, name: str) -> None:
    """Raises UserError if the rows of a (micro)batch do not divide over the mesh."""
    if rows % batch_shards(mesh):
        raise UserError(
            f"{name} {rows} is not a multiple of the {batch_shards(mesh)} batch shards of the mesh "
            f"(data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']}); use "
            f"{round_up(rows, mesh)} or set mesh.tensor"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays [A, M, S]: A microbatches of M rows, S tokens."""
    return NamedSharding(mesh, PartitionSpec(None, RULES["batch"], RULES["sequence"]))


def local_rows(rows: int, microbatch_rows: int, mesh: Mesh) -> np.ndarray:
    """Returns the rows of a global batch that this host's devices hold, in ascending order."""
    count = rows // microbatch_rows
    by_rows = NamedSharding(mesh, PartitionSpec(None, RULES["batch"]))
    indices = by_rows.addressable_devices_indices_map((count, microbatch_rows))
    held = {
        row
        for index in indices.values()
        if index is not None
        for row in range(*index[1].indices(microbatch_rows))
    }
    within = np.array(sorted(held))
    return (np.arange(count)[:, None] * microbatch_rows + within).reshape(-1)


def place_batch(batch: T, rows: np.ndarray, microbatch_rows: int, mesh: Mesh) -> T:
    """Places a pytree of host arrays [rows of this host, S] on the mesh as global arrays [A, M, S].

    `rows` are the batch rows that the arrays hold, as `local_rows` returns them. Each device
    takes what it holds of them, so this works for any number of hosts. The tokens of a row are in
    `context_order`, see `check_sequence`.
    """
    sharding = batch_sharding(mesh)
    within = np.unique(rows % microbatch_rows)
    count = len(rows) // len(within)
    shards = context_shards(mesh)

    def place(array: np.ndarray) -> jax.Array:
        ordered = array[:, context_order(array.shape[-1], shards)]
        held = ordered.reshape(count, len(within), -1)

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            wanted = range(*index[1].indices(microbatch_rows))
            return held[index[0], np.searchsorted(within, wanted), :][..., index[2]]

        shape = (count, microbatch_rows, array.shape[-1])
        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(place, batch)


def place_rows(rows: T, mesh: Mesh | None) -> T:
    """Splits a pytree of host arrays [B] or [B, S], which every host holds in full.

    The tokens of a row are in `context_order`, and rows end in zeros up to a length that the
    context axis divides.
    """
    if mesh is None:
        return rows
    shards = context_shards(mesh)

    def place(array: np.ndarray) -> jax.Array:
        spec = PartitionSpec(RULES["batch"])
        if array.ndim > 1:
            spec = PartitionSpec(RULES["batch"], RULES["sequence"])
            length = padded_length(array.shape[1], shards)
            array = np.pad(array, ((0, 0), (0, length - array.shape[1])))
            array = array[:, context_order(length, shards)]
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

    return jax.tree.map(place, rows)


def bucket(size: int, shortest: int, longest: int | None = None) -> int:
    """Rounds `size` up to `shortest` times a power of two, but to `longest` at most.

    There are then few sizes, and each size is one compilation.
    """
    width = shortest
    while width < size:
        width *= 2
    return width if longest is None else min(width, longest)


def length_bucket(tokens: int, shortest: int, longest: int) -> int:
    """Rounds up to `shortest` times 1, 2, 4, ... or 1.5, 3, 6, ..., but to `longest` at most.

    For lengths that cost much work. `shortest` is even.
    """
    return min(bucket(tokens, shortest, longest), bucket(tokens, 3 * shortest // 2, longest))
