"""The base of adapters: the parameters that a checkpoint of adapters needs from another one."""

from pathlib import Path

import jax
import jax.numpy as jnp

from moi_jax.checkpoints.items import Base, find_step
from moi_jax.common.errors import UserError
from moi_jax.common.fingerprint import json_fingerprint
from moi_jax.models.decoder import Tree

# Of xxHash: by them the places of values along each axis are told apart.
PRIMES = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1)
EXPONENT = 0x7F80  # of a bfloat16


class OtherBase(UserError):
    """The parameters at a place are not those that adapters were trained beside."""


def find_base(step: Path, base: Base, given: Path | None) -> Path:
    """The step with the base of the adapters in `step`: `given`, or where it was in training.

    Raises:
      UserError: it is not there.
    """
    if given is None and not Path(base.path).is_dir():
        raise UserError(
            f"{step} holds adapters alone, and their base {base.name} is not at {base.path} any "
            f"more; name a copy or the published weights: --base, base= of load, or "
            f"model.init_from of a run"
        )
    return find_step(given or Path(base.path)).absolute()


def check_base(step: Path, base: Base, place: Path, fingerprint: str) -> None:
    """Raises OtherBase where the parameters at `place` are not those that were trained beside."""
    if fingerprint != base.fingerprint:
        raise OtherBase(
            f"{place} is not the base of the adapters in {step} (fingerprint {fingerprint}, theirs "
            f"is {base.fingerprint}); give {base.name}, from which they were trained"
        )


def tree_fingerprint(parameters: Tree) -> str:
    """The fingerprint of parameters on devices; the same on every mesh and in every copy.

    It tells models apart, and proves nothing against intent.
    """
    sums = jax.device_get(jax.jit(lambda tree: jax.tree.map(bits_sum, tree))(parameters))
    return json_fingerprint(
        {
            jax.tree_util.keystr(path, simple=True, separator="."): int(value)
            for path, value in jax.tree_util.tree_leaves_with_path(sums)
        }
    )


def bits_sum(array: jax.Array) -> jax.Array:
    """uint32[]: the bits of the values, each times a number of its place, modulo 2^32.

    The values count as bfloat16, so that a base that is read in float32 has the fingerprint that
    it has in bfloat16. Devices differ in what they do with values too small for a full exponent;
    these count as zero. A sum of integers does not depend on its order.
    """
    bits = jax.lax.bitcast_convert_type(array.astype(jnp.bfloat16), jnp.uint16)
    bits = jnp.where(bits & EXPONENT, bits, 0)
    place = jnp.ones(array.shape, jnp.uint32)
    for axis in range(array.ndim):
        along = jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
        place += along * jnp.uint32(PRIMES[axis])
    place = (place ^ (place >> 16)) * jnp.uint32(PRIMES[0]) | 1
    return jnp.sum(bits.astype(jnp.uint32) * place, dtype=jnp.uint32)
