"""Builds every mesh, from the devices that the caller passes."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh

from moi_jax import config as config_lib
from moi_jax.common.errors import UserError
from moi_jax.parallel.axes import MESH_AXES


def make_mesh(config: config_lib.Mesh, devices: Sequence[jax.Device]) -> Mesh:
    """Makes the mesh of the config from the first of these devices, in their order.

    The devices of several TPU slices, which only the data center's network connects, are split
    along data, the outermost axis. All other axes stay within a slice.

    Args:
      devices: the devices of all hosts, such as `jax.devices()`, or of an abstract topology.

    Raises:
      UserError: the mesh does not fit the number of devices, or that of the slices.
    """
    sizes = mesh_sizes(config, len(devices), devices[0].platform)
    slices = _slices(devices[: math.prod(sizes.values())])
    if sizes["data"] % len(slices) or len({len(of_slice) for of_slice in slices}) > 1:
        raise UserError(
            f"mesh {sizes} does not fit {len(slices)} slices of "
            f"{' and '.join(str(len(of_slice)) for of_slice in slices)} chips: data is split over "
            f"the slices; set mesh.data to a multiple of {len(slices)}"
        )
    shape = [sizes["data"] // len(slices), *list(sizes.values())[1:]]
    # Slice by slice. A mesh axis may be a part of a physical axis: data=2 on 4x4x4 chips.
    arrays = [
        create_device_mesh(shape, of_slice, allow_split_physical_axes=True) for of_slice in slices
    ]
    # Auto axes, because explicit axes (jax's default) reject the gather from a sharded embedding.
    auto = (AxisType.Auto,) * len(MESH_AXES)
    return Mesh(np.concatenate(arrays), MESH_AXES, axis_types=auto)


def mesh_sizes(config: config_lib.Mesh, count: int, platform: str) -> dict[str, int]:
    """The size of each axis on `count` devices, in the order of MESH_AXES.

    A mesh without -1 may use fewer devices than there are; a mesh with -1 must use all.

    Raises:
      UserError: the mesh does not fit the number of devices.
    """
    sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
    wanted = dict(sizes)
    for axis, size in wanted.items():
        if size == -1:
            sizes[axis] = count // -math.prod(wanted.values())
    needed = math.prod(sizes.values())
    if needed > count or needed == 0 or (-1 in wanted.values() and needed < count):
        raise UserError(
            f"mesh {wanted} does not fit {count} {platform} devices; set axes whose product is the "
            f"number of devices"
        )
    return sizes


def _slices(devices: Sequence[jax.Device]) -> list[list[jax.Device]]:
    """The devices by TPU slice. GPUs have a slice_index too, which tells their host."""
    slices: dict[int, list[jax.Device]] = {}
    for device in devices:
        number = getattr(device, "slice_index", 0) if device.platform == "tpu" else 0
        slices.setdefault(number, []).append(device)
    return [slices[number] for number in sorted(slices)]


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
