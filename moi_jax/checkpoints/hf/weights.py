"""Published tensors to our parameters and back, by the table of the model's family."""

import math
from collections.abc import Callable, Iterator

import numpy as np

from moi_jax.models.config import ModelConfig, in_family
from moi_jax.models.families import FAMILIES
from moi_jax.models.families.family import HFTensor
from moi_jax.models.parameters import parameter_specs


def published_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> published shape of every tensor that a checkpoint of this architecture holds.

    The order is that of the file: embedding, layers, final norm, head.
    """
    return {name: _published_shape(tensor, config) for name, tensor, _ in _instances(config)}


def redundant_tensors(config: ModelConfig) -> dict[str, str | None]:
    """Further tensors that a checkpoint may hold: a tied head's copy, tables made from the config.

    Returns:
      Name -> the tensor that it must equal, or None if there is nothing to compare with.
    """
    family = FAMILIES[config.family]
    copies: dict[str, str | None] = {
        name.format(layer): None for name in family.redundant for layer in range(config.num_layers)
    }
    if config.tied_head:
        by_path = {tensor.paths: tensor.name for tensor in family.tensors}
        copies[by_path["head.kernel",]] = by_path["embedding.table",]
    return copies


def import_parameters(
    config: ModelConfig, read: Callable[[str], np.ndarray], dtype: np.typing.DTypeLike
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields our parameters one by one: (dotted path, array of `dtype`), with layers stacked.

    Args:
      read: gives a published tensor by its name, in any dtype. It is called for one tensor at a
        time, so that only one is in memory; a tensor that holds parts of several parameters is
        read for each of them.
    """
    for path in parameter_specs(config):
        yield path, _stacked(config, path, read, dtype)


def export_tensors(
    config: ModelConfig,
    get: Callable[[str, int | None], np.ndarray],
    as_family: str | None = None,
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields published tensors one by one: (name, contiguous array), in the dtype that `get` gives.

    Args:
      get: gives our parameter by its dotted path, or one layer of a stacked one by its number.
      as_family: use another family's names; `in_family` says where that is exact.

    Raises:
      UserError: the parameters cannot be written as `as_family`.
    """
    config = in_family(config, as_family or config.family)
    for name, tensor, layer in _instances(config):
        rows = [_published(get(path, layer), tensor) for path in tensor.paths]
        yield name, rows[0] if len(rows) == 1 else np.concatenate(rows)


def _instances(config: ModelConfig) -> Iterator[tuple[str, HFTensor, int | None]]:
    """Name, table entry and layer of every published tensor."""
    declared = parameter_specs(config)
    tensors = [
        tensor for tensor in FAMILIES[config.family].tensors if declared.keys() & {*tensor.paths}
    ]
    first = next(i for i, tensor in enumerate(tensors) if "{}" in tensor.name)
    stacked = [tensor for tensor in tensors if "{}" in tensor.name]
    whole = [tensor for tensor in tensors if "{}" not in tensor.name]
    yield from ((tensor.name, tensor, None) for tensor in whole[:first])
    for layer in range(config.num_layers):
        yield from ((tensor.name.format(layer), tensor, layer) for tensor in stacked)
    yield from ((tensor.name, tensor, None) for tensor in whole[first:])


def _stacked(
    config: ModelConfig, path: str, read: Callable[[str], np.ndarray], dtype: np.typing.DTypeLike
) -> np.ndarray:
    parameter = np.empty(parameter_specs(config)[path].shape, dtype)
    for name, tensor, layer in _instances(config):
        if path in tensor.paths:
            rows = _rows_of(path, tensor, config)
            _place(read(name)[rows], tensor, parameter if layer is None else parameter[layer])
    return parameter


def _place(rows: np.ndarray, tensor: HFTensor, place: np.ndarray) -> None:
    """Copies the rows of one of our parameters into one layer of it."""
    place[...] = (rows.T if tensor.inputs else rows).reshape(place.shape)


def _published(parameter: np.ndarray, tensor: HFTensor) -> np.ndarray:
    """Our parameter -> its rows of the tensor: [out, in], or a single row for biases and norms."""
    shape = _part_shape(parameter.shape, tensor)
    if not tensor.inputs:
        return parameter.reshape(shape)
    return np.ascontiguousarray(parameter.reshape(shape[::-1]).T)


def _part_shape(shape: tuple[int, ...], tensor: HFTensor) -> tuple[int, ...]:
    """The shape of the rows that a parameter, without the axis of layers, has in a tensor."""
    if tensor.inputs:
        columns = math.prod(shape[: tensor.inputs])
        return (math.prod(shape) // columns, columns)
    # The embedding [V, D] is published as it is, a bias [heads, N] as one row.
    return shape if tensor.paths == ("embedding.table",) else (math.prod(shape),)


def _part_shapes(tensor: HFTensor, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Path -> the shape of its rows, in the order in which they follow each other in the tensor."""
    specs, first = parameter_specs(config), "{}" in tensor.name
    return {path: _part_shape(specs[path].shape[first:], tensor) for path in tensor.paths}


def _rows_of(path: str, tensor: HFTensor, config: ModelConfig) -> slice:
    """Which rows of the tensor are those of `path`."""
    counts = {path: shape[0] for path, shape in _part_shapes(tensor, config).items()}
    before = sum(list(counts.values())[: tensor.paths.index(path)])
    return slice(before, before + counts[path])


def _published_shape(tensor: HFTensor, config: ModelConfig) -> tuple[int, ...]:
    parts = list(_part_shapes(tensor, config).values())
    return (sum(part[0] for part in parts), *parts[0][1:])
