"""Builds every mesh, from the devices that the caller passes."""

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from moi_jax import config as config_lib
from moi_jax.common.errors import UserError
from moi_jax.parallel.axes import MESH_AXES


def make_mesh(config: config_lib.Mesh, devices: Sequence[jax.Device]) -> Mesh:
    """Makes the mesh of the config from the first of these devices, in their order.

    Args:
      devices: the devices of all hosts, such as `jax.devices()`, or of an abstract topology.

    Raises:
      UserError: the mesh does not fit the number of devices, or has an axis that is not built.
    """
    if config.context != 1:
        raise UserError(f"mesh.context {config.context} is not built yet; use 1")
    wanted = {axis: getattr(config, axis) for axis in MESH_AXES}
    sizes = list(wanted.values())
    if -1 in sizes:
        known = -math.prod(sizes)
        sizes[sizes.index(-1)] = len(devices) // known
    needed = math.prod(sizes)
    # A mesh without -1 may use fewer devices than there are; a mesh with -1 must use all.
    if needed > len(devices) or needed == 0 or (-1 in wanted.values() and needed < len(devices)):
        raise UserError(
            f"mesh {wanted} does not fit {len(devices)} {devices[0].platform} devices; set "
            f"axes whose product is the number of devices"
        )
    # Auto axes, because explicit axes (jax's default) reject the gather from a sharded embedding.
    return jax.make_mesh(
        sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices[:needed]
    )


def parse_mesh(text: str) -> config_lib.Mesh:
    """Parses a mesh such as "fsdp=2,tensor=4"; an axis that is not named has size 1.

    Raises:
      UserError: the text is not a mesh.
    """
    sizes = dict.fromkeys(MESH_AXES, 1)
    seen = set()
    for part in text.split(","):
        axis, _, number = (piece.strip() for piece in part.partition("="))
        if axis not in sizes or axis in seen or not number.removeprefix("-").isdecimal():
            raise _not_a_mesh(text)
        seen.add(axis)
        sizes[axis] = int(number)
    try:
        return config_lib.Mesh(**sizes)
    except ValueError:
        raise _not_a_mesh(text) from None


def _not_a_mesh(text: str) -> UserError:
    return UserError(
        f"--mesh {text!r} is not a mesh; write sizes of the axes {', '.join(MESH_AXES)}, each at "
        f"most once, as in fsdp=2,tensor=4 (one of them may be -1: all remaining devices)"
    )
