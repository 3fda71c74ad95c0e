"""The sharding rules: which mesh axes each logical axis is split over.

Every mesh has four axes: data (splits the batch), fsdp (splits the batch and the parameters),
tensor (splits heads, MLP width and vocabulary), context (splits the tokens of a row, and the
parameters like fsdp).
"""

import math
from collections.abc import Mapping, Sequence
from itertools import chain

import jax
from jax.sharding import PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor", "context")

# Logical axis -> the mesh axes it is split over, outermost first. An axis not named is not split.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "sequence": ("context",),  # the tokens of a row, in the order of parallel/context.py
    "embed": ("fsdp", "context"),
    "vocab": ("tensor",),
    # The vocabulary of the logits, and of the head while the loss is computed. It is also split
    # over fsdp and context, so that no device holds the whole gradient of the head. The head gets
    # there from (embed, vocab) by one all-to-all over these two: tensor stays the outer axis.
    "head_vocab": ("tensor", "fsdp", "context"),
    "logits_batch": ("data",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
}


def split_axes(
    axes: Sequence[str | None], shape: Sequence[int], mesh_shape: Mapping[str, int]
) -> list[tuple[str, ...]]:
    """Returns for each dimension of an array the mesh axes that split it, outermost first.

    A mesh axis is left out where it does not divide the dimension (together with the mesh axes
    before it), or where it splits an earlier dimension. A mesh axis that is left out everywhere
    splits `embed`, if it divides that. So the key kernel [D, K, N] of a model with fewer KV heads
    than tensor has devices is split along D, and no device holds it whole.

    Args:
      axes: one logical axis for each dimension; None is never split.
    """
    split: list[list[str]] = [[] for _ in axes]

    def split_over(place: int, mesh_axes: Sequence[str]) -> None:
        for mesh_axis in mesh_axes:
            parts = math.prod(mesh_shape.get(each, 1) for each in [*split[place], mesh_axis])
            is_free = not any(mesh_axis in chosen for chosen in split)
            if mesh_shape.get(mesh_axis, 1) > 1 and is_free and shape[place] % parts == 0:
                split[place].append(mesh_axis)

    asked = [RULES.get(axis or "", ()) for axis in axes]
    for place, mesh_axes in enumerate(asked):
        split_over(place, mesh_axes)
    if "embed" in axes:
        split_over(list(axes).index("embed"), list(chain.from_iterable(asked)))
    return [tuple(chosen) for chosen in split]


def partition_spec(
    axes: Sequence[str | None], shape: Sequence[int], mesh_shape: Mapping[str, int]
) -> PartitionSpec:
    """Returns the partition spec of an array with these logical axes, see `split_axes`."""
    return PartitionSpec(*(chosen or None for chosen in split_axes(axes, shape, mesh_shape)))


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
