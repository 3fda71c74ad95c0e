"""How the parameters lie on a mesh: a table of all of them, and what the mesh does not divide."""

import logging
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
from jax.typing import DTypeLike
from rich.table import Table

from moi_jax.checkpoints.experiment import open_experiment
from moi_jax.common.log import LogTable
from moi_jax.config import Config
from moi_jax.models.compute import resolve_dtypes
from moi_jax.models.config import ModelConfig
from moi_jax.models.lora import adapted
from moi_jax.models.parameters import parameter_specs
from moi_jax.models.presets import preset
from moi_jax.models.trained import Trained, trained_parameters
from moi_jax.parallel.axes import MESH_AXES, RULES, split_axes
from moi_jax.parallel.mesh import mesh_sizes

log = logging.getLogger(__name__)

Sizes = Mapping[str, int]  # mesh axis -> its size


class ParameterSharding(NamedTuple):
    """How one parameter is split.

    Attributes:
      axes: the logical axis of each dimension.
      split: the mesh axes over which each dimension is split.
      shard: the shape on one device.
      undivided: (logical axis, its size, mesh axis) where the rules ask for a split, but the mesh
        axis does not divide the size.
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    split: tuple[tuple[str, ...], ...]
    shard: tuple[int, ...]
    undivided: tuple[tuple[str, int, str], ...]


def split_parameters(model: ModelConfig, sizes: Sizes) -> list[ParameterSharding]:
    """Returns the sharding of every parameter on a mesh of these sizes; no device is needed."""
    return [
        _split(path, spec.shape, spec.axes, sizes) for path, spec in parameter_specs(model).items()
    ]


def _split(
    path: str, shape: tuple[int, ...], axes: tuple[str | None, ...], sizes: Sizes
) -> ParameterSharding:
    split = split_axes(axes, shape, sizes)
    undivided = [
        (axis, size, mesh_axis)
        for axis, size, part in zip(axes, shape, split, strict=True)
        for mesh_axis in RULES.get(axis or "", ())
        if axis and sizes[mesh_axis] > 1 and mesh_axis not in part
    ]
    parts = [math.prod(sizes[mesh_axis] for mesh_axis in part) for part in split]
    shard = tuple(size // part for size, part in zip(shape, parts, strict=True))
    return ParameterSharding(path, shape, axes, tuple(split), shard, tuple(undivided))


def sharding_table(model: ModelConfig, sizes: Sizes, dtype: DTypeLike, trained: Trained) -> Table:
    """Returns a table of all parameters: what they are split over, and the bytes on a device.

    It also tells which are trained, or which layers of them.

    Args:
      dtype: of the parameters but for adapters.
    """
    mesh = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
    table = Table(title=f"Parameters on {mesh}, {dtype}", title_justify="left", show_footer=True)
    parameters, specs = split_parameters(model, sizes), parameter_specs(model)
    held = {p.path: math.prod(p.shard) * specs[p.path].dtype(dtype).itemsize for p in parameters}
    on_device = sum(held.values())
    for name in ("parameter", "shape", "logical axes", "split over", "trained"):
        table.add_column(name, "all" if name == "parameter" else "")
    table.add_column("bytes a device", f"{on_device:,}", justify="right")
    for p in parameters:
        table.add_row(
            p.path,
            " x ".join(map(str, p.shape)),
            ", ".join(axis or "-" for axis in p.axes),
            ", ".join(" x ".join(part) or "-" for part in p.split),
            trained.described(p.path),
            f"{held[p.path]:,}",
        )
    return table


def undivided_line(model: ModelConfig, sizes: Sizes) -> str | None:
    """Returns one line that names what the mesh should split, but does not divide, if anything."""
    found: dict[tuple[str, int, str], list[str]] = {}
    for p in split_parameters(model, sizes):
        for what in p.undivided:
            found.setdefault(what, []).append(p.path)
    if not found:
        return None
    parts = [
        f"{axis} {size} over {mesh_axis} {sizes[mesh_axis]} ({', '.join(paths)})"
        for (axis, size, mesh_axis), paths in found.items()
    ]
    return (
        f"the mesh does not divide {'; '.join(parts)}: the devices along such an axis do not share "
        f"this dimension"
    )


def print_sharding(config: Config) -> None:
    """Prints the table of a config, and what its mesh does not divide.

    Devices are looked at only where an axis of the mesh is -1.

    Raises:
      UserError: the mesh does not fit the devices, the model cannot be opened, or a pattern of
        optimizer.frozen does not fit it.
    """
    named = config.model.preset
    model = adapted(preset(named), config.lora) if named else open_experiment(config).model
    trained = trained_parameters(model, config.optimizer.frozen)
    sizes = {axis: getattr(config.mesh, axis) for axis in MESH_AXES}
    dtype = resolve_dtypes(config, "tpu").param_dtype  # as on any accelerator
    if -1 in sizes.values():
        devices = jax.devices()
        sizes = mesh_sizes(config.mesh, len(devices), devices[0].platform)
        dtype = resolve_dtypes(config, devices[0].platform).param_dtype
    print(LogTable(sharding_table(model, sizes, dtype, trained)))
    if line := undivided_line(model, sizes):
        print(line)
