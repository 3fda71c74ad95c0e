"""Replicas: the axis `data` holds each part of the state on several hosts, which lend it."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moi_jax.common.errors import UserError


def check_replicas(mesh: Mesh) -> None:
    """Raises UserError if a part of the state is on one host alone, so that it could be lost."""
    processes = np.vectorize(lambda device: device.process_index)(mesh.devices)
    if (processes == processes[:1]).all(axis=0).any():
        raise UserError(
            "checkpoint.local_every: mesh.data must be at least 2 across hosts, so that every part "
            "of the state is held by two hosts; set mesh.data to a multiple of the number of "
            "hosts, or checkpoint.local_every to null"
        )


def from_replicas(
    shards: Mapping[jax.Device, np.ndarray], devices: Sequence[jax.Device], size: int, mesh: Mesh
) -> dict[jax.Device, np.ndarray]:
    """Adds the shards that devices lack: those of other devices along the axis `data`.

    They travel as integers, since a sum of floats would make 0.0 of -0.0. All processes call it.

    Args:
      shards: uint8[size] of the devices of this process that have theirs.
      devices: all devices of this process on the mesh.
    """

    def padded(device: jax.Device) -> np.ndarray:
        words = np.zeros(-(-size // 4), np.uint32)
        if device in shards:
            words.view(np.uint8)[:size] = shards[device]
        return words.reshape(*(1 for _ in mesh.axis_names), -1)

    given = [jax.device_put(padded(device), device) for device in devices]
    split = NamedSharding(mesh, PartitionSpec(*mesh.axis_names))
    shape = (*mesh.devices.shape, -(-size // 4))
    stacked = jax.make_array_from_single_device_arrays(shape, split, given)
    filled = _over_data(mesh)(stacked)
    return {
        shard.device: np.array(shard.data).reshape(-1).view(np.uint8)[:size]
        for shard in filled.addressable_shards
    }


@cache
def _over_data(mesh: Mesh) -> Any:
    """Words of all devices -> their maximum along `data`: each has zeros, or the same words."""
    split = NamedSharding(mesh, PartitionSpec(*mesh.axis_names[1:]))
    return jax.jit(lambda words: words.max(axis=0), out_shardings=split)
