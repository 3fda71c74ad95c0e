"""What the decoder's modules say of its parameters: paths, shapes, axes, decay, what is trained.

Nothing is declared here: all of it derives from the abstract `Decoder` (decoder.py declares).
Trees are nested dicts by the names of the modules; a dotted path such as
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


@cache
def parameter_specs(config: ModelConfig) -> dict[str, Parameter]:
    """Dotted path -> what is known of it, for every parameter of the decoder."""
    state = nnx.state(abstract_model(config, Compute()), nnx.Param)
    return {
        ".".join(map(str, path)): Parameter(
            param.shape,
            param.get_metadata("logical_axes"),
            param.get_metadata("decays"),
            param.get_metadata("trainable"),
        )
        for path, param in nnx.to_flat_state(state)
    }


def map_parameters(config: ModelConfig, make: Callable[[str, Parameter], Any]) -> Tree:
    """The nested tree of `make(path, parameter)` over every parameter."""
    flat = {path: make(path, spec) for path, spec in parameter_specs(config).items()}
    return traverse_util.unflatten_dict(flat, sep=".")


def abstract_parameters(config: ModelConfig, dtype: jax.typing.DTypeLike) -> Tree:
    """The tree of `jax.ShapeDtypeStruct`s."""
    return map_parameters(config, lambda _, p: jax.ShapeDtypeStruct(p.shape, dtype))


def parameter_shardings(config: ModelConfig, mesh: Mesh) -> Tree:
    """The tree of shardings of the parameters, from their logical axes."""
    return map_parameters(config, lambda _, p: named_sharding(p.axes, p.shape, mesh))


def random_parameters(
    config: ModelConfig, seed: int, dtype: jax.typing.DTypeLike, mesh: Mesh | None = None
) -> Tree:
    """Random parameters, made where they will lie; the values do not depend on the mesh."""

    def make() -> Tree:
        model = Decoder(config, param_dtype=dtype, rngs=nnx.Rngs(params=seed))
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))

    shardings = None if mesh is None else parameter_shardings(config, mesh)
    return jax.jit(make, out_shardings=shardings)()


def split_trainable(config: ModelConfig, parameters: Tree) -> tuple[Tree, Tree]:
    """The trees of the trained parameters and of the frozen ones."""
    specs = parameter_specs(config)
    flat = traverse_util.flatten_dict(parameters, sep=".")
    parts: tuple[Tree, Tree] = {}, {}
    for path, value in flat.items():
        parts[not specs[path].trainable][path] = value
    trainable, frozen = (traverse_util.unflatten_dict(part, sep=".") for part in parts)
    return trainable, frozen


def merge_trees(trainable: Tree, frozen: Tree) -> Tree:
    """The one tree of both parts."""
    flat = {**traverse_util.flatten_dict(trainable), **traverse_util.flatten_dict(frozen)}
    return traverse_util.unflatten_dict(flat)
