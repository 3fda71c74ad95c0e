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
import jax.numpy as jnp
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
    adapter: bool  # whether it is a part of an adapter
    own_dtype: jnp.dtype | None  # of codes and their absmax, whatever the others have

    def dtype(self, common: jax.typing.DTypeLike) -> jnp.dtype:
        """Returns its dtype where that of the parameters is `common`; adapters are float32 then."""
        if self.own_dtype is not None:
            return self.own_dtype
        return jnp.promote_types(common, jnp.float32) if self.adapter else jnp.dtype(common)


@cache
def parameter_specs(config: ModelConfig) -> dict[str, Parameter]:
    """Returns dotted path -> `Parameter`, for every parameter of the decoder."""
    state = nnx.state(abstract_model(config, Compute()), nnx.Param)
    return {
        ".".join(map(str, path)): Parameter(
            param.shape,
            param.get_metadata("logical_axes"),
            param.get_metadata("decays"),
            # Beside adapters all else is frozen.
            param.get_metadata("trainable")
            and (config.adapter is None or param.get_metadata("adapter")),
            param.get_metadata("contracted"),
            param.get_metadata("adapter"),
            param.dtype if param.get_metadata("keeps_dtype") else None,
        )
        for path, param in nnx.to_flat_state(state)
    }


def map_parameters(config: ModelConfig, make: Callable[[str, Parameter], Any]) -> Tree:
    """Returns the nested tree of `make(path, parameter)` for every parameter."""
    flat = {path: make(path, spec) for path, spec in parameter_specs(config).items()}
    return traverse_util.unflatten_dict(flat, sep=".")


def abstract_parameters(config: ModelConfig, dtype: jax.typing.DTypeLike) -> Tree:
    """Returns the tree of parameters as `jax.ShapeDtypeStruct`s.

    Args:
      dtype: of all but the adapters.
    """
    return map_parameters(config, lambda _, p: jax.ShapeDtypeStruct(p.shape, p.dtype(dtype)))


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


def add_new_adapters(
    config: ModelConfig,
    base: Tree,
    seed: int,
    dtype: jax.typing.DTypeLike,
    mesh: Mesh | None = None,
) -> Tree:
    """Adds the adapters that `random_parameters` makes to the parameters of `config.base`."""

    def make() -> Tree:
        model = Decoder(config, param_dtype=dtype, rngs=nnx.Rngs(params=seed))
        return adapters_of(config, nnx.to_pure_dict(nnx.state(model, nnx.Param)))

    shardings = None if mesh is None else adapters_of(config, parameter_shardings(config, mesh))
    return merge_trees(jax.jit(make, out_shardings=shardings)(), base)


def adapters_of(config: ModelConfig, parameters: Tree) -> Tree:
    """Returns the adapters among all parameters of a model."""
    return _part(config, parameters, adapter=True)


def base_of(config: ModelConfig, parameters: Tree) -> Tree:
    """Returns all parameters of a model but the adapters."""
    return _part(config, parameters, adapter=False)


def _part(config: ModelConfig, parameters: Tree, *, adapter: bool) -> Tree:
    specs = parameter_specs(config)
    flat = traverse_util.flatten_dict(parameters, sep=".")
    part = {path: value for path, value in flat.items() if specs[path].adapter == adapter}
    return traverse_util.unflatten_dict(part, sep=".")


def merge_trees(one: Tree, other: Tree) -> Tree:
    """Merges two parts of the parameters, such as those of `Trained.split`, into one tree."""
    flat = {**traverse_util.flatten_dict(one), **traverse_util.flatten_dict(other)}
    return traverse_util.unflatten_dict(flat)
