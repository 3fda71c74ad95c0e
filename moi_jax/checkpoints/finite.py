"""Refusing a checkpoint with NaN or infinity in its arrays."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from moi_jax.common.errors import UserError
from moi_jax.models.decoder import Tree

# The flags of a large tensor would take a quarter of its own memory.
BLOCK = 1 << 22
USE_ANOTHER = (
    "use another checkpoint (a run resumes from the one before when this directory is moved "
    "elsewhere)"
)


def check_finite(step: Path, tree: Tree, item: str, advice: str = USE_ANOTHER) -> None:
    """Raises UserError with the first array of a restored item that has NaN or infinity.

    Each device reads its own shards once.

    Args:
      advice: what the user can do.
    """
    for path, finite in jax.tree_util.tree_leaves_with_path(jax.device_get(_all_finite(tree))):
        if not finite:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise _not_finite(step, f"{item}/{name}", advice)


@jax.jit
def _all_finite(tree: Tree) -> Tree:
    return jax.tree.map(lambda array: jnp.isfinite(array).all(), tree)


def check_finite_array(step: Path, array: np.ndarray, name: str) -> None:
    """Raises UserError if a parameter in host memory has NaN or infinity."""
    if count_not_finite(array):
        raise _not_finite(step, f"parameters/{name}")


def count_not_finite(array: np.ndarray) -> int:
    """How many values are NaN or infinite."""
    flat = array.reshape(-1)
    return sum(
        int(np.count_nonzero(~np.isfinite(flat[start : start + BLOCK])))
        for start in range(0, len(flat), BLOCK)
    )


def _not_finite(step: Path, name: str, advice: str = USE_ANOTHER) -> UserError:
    return UserError(f"{step}: {name} has values that are NaN or infinite; {advice}")
