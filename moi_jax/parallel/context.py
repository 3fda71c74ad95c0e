"""The order in which a row lies on the context axis, balanced for causal attention.

Everything that works token by token, or compares positions and segment ids, needs no change for
it: embedding, rotary angles, the XLA attention, the losses. What needs a place in the row looks it
up in `context_places`.
"""

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from moi_jax.common.errors import UserError


def context_shards(mesh: Mesh | AbstractMesh | None) -> int:
    """Returns the number of parts into which the tokens of a row are split; 1 without a mesh."""
    return 1 if mesh is None or mesh.empty else mesh.shape.get("context", 1)


def context_order(sequence: int, shards: int) -> np.ndarray:
    """Returns int[S]: which token of a row stands at each place of the row as it is split.

    A causal token has work in proportion to the tokens before it, so equal runs of tokens would
    leave the first device idle. The row is therefore cut into 2c chunks for c shards. Shard i
    holds chunks i and 2c-1-i, in this order, and each shard then has the same work. Llama 3 (Dubey
    et al., 2024, section 3.3.2) does so too; it is known as the dual chunk swap.

    Args:
      sequence: S, a multiple of 2c where c > 1, see `check_sequence` and `padded_length`.
      shards: c, the size of the context axis; for 1, the order is that of the row.
    """
    if shards == 1:
        return np.arange(sequence)
    chunks = np.arange(sequence).reshape(2 * shards, -1)
    return np.stack([chunks[:shards], chunks[: shards - 1 : -1]], axis=1).reshape(-1)


def context_places(sequence: int, shards: int) -> np.ndarray:
    """Returns int[S]: the place at which each token stands in the padded row as it is split."""
    return np.argsort(context_order(padded_length(sequence, shards), shards))[:sequence]


def padded_length(sequence: int, shards: int) -> int:
    """Rounds the length of a row up to one that can be split."""
    return sequence if shards == 1 else -(-sequence // (2 * shards)) * 2 * shards


def check_sequence(sequence: int, mesh: Mesh, name: str) -> None:
    """Raises UserError if rows of this length cannot be split over the mesh.

    Args:
      name: the key or the argument that gives the length, for the message.
    """
    shards = context_shards(mesh)
    if padded_length(sequence, shards) != sequence:
        raise UserError(
            f"{name} {sequence} is not a multiple of {2 * shards}: mesh.context {shards} cuts each "
            f"row into {2 * shards} equal chunks; use {padded_length(sequence, shards)} or change "
            f"mesh.context"
        )
