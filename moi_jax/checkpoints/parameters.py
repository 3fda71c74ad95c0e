"""The parameters of a checkpoint: written alone, read onto a mesh, or read one by one."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from moi_jax.checkpoints.arrays import read_arrays
from moi_jax.checkpoints.checksums import verify_arrays, write_checksums
from moi_jax.checkpoints.damage import reading
from moi_jax.checkpoints.items import ModelItems, find_step
from moi_jax.checkpoints.parameter_files import (
    StoredParameters,
    Stream,
    by_this_process,
    save_parameters,
)
from moi_jax.common.errors import UserError
from moi_jax.models.config import ModelConfig
from moi_jax.models.decoder import Tree
from moi_jax.models.parameters import abstract_parameters, parameter_shardings, parameter_specs
from moi_jax.parallel import hosts


def save_model(path: Path, stream: Stream, dtype: np.dtype, items: ModelItems) -> None:
    """Writes a checkpoint without training state, with one parameter in memory at a time.

    Args:
      path: must not exist. A failed call leaves a part of it: write into an `atomic_directory`.
      stream: (dotted path, array of `dtype`) of every parameter of the model, in any order.

    Raises:
      OSError: `path` cannot be written.
    """
    alone = by_this_process()
    handler = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(multiprocessing_options=alone)
    )
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        checkpointer.save(path.absolute(), ocp.args.Composite(**items.to_args()))
    save_parameters(path / "parameters", items.model, stream, dtype)
    write_checksums(path)


def stored_parameters(step: Path, config: ModelConfig, verify: bool = True) -> StoredParameters:
    """The parameters of a step, for reading one at a time.

    Args:
      verify: compare the files with their checksums first.

    Raises:
      UserError: files are missing or damaged, or the stored shapes are not those of `config`.
    """
    if verify:
        verify_arrays(step, ["parameters"])
    with reading(step, "parameters"):
        stored = StoredParameters(step, config)
    _check_shapes(step, stored.arrays, parameter_specs(config))
    return stored


def read_parameters(
    path: Path,
    config: ModelConfig,
    dtype: jax.typing.DTypeLike,
    mesh: Mesh | None,
    verify: bool = True,
) -> Tree:
    """Parameters of a checkpoint, cast to `dtype`, laid out on `mesh` (None: one device).

    Args:
      verify: compare the files with their checksums first.

    Raises:
      UserError: files are missing or damaged, the stored shapes are not those of `config`, or a
        value is not finite.
    """
    step = find_step(path).absolute()
    if verify:  # once, not by every process
        hosts.from_main("the checksums", lambda: verify_arrays(step, ["parameters"]))
    abstract = abstract_parameters(config, dtype)
    if mesh is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: sharding, abstract)
    else:
        shardings = parameter_shardings(config, mesh)
    wanted = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
    )
    with reading(step, "parameters"):
        with ocp.StandardCheckpointer() as checkpointer:
            stored = checkpointer.metadata(step / "parameters").item_metadata.tree
        _check_shapes(step, stored, abstract)
    return read_arrays(step, "parameters", wanted)


def _check_shapes(step: Path, stored: Any, expected: Tree) -> None:
    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        return {
            jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }

    found, wanted = shapes(stored), shapes(expected)
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise UserError(
                f"{step}: parameter {name} has shape {found.get(name)}, the model needs "
                f"{wanted.get(name)}; is this the checkpoint of another architecture?"
            )
