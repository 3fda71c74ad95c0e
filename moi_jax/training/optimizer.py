"""The optimizers and the learning-rate schedules."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from optax.contrib import MuonDimensionNumbers

from moi_jax import config as config_lib
from moi_jax.models.config import ModelConfig
from moi_jax.models.decoder import Tree
from moi_jax.models.parameters import Parameter, map_parameters
from moi_jax.models.trained import Trained, trained_parameters

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]


class Optimizer(NamedTuple):
    """An optimizer as optax has it, and what it trains.

    Attributes:
      init: the trained part of the parameters -> the optimizer state.
      update: gradients, state and parameters, all of the trained part -> updates and state.
      trained: which parameters these are.
      follow: the state of `update`, and the parameters after it -> the state that is kept.
    """

    init: optax.TransformInitFn
    update: optax.TransformUpdateExtraArgsFn
    trained: Trained
    follow: Callable[[Any, Tree], Any] = lambda state, parameters: state


class Averaged(NamedTuple):
    """The state of an optimizer with `ema_decay`.

    Attributes:
      inner: the state of the optimizer itself.
      average: the exponential moving average of the trained part of the parameters, float32 or
        wider. It begins with the parameters before the first step.
    """

    inner: Any
    average: Tree


def make_schedule(config: config_lib.Optimizer, steps: int) -> Schedule:
    """Makes the schedule of a run of `steps` steps: 0-based step -> learning rate.

    The rate rises linearly over warmup_ratio of the run to the full rate. It then decays, and
    would reach zero one step past the end, so that no step is wasted on a rate of zero.
    """
    peak = config.learning_rate
    warmup = round(config.warmup_ratio * steps)
    rest = max(steps - warmup, 1)
    decay = {
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    if warmup == 0:
        return decay
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, decay], [warmup])


def make_optimizer(config: config_lib.Optimizer, model: ModelConfig) -> Optimizer:
    """Makes the optimizer: clipping, the direction of its kind, decoupled weight decay.

    Norms and biases do not decay. The train step applies the learning rate, because the rate
    follows the step of the run, which also counts skipped updates.

    Raises:
      UserError: config.frozen does not fit the model.
    """
    trained = trained_parameters(model, config.frozen)
    decays, _ = trained.split(map_parameters(model, lambda _, parameter: parameter.decays))
    clip = optax.identity()
    if config.clip_norm is not None:
        clip = optax.clip_by_global_norm(config.clip_norm)
    chain = optax.chain(
        clip,
        _direction(config, model, trained),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
    )
    optimizer = Optimizer(chain.init, chain.update, trained)
    return _averaging(optimizer, config.ema_decay) if config.ema_decay else optimizer


def _averaging(optimizer: Optimizer, decay: float) -> Optimizer:
    """Keeps a moving average of the parameters in the state, so it is sharded and saved with it."""

    def init(parameters: Tree) -> Averaged:
        return Averaged(optimizer.init(parameters), parameters)

    def update(gradients: Tree, state: Averaged, parameters: Tree) -> tuple[Tree, Averaged]:
        updates, inner = optimizer.update(gradients, state.inner, parameters)
        return updates, state._replace(inner=inner)

    def follow(state: Averaged, parameters: Tree) -> Averaged:
        average = jax.tree.map(
            lambda mean, p: mean + (1 - decay) * (p.astype(mean.dtype) - mean),
            state.average,
            parameters,
        )
        return state._replace(average=average)

    return Optimizer(cast(Any, init), cast(Any, update), optimizer.trained, follow)


def _direction(
    config: config_lib.Optimizer, model: ModelConfig, trained: Trained
) -> optax.GradientTransformation:
    """Returns the direction of an update, of about the size 1 for each parameter."""
    first = jnp.dtype(config.moment_dtype)
    if config.name == "lion":
        return optax.scale_by_lion(config.b1, config.b2, mu_dtype=first)
    if config.name == "adafactor":
        # Without momentum, as in T5. The update is clipped over all layers of a stacked parameter.
        return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    if config.name == "muon":
        # The matrices of the layers are orthogonalised. The rest has Adam's direction, with
        # Nesterov momentum as in optax. All updates are as large as Adam's (arXiv 2502.16982,
        # section 2.2), so that both take the same learning rate, which is not applied here.
        return optax.contrib.muon(
            learning_rate=-1.0,
            beta=config.b1,
            eps=config.eps,
            mu_dtype=first,
            adam_b1=config.b1,
            adam_b2=config.b2,
            muon_weight_dimension_numbers=trained.split(_matrices_of_layers(model))[0],
            consistent_rms=0.2,
        )
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=first)
    return _with_second_moment_in(jnp.dtype(config.second_moment_dtype), adam)


def _matrices_of_layers(model: ModelConfig) -> Tree:
    """Returns the axes of each matrix in the layers, as Muon takes them; None elsewhere."""

    def axes(path: str, parameter: Parameter) -> Any:
        if not path.startswith("layers.") or not parameter.contracted:
            return None
        ends = 1 + parameter.contracted  # after the axis of the layers
        rest = tuple(range(ends, len(parameter.shape)))
        return MuonDimensionNumbers(tuple(range(1, ends)), rest)

    return map_parameters(model, axes)


def _with_second_moment_in(
    dtype: jnp.dtype, adam: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Stores the second moment of scale_by_adam in another dtype, and computes as before."""

    def stored(state: optax.ScaleByAdamState) -> optax.ScaleByAdamState:
        return state._replace(nu=optax.tree.cast(state.nu, dtype))

    def update(gradients: Tree, state: optax.ScaleByAdamState, parameters: Tree | None) -> Any:
        wide = jax.tree.map(lambda v, g: v.astype(g.dtype), state.nu, gradients)
        updates, state = adam.update(gradients, state._replace(nu=wide), parameters)
        return updates, stored(state)

    if dtype == jnp.float32:
        return adam
    return optax.GradientTransformation(lambda parameters: stored(adam.init(parameters)), update)
