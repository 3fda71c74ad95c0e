"""The train state: parameters, optimizer state and step, created sharded."""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from moi_jax.models.config import ModelConfig
from moi_jax.models.parameters import Tree, abstract_parameters, parameter_shardings
from moi_jax.parallel.placing import replicated


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes. `step` counts batches seen, skipped updates included."""

    step: jax.Array  # int32[]
    parameters: Tree
    opt_state: Any

    def items(self) -> tuple[Tree, Any]:
        """The two items that a checkpoint keeps it in: parameters, and all the rest."""
        return self.parameters, {"step": self.step, "state": self.opt_state}

    @classmethod
    def from_items(cls, parameters: Tree, optimizer: Any) -> "TrainState":
        """The state of a checkpoint's two items."""
        return cls(optimizer["step"], parameters, optimizer["state"])


def state_shardings(
    config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Shardings of the whole state: the moments lie as their parameters do."""
    parameters = parameter_shardings(config, mesh)
    abstract = jax.eval_shape(optimizer.init, abstract_parameters(config, jnp.float32))
    whole = replicated(mesh)
    moments = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        abstract,
        parameters,
        transform_non_params=lambda _: whole,
    )
    return TrainState(step=cast(Any, whole), parameters=parameters, opt_state=moments)


def abstract_state(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    dtype: jax.typing.DTypeLike,
    mesh: Mesh,
) -> TrainState:
    """Shapes, dtypes and shardings of the state: what a restore asks for."""
    shapes = jax.eval_shape(
        lambda p: initial_state(optimizer, p), abstract_parameters(config, dtype)
    )
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        state_shardings(config, optimizer, mesh),
    )


def initial_state(optimizer: optax.GradientTransformation, parameters: Tree) -> TrainState:
    """The state before the first step; moments are at least float32 whatever the parameters."""
    wide = jax.tree.map(lambda p: p.astype(jnp.promote_types(p.dtype, jnp.float32)), parameters)
    return TrainState(jnp.zeros((), jnp.int32), parameters, optimizer.init(wide))


def new_state(
    config: ModelConfig, optimizer: optax.GradientTransformation, parameters: Tree, mesh: Mesh
) -> TrainState:
    """`initial_state` on the mesh. `parameters` are donated."""
    make = jax.jit(
        lambda p: initial_state(optimizer, p),
        out_shardings=state_shardings(config, optimizer, mesh),
        donate_argnums=0,
    )
    return make(parameters)
