"""Logical axes and the mesh axes that hold them: the one page of sharding.

Every mesh has the axes data (replicas), fsdp (replicas of the batch, shards of the
parameters), tensor (heads, MLP width, vocabulary).
"""

from collections.abc import Sequence

import jax
from jax.sharding import PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis: the mesh axes it is split over, outermost first. Names not listed are whole.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "sequence": (),  # the tokens of a row; context parallelism will split them
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    # The head's vocabulary, and that of the logits: split over the axis that holds the other
    # parameters too, so that the head's gradient is never whole on a device. A tied head comes
    # there from (vocab, embed) by one all-to-all over fsdp: tensor stays the outer axis.
    "head_vocab": ("tensor", "fsdp"),
    "logits_batch": ("data",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
}


def partition_spec(
    axes: Sequence[str | None], shape: Sequence[int], mesh_shape: dict[str, int]
) -> PartitionSpec:
    """How an array with these logical axes lies on a mesh.

    A mesh axis that does not divide the dimension (with those before it) is left out: the
    array is then whole along it, correct, only larger.
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
    """Keeps an activation on the current mesh by its logical axes; nothing without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    spec = partition_spec(axes, x.shape, dict(mesh.shape))
    return jax.lax.with_sharding_constraint(x, spec)
