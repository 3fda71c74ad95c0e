"""Every mesh is built here, from the devices that the caller hands in."""

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from moi_jax import config as config_lib
from moi_jax.common.errors import UserError
from moi_jax.parallel.axes import MESH_AXES


def make_mesh(config: config_lib.Mesh, devices: Sequence[jax.Device]) -> Mesh:
    """The mesh of the config over the first of these devices, in their order.

    Args:
      devices: those of all hosts, such as `jax.devices()`, or a described topology's.

    Raises:
      UserError: the axes need another number of devices than there are.
    """
    sizes = [config.data, config.fsdp, config.tensor]
    if -1 in sizes:
        known = -math.prod(sizes)
        sizes[sizes.index(-1)] = len(devices) // known
    needed = math.prod(sizes)
    # Fewer than there are is a choice when every axis is named; -1 always asks for all.
    wanted = dict(zip(MESH_AXES, (config.data, config.fsdp, config.tensor), strict=True))
    if needed > len(devices) or needed == 0 or (-1 in wanted.values() and needed < len(devices)):
        raise UserError(
            f"mesh {wanted} does not fit {len(devices)} {devices[0].platform} devices; the "
            f"product of the axes must be their number"
        )
    # Auto axes: explicit ones, jax's default, reject the gather from a sharded embedding.
    return jax.make_mesh(
        sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices[:needed]
    )


def parse_mesh(text: str) -> config_lib.Mesh:
    """The axes of "fsdp=2,tensor=4"; an axis that is not named has 1 device.

    Raises:
      UserError: the text is no mesh.
    """
    sizes = dict.fromkeys(MESH_AXES, 1)
    seen = set()
    for part in text.split(","):
        axis, _, number = (piece.strip() for piece in part.partition("="))
        if axis not in sizes or axis in seen or not number.removeprefix("-").isdecimal():
            raise _no_mesh(text)
        seen.add(axis)
        sizes[axis] = int(number)
    try:
        return config_lib.Mesh(**sizes)
    except ValueError:
        raise _no_mesh(text) from None


def _no_mesh(text: str) -> UserError:
    return UserError(
        f"--mesh {text!r} is no mesh; write the number of devices along {', '.join(MESH_AXES)}, "
        f"each once at most, as fsdp=2,tensor=4 (-1, for one of them, is all the rest)"
    )
