"""The AdamW optimizer and the learning-rate schedules."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from moi_jax import config as config_lib
from moi_jax.models.config import ModelConfig
from moi_jax.models.parameters import map_parameters, split_trainable

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]


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


def make_optimizer(
    config: config_lib.Optimizer, model: ModelConfig
) -> optax.GradientTransformation:
    """Makes the optimizer: clipping, Adam's direction, decoupled weight decay.

    Norms and biases do not decay. The train step applies the learning rate, because the rate
    follows the step of the run, which also counts skipped updates.
    """
    every = map_parameters(model, lambda _, parameter: parameter.decays)
    decays, _ = split_trainable(model, every)
    clip = optax.identity()
    if config.clip_norm is not None:
        clip = optax.clip_by_global_norm(config.clip_norm)
    return optax.chain(
        clip,
        optax.scale_by_adam(
            config.b1, config.b2, config.eps, mu_dtype=jnp.dtype(config.moment_dtype)
        ),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
    )
