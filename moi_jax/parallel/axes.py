"""The sharding rules: which mesh axes each logical axis is split over.

Every mesh has three axes: data (splits the batch), fsdp (splits the batch and the parameters),
tensor (splits heads, MLP width and vocabulary).
"""

import math
from collections.abc import Sequence
from functools import partial

import jax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis -> the mesh axes it is split over, outermost first. An axis not named is not split.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "sequence": (),  # the tokens of a row, not split: context parallelism is not built
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    # The vocabulary of the logits, and of the head while the loss is computed. It is also split
    # over fsdp, so that no device holds the whole gradient of the head. The head gets there from
    # (embed, vocab) by one all-to-all over fsdp, because tensor stays the outer axis.
    "head_vocab": ("tensor", "fsdp"),
    "logits_batch": ("data",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
}


def partition_spec(
    axes: Sequence[str | None], shape: Sequence[int], mesh_shape: dict[str, int]
) -> PartitionSpec:
    """Returns the partition spec of an array with these logical axes.

    A mesh axis is left out if it does not divide the dimension (together with the mesh axes
    before it). The array is then not split over it, which is correct but takes more memory.
    """
    spec: list[tuple[str, ...] | None] = []
    for axis, size in zip(axes, shape, strict=True):
        chosen: list[str] = []
        parts = 1
        for mesh_axis in RULES.get(axis or "", ()):
            count = mesh_shape.get(mesh_axis, 1)
            if count > 1 and size % (parts * count) == 0:
                chosen.append(mesh_axis)
                parts *= count
        spec.append(tuple(chosen) or None)
    return PartitionSpec(*spec)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains an activation to its sharding on the current mesh; does nothing without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    spec = partition_spec(axes, x.shape, dict(mesh.shape))
    return jax.lax.with_sharding_constraint(x, spec)


def shard_count(axis: str, size: int | None = None) -> int:
    """Returns into how many parts the current mesh splits a logical axis; 1 without a mesh.

    With `size` it is 1 if the parts do not divide that dimension.
    """
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else math.prod(mesh.shape[name] for name in RULES[axis])
    return parts if size is None or size % parts == 0 else 1


def in_layout(x: jax.Array, major_to_minor: tuple[int, ...], *axes: str | None) -> jax.Array:
    """Constrains each device's part of an array with these logical axes to an order in memory."""
    layout = partial(with_layout_constraint, layouts=Layout(major_to_minor=major_to_minor))
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return layout(x)
    # XLA does not split a constraint of the layout by itself: it would gather the whole array.
    spec = partition_spec(axes, x.shape, dict(mesh.shape))
    return jax.shard_map(layout, in_specs=spec, out_specs=spec, check_vma=False)(x)
