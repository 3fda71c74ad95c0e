"""The parameters of the decoder: their paths, shapes, axes, and what their modules say of them.

decoder.py declares the parameters; everything here is derived from the abstract `Decoder`. Trees
are nested dicts with the names of the modules. A dotted path such as
`layers.attention.query.kernel` names a leaf.
"""

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
from flax import nnx, traverse_util
from jax.sharding import Mesh

from moi_jax.models.compute import Compute
from moi_jax.models.config import ModelConfig
from moi_jax.models.decoder import Decoder, Tree, abstract_model
from moi_jax.parallel.placing import named_sharding


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter as its module declares it."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]  # logical axes, see parallel/axes.py
    decays: bool
    trainable: bool
    contracted: int  # of a matrix: the number of its axes that a product sums over; else 0


@cache
def parameter_specs(config: ModelConfig) -> dict[str, Parameter]:
    """Returns dotted path -> `Parameter`, for every parameter of the decoder."""
    state = nnx.state(abstract_model(config, Compute()), nnx.Param)
    return {
        ".".join(map(str, path)): Parameter(
            param.shape,
            param.get_metadata("logical_axes"),
            param.get_metadata("decays"),
            param.get_metadata("trainable"),
            param.get_metadata("contracted"),
        )
        for path, param in nnx.to_flat_state(state)
    }


def map_parameters(config: ModelConfig, make: Callable[[str, Parameter], Any]) -> Tree:
    """Returns the nested tree of `make(path, parameter)` for every parameter."""
    flat = {path: make(path, spec) for path, spec in parameter_specs(config).items()}
    return traverse_util.unflatten_dict(flat, sep=".")


def abstract_parameters(config: ModelConfig, dtype: jax.typing.DTypeLike) -> Tree:
    """Returns the tree of parameters as `jax.ShapeDtypeStruct`s."""
    return map_parameters(config, lambda _, p: jax.ShapeDtypeStruct(p.shape, dtype))


def parameter_shardings(config: ModelConfig, mesh: Mesh) -> Tree:
    """Returns the tree of the parameters' shardings, from their logical axes."""
    return map_parameters(config, lambda _, p: named_sharding(p.axes, p.shape, mesh))


def random_parameters(
    config: ModelConfig, seed: int, dtype: jax.typing.DTypeLike, mesh: Mesh | None = None
) -> Tree:
    """Makes random parameters, sharded from the start; the values do not depend on the mesh."""

    def make() -> Tree:
        model = Decoder(config, param_dtype=dtype, rngs=nnx.Rngs(params=seed))
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))

    shardings = None if mesh is None else parameter_shardings(config, mesh)
    return jax.jit(make, out_shardings=shardings)()


def merge_trees(trainable: Tree, frozen: Tree) -> Tree:
    """Merges the two trees of `Trained.split` (trained.py) into one."""
    flat = {**traverse_util.flatten_dict(trainable), **traverse_util.flatten_dict(frozen)}
    return traverse_util.unflatten_dict(flat)
