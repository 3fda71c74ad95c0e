"""The sharding rules: which mesh axes each logical axis is split over.

Every mesh has four axes: data (splits the batch), fsdp (splits the batch and the parameters),
tensor (splits heads, MLP width and vocabulary), context (splits the tokens of a row, and the
parameters like fsdp).
"""

from collections.abc import Sequence

import jax
from jax.sharding import PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor", "context")

# Logical axis -> the mesh axes it is split over, outermost first. An axis not named is not split.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "sequence": ("context",),  # the tokens of a row, in the order of parallel/context.py
    "embed": ("fsdp", "context"),
    "vocab": ("tensor",),
    # The vocabulary of the head and of the logits. It is also split over fsdp and context, so that
    # no device holds the whole gradient of the head. A tied head gets there from (vocab, embed) by
    # one all-to-all over these two, because tensor stays the outer axis.
    "head_vocab": ("tensor", "fsdp", "context"),
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
    before it). The array is then not split over it, which is correct but takes more memory. It is
    also left out if an earlier dimension is split over it.
    """
    spec: list[tuple[str, ...] | None] = []
    used: set[str] = set()
    for axis, size in zip(axes, shape, strict=True):
        chosen: list[str] = []
        parts = 1
        for mesh_axis in RULES.get(axis or "", ()):
            count = mesh_shape.get(mesh_axis, 1)
            if count > 1 and mesh_axis not in used and size % (parts * count) == 0:
                chosen.append(mesh_axis)
                used.add(mesh_axis)
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
