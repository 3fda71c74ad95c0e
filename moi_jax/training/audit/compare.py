"""Compares a replayed state with the one that was saved: bit for bit, or by how far they differ."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Comparison:
    """Two trees of arrays.

    Attributes:
      different: the names of the arrays whose bits differ.
      first: what the first of them differs in, in words; "" if there is none.
      worst, rms: the largest and the root mean square of all differences.
    """

    different: list[str]
    first: str
    worst: float
    rms: float


def compare(item: str, replayed: Any, saved: Any) -> Comparison:
    """Compares two trees of the same shapes and shardings, array by array.

    Args:
      item: the item of the checkpoint, for names.
    """
    found = jax.device_get(_differences(replayed, saved))
    leaves = jax.tree_util.tree_leaves_with_path(replayed)
    paths = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    names = [f"{item}/{path}" for path in paths]
    flags, worst, squares = (list(column) for column in zip(*found, strict=True))
    different = [index for index, flag in enumerate(flags) if flag]
    first = ""
    if different:
        index = different[0]
        arrays = leaves[index][1], jax.tree.leaves(saved)[index]
        first = _describe(names[index], *map(jax.device_get, arrays))
    values = sum(leaf.size for _, leaf in leaves)
    return Comparison(
        [names[index] for index in different],
        first,
        float(np.max(worst)),
        float(np.sqrt(np.sum(squares) / values)),
    )


@jax.jit
def _differences(left: Any, right: Any) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
    """For each array: whether a bit differs, the largest difference, the sum of their squares."""

    def of_array(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        wide = jnp.promote_types(a.dtype, jnp.float32)
        difference = a.astype(wide) - b.astype(wide)
        worst = jnp.max(jnp.abs(difference))
        return jnp.any(_bits(a) != _bits(b)), worst, jnp.sum(jnp.square(difference))

    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return [of_array(a, b) for a, b in pairs]


def _bits(array: jax.Array) -> jax.Array:
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    return jax.lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}")


def _describe(name: str, replayed: np.ndarray, saved: np.ndarray) -> str:
    places = np.argwhere(replayed != saved)
    if not len(places):
        return f"{name} differs in the sign of a zero"
    place = tuple(places[0].tolist())
    return (
        f"{name} differs at {len(places):,} of {saved.size:,} values, first at {list(place)}: "
        f"saved {saved[place]}, replayed {replayed[place]}"
    )
