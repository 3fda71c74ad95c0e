"""The order in which a row lies on the context axis, balanced for causal attention."""

import numpy as np

from moi_jax.common.errors import UserError


def context_order(sequence: int, shards: int) -> np.ndarray:
    """Returns int[S]: which token of a row stands at each place of the row as it is split.

    A causal token has work in proportion to the tokens before it, so equal runs of tokens would
    leave the first device idle. The row is therefore cut into 2c chunks for c shards. Shard i
    holds chunks i and 2c-1-i, in this order, and each shard then has the same work. Llama 3 (Dubey
    et al., 2024, section 3.3.2) does so too; it is known as the dual chunk swap.

    Args:
      sequence: S, a multiple of 2c where c > 1, see `check_sequence`.
      shards: c, the size of the context axis; for 1, the order is that of the row.
    """
    if shards == 1:
        return np.arange(sequence)
    chunks = np.arange(sequence).reshape(2 * shards, -1)
    return np.stack([chunks[:shards], chunks[: shards - 1 : -1]], axis=1).reshape(-1)


def check_sequence(sequence: int, shards: int, name: str) -> None:
    """Raises UserError if rows of this length cannot be split over the context axis.

    Args:
      name: the key or the argument that gives the length, for the message.
    """
    if shards > 1 and sequence % (2 * shards):
        raise UserError(
            f"{name} {sequence} is not a multiple of {2 * shards}, twice mesh.context {shards}: "
            f"each row is cut into {2 * shards} equal chunks; change one of the two"
        )
