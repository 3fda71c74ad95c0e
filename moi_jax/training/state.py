"""The train state: parameters, optimizer state and step, sharded from the start."""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding

from moi_jax.models.config import ModelConfig
from moi_jax.models.decoder import Tree
from moi_jax.models.parameters import (
    abstract_parameters,
    merge_trees,
    parameter_shardings,
)
from moi_jax.models.trained import Trained
from moi_jax.parallel.placing import replicated
from moi_jax.training.optimizer import Optimizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes, and the frozen parameters.

    Attributes:
      step: int32[], the number of batches seen, including skipped updates.
      trainable: the parameters that are trained, at least in some layers.
      frozen: the other parameters, which no step changes.
      opt_state: the optimizer state of the trained part of `trainable`.
    """

    step: jax.Array
    trainable: Tree
    frozen: Tree
    opt_state: Any

    @property
    def parameters(self) -> Tree:
        """All parameters in one tree, as the model takes them."""
        return merge_trees(self.trainable, self.frozen)

    def items(self) -> tuple[Tree, Any]:
        """Returns the state as the two items of a checkpoint: parameters, and everything else."""
        return self.parameters, {"step": self.step, "state": self.opt_state}

    @classmethod
    def from_items(cls, trained: Trained, parameters: Tree, optimizer: Any) -> "TrainState":
        """Makes the state from the two items of a checkpoint."""
        trainable, frozen = trained.split(parameters)
        return cls(optimizer["step"], trainable, frozen, optimizer["state"])


def state_shardings(config: ModelConfig, optimizer: Optimizer, mesh: Mesh) -> TrainState:
    """Returns the shardings of the whole state; moments are sharded like their parameters.

    What an optimizer keeps in another shape, as the factors of adafactor, is small and whole on
    every device.
    """
    trained = optimizer.trained
    trainable, frozen = trained.split(parameter_shardings(config, mesh))
    abstract, _ = trained.split(abstract_parameters(config, jnp.float32))
    abstract = jax.eval_shape(trained.part, abstract)
    shardings, shapes = map(traverse_util.flatten_dict, (trainable, abstract))
    whole = replicated(mesh)

    def sharding(path: tuple, kept: jax.ShapeDtypeStruct) -> NamedSharding:
        names = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        for start in range(len(names)):  # an optimizer may have names of its own before
            parameter = names[start:]
            if parameter in shapes and shapes[parameter].shape == kept.shape:
                return shardings[parameter]
        return whole

    moments = jax.tree_util.tree_map_with_path(sharding, jax.eval_shape(optimizer.init, abstract))
    return TrainState(cast(Any, whole), trainable, frozen, moments)


def abstract_state(
    config: ModelConfig,
    optimizer: Optimizer,
    dtype: jax.typing.DTypeLike,
    mesh: Mesh,
) -> TrainState:
    """Returns shapes, dtypes and shardings of the state, which a restore needs."""
    shapes = jax.eval_shape(
        lambda p: initial_state(optimizer, p), abstract_parameters(config, dtype)
    )
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        state_shardings(config, optimizer, mesh),
    )


def initial_state(optimizer: Optimizer, parameters: Tree) -> TrainState:
    """Makes the state before the first step.

    Moments do not take the dtype of the parameters: they are float32, or wider like wider
    parameters, unless the optimizer's config names another dtype.
    """
    trainable, frozen = optimizer.trained.split(parameters)
    part = optimizer.trained.part(trainable)
    wide = jax.tree.map(lambda p: p.astype(jnp.promote_types(p.dtype, jnp.float32)), part)
    return TrainState(jnp.zeros((), jnp.int32), trainable, frozen, optimizer.init(wide))


def new_state(
    config: ModelConfig, optimizer: Optimizer, parameters: Tree, mesh: Mesh
) -> TrainState:
    """Makes the `initial_state` on the mesh. `parameters` are donated."""
    make = jax.jit(
        lambda p: initial_state(optimizer, p),
        out_shardings=state_shardings(config, optimizer, mesh),
        donate_argnums=0,
    )
    return make(parameters)
