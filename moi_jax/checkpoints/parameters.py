"""The parameters of a checkpoint: written alone, read onto a mesh, or read one by one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from moi_jax.checkpoints.arrays import read_arrays
from moi_jax.checkpoints.base import bits_sum, check_base, find_base, tree_fingerprint
from moi_jax.checkpoints.checksums import verify_arrays, write_checksums
from moi_jax.checkpoints.damage import reading
from moi_jax.checkpoints.items import Base, ModelItems, find_step, read_base
from moi_jax.checkpoints.parameter_files import (
    StoredParameters,
    Stream,
    by_this_process,
    expected,
    save_parameters,
)
from moi_jax.common.errors import UserError
from moi_jax.common.fingerprint import json_fingerprint
from moi_jax.models.config import ModelConfig
from moi_jax.models.decoder import Tree
from moi_jax.models.parameters import (
    abstract_parameters,
    adapters_of,
    merge_trees,
    parameter_shardings,
    parameter_specs,
)
from moi_jax.models.quantized import Scheme
from moi_jax.models.quantized_base import quantized_base
from moi_jax.parallel import hosts

# (fingerprint, how it is quantised) -> the parameters of a base.
Bases = dict[tuple[str, Scheme | None], Tree]


def save_model(path: Path, stream: Stream, dtype: np.dtype, items: ModelItems) -> None:
    """Writes a checkpoint without training state, with one parameter in memory at a time.

    Args:
      path: must not exist. A failed call leaves a part of it: write into an `atomic_directory`.
      stream: (dotted path, array) of every parameter that the checkpoint holds, in any order.
      dtype: of the parameters but for adapters, which are float32 or wider.

    Raises:
      OSError: `path` cannot be written.
    """
    held = items.held(expected(items.model, dtype))
    alone = by_this_process()
    handler = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(multiprocessing_options=alone)
    )
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        checkpointer.save(path.absolute(), ocp.args.Composite(**items.to_args()))
    save_parameters(path / "parameters", held, stream)
    write_checksums(path)


def stored_parameters(step: Path, config: ModelConfig, verify: bool = True) -> StoredParameters:
    """The parameters that a step holds, for reading one at a time; beside a base its adapters.

    Args:
      verify: compare the files with their checksums first.

    Raises:
      UserError: files are missing or damaged, or the stored shapes are not those of `config`.
    """
    if verify:
        verify_arrays(step, ["parameters"])
    specs = parameter_specs(config)
    if read_base(step):
        specs = {path: spec for path, spec in specs.items() if spec.adapter}
    with reading(step, "parameters"):
        stored = StoredParameters(step, specs)
    _check_shapes(step, stored.arrays, specs)
    return stored


def read_parameters(
    path: Path,
    config: ModelConfig,
    dtype: jax.typing.DTypeLike,
    mesh: Mesh | None,
    verify: bool = True,
    base: Path | None = None,
    bases: Bases | None = None,
) -> Tree:
    """Parameters of a checkpoint, cast to `dtype`, laid out on `mesh` (None: one device).

    Adapters are float32 or wider. Where they alone are in the checkpoint, the others are read from
    their base.

    Args:
      verify: compare the files with their checksums first.
      base: a checkpoint with the base; None for where it was when the adapters were trained.
      bases: those that were read before with this dtype and mesh. A base among them is taken from
        there, and another one is added.

    Raises:
      UserError: files are missing or damaged, the stored shapes are not those of `config`, a value
        is not finite, or the base is missing or another one.
    """
    step = find_step(path).absolute()
    wanted = _wanted_parameters(config, dtype, mesh)
    recorded = read_base(step)
    if recorded is None:
        return _read_held(step, wanted, verify)
    adapters = _read_held(step, adapters_of(config, wanted), verify)
    bases = {} if bases is None else bases
    assert config.adapter is not None
    key = recorded.fingerprint, config.adapter.quantization
    if key not in bases:
        bases[key] = read_beside(step, recorded, config, wanted, verify, base)
    return merge_trees(adapters, bases[key])


def read_beside(
    step: Path,
    recorded: Base,
    config: ModelConfig,
    wanted: Tree,
    verify: bool = True,
    given: Path | None = None,
) -> Tree:
    """The parameters that the adapters of a step were trained beside.

    Args:
      wanted: all parameters of `config`, abstract.
      verify, given: as `verify` and `base` of `read_parameters`.
    """
    place = find_base(step, recorded, given)
    table = wanted["embedding"]["table"]
    mesh = getattr(table.sharding, "mesh", None)
    assert config.adapter is not None
    if config.adapter.quantization:
        parameters, fingerprint = read_quantized(place, config, table.dtype, mesh, verify)
        check_base(step, recorded, place, fingerprint)
        return parameters
    base = _wanted_parameters(config.base, table.dtype, mesh)
    # The fingerprint is that of bfloat16, whose values float16 does not hold.
    exact = jax.tree.map(lambda x: x.update(dtype=jnp.promote_types(x.dtype, jnp.bfloat16)), base)
    parameters = _read_held(place, exact, verify)
    check_base(step, recorded, place, tree_fingerprint(parameters))
    return jax.tree.map(lambda x, asked: x.astype(asked.dtype), parameters, base)


def read_quantized(
    path: Path,
    config: ModelConfig,
    dtype: jax.typing.DTypeLike,
    mesh: Mesh | None,
    verify: bool = True,
) -> tuple[Tree, str]:
    """Reads the base of `config` and quantises it; one matrix of it at a time is on the devices.

    Args:
      dtype: of the parameters that are not quantised.
      verify: compare the files with their checksums first.

    Returns:
      The parameters but for the adapters, and the fingerprint of the base.

    Raises:
      UserError: see `read_parameters`.
    """
    step = find_step(path).absolute()
    if verify:
        hosts.from_main("the checksums", lambda: verify_arrays(step, ["parameters"]))
    stored = stored_parameters(step, config.base, verify=False)
    # The fingerprint is that of bfloat16, whose values float16 does not hold.
    exact = _wanted_parameters(config.base, jnp.promote_types(dtype, jnp.bfloat16), mesh)
    sums, summed = {}, jax.jit(bits_sum)

    def arrays() -> Iterator[tuple[str, jax.Array]]:
        for name, wanted in flatten_dict(exact, sep=".").items():
            value = stored.get(name).astype(wanted.dtype)
            array = jax.make_array_from_callback(value.shape, wanted.sharding, value.__getitem__)
            sums[name] = int(summed(array))
            yield name, array

    parameters = quantized_base(config, arrays(), dtype, mesh)
    return parameters, json_fingerprint(sums)


def read_state(
    step: Path, config: ModelConfig, parameters: Tree, optimizer: Any, base: Path | None = None
) -> tuple[Tree, Any]:
    """All parameters and the optimizer of a step, as these two trees; checksums are not compared.

    Args:
      base: as `base` of `read_parameters`.

    Raises:
      UserError: see `read_parameters`.
    """
    held, state = read_held_state(step, config, parameters, optimizer)
    if (recorded := read_base(step)) is None:
        return held, state
    beside = read_beside(step, recorded, config, parameters, verify=False, given=base)
    return merge_trees(held, beside), state


def read_held_state(
    step: Path, config: ModelConfig, parameters: Tree, optimizer: Any
) -> tuple[Tree, Any]:
    """As `read_state`, but beside a base the adapters alone."""
    wanted = adapters_of(config, parameters) if read_base(step) else parameters
    return read_arrays(step, "parameters", wanted), read_arrays(step, "optimizer", optimizer)


def _wanted_parameters(config: ModelConfig, dtype: jax.typing.DTypeLike, mesh: Mesh | None) -> Tree:
    """Shapes, dtypes and shardings of all parameters on a mesh, or on one device."""
    abstract = abstract_parameters(config, dtype)
    if mesh is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: sharding, abstract)
    else:
        shardings = parameter_shardings(config, mesh)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
    )


def _read_held(step: Path, wanted: Tree, verify: bool) -> Tree:
    """The item `parameters` of a step, with the dtypes and shardings of the tree `wanted`."""
    if verify:  # once, not by every process
        hosts.from_main("the checksums", lambda: verify_arrays(step, ["parameters"]))
    with reading(step, "parameters"):
        with ocp.StandardCheckpointer() as checkpointer:
            stored = checkpointer.metadata(step / "parameters").item_metadata.tree
        _check_shapes(step, stored, wanted)
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
