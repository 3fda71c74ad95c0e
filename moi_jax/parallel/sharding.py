"""Every mesh is built here, and everything that lies on one gets its sharding here."""

import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moi_jax.common.errors import UserError
from moi_jax.config import schema as config_lib
from moi_jax.data.loader import Batch
from moi_jax.models.config import ModelConfig
from moi_jax.models.parameters import Tree, map_parameters
from moi_jax.parallel import axes

AXES = ("data", "fsdp", "tensor")


def make_mesh(config: config_lib.Mesh) -> Mesh:
    """The mesh of the config over this machine's devices (all hosts' when distributed).

    Raises:
      UserError: the axes need another number of devices than there are.
    """
    devices = jax.devices()
    sizes = [config.data, config.fsdp, config.tensor]
    if -1 in sizes:
        known = -math.prod(sizes)
        sizes[sizes.index(-1)] = len(devices) // known
    needed = math.prod(sizes)
    # Fewer than there are is a choice when every axis is named; -1 always asks for all.
    wanted = dict(zip(AXES, (config.data, config.fsdp, config.tensor), strict=True))
    if needed > len(devices) or needed == 0 or (-1 in wanted.values() and needed < len(devices)):
        raise UserError(
            f"mesh {wanted} does not fit {len(devices)} {devices[0].platform} devices; the "
            f"product of the axes must be their number"
        )
    # Auto axes: explicit ones, jax's default, reject the gather from a sharded embedding.
    return jax.make_mesh(
        sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[:needed]
    )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def parameter_shardings(config: ModelConfig, mesh: Mesh) -> Tree:
    """The tree of shardings of the parameters, from their logical axes."""
    shape = dict(mesh.shape)
    return map_parameters(
        config,
        lambda _, p: NamedSharding(mesh, axes.partition_spec(p.axes, p.shape, shape)),
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays [A, M, S]: A microbatches, M rows split over the replicas, S tokens."""
    return NamedSharding(mesh, PartitionSpec(None, axes.RULES["batch"], None))


def check_rows(rows: int, mesh: Mesh, name: str) -> None:
    """Raises UserError when the rows of a (micro)batch do not divide over the mesh."""
    replicas = math.prod(mesh.shape[axis] for axis in axes.RULES["batch"])
    if rows % replicas:
        raise UserError(
            f"{name} {rows} is no multiple of the {replicas} batch shards of the mesh "
            f"(data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']}); use "
            f"{-(-rows // replicas) * replicas} or set mesh.tensor"
        )


def local_rows(rows: int, microbatch_rows: int, mesh: Mesh) -> np.ndarray:
    """Which rows of a global batch this host's devices hold, ascending."""
    count = rows // microbatch_rows
    indices = batch_sharding(mesh).addressable_devices_indices_map((count, microbatch_rows, 1))
    held = {
        row
        for index in indices.values()
        if index is not None
        for row in range(*index[1].indices(microbatch_rows))
    }
    within = np.array(sorted(held))
    return (np.arange(count)[:, None] * microbatch_rows + within).reshape(-1)


def place_batch(batch: Batch, rows: np.ndarray, microbatch_rows: int, mesh: Mesh) -> Batch:
    """Host arrays [rows held here, S] -> global arrays [A, M, S] on the mesh.

    `rows` are the batch rows the arrays hold, as `local_rows` gives them. Any layout of
    devices asks for the rows it holds, so nothing here knows the number of hosts.
    """
    sharding = batch_sharding(mesh)
    within = np.unique(rows % microbatch_rows)
    count = len(rows) // len(within)

    def place(array: np.ndarray) -> jax.Array:
        held = array.reshape(count, len(within), -1)

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            wanted = range(*index[1].indices(microbatch_rows))
            return held[index[0], np.searchsorted(within, wanted), :][..., index[2]]

        shape = (count, microbatch_rows, array.shape[-1])
        return jax.make_array_from_callback(shape, sharding, part)

    return Batch(*map(place, batch))
