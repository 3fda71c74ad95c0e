"""AdamW and the learning-rate schedules."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from moi_jax import config as config_lib
from moi_jax.models.config import ModelConfig
from moi_jax.models.parameters import map_parameters, split_trainable

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]


def make_schedule(config: config_lib.Optimizer, steps: int) -> Schedule:
    """Learning rate of each step, 0-based, of a run of `steps` steps.

    A linear warm-up over warmup_ratio of the run that ends on the full rate, then the decay to
    zero one step past the end (no step is wasted on a rate of zero).
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
    """Clipping, Adam's direction and decoupled weight decay; the step applies the rate.

    Norms and biases do not decay. The rate stays outside so that it follows the step of the
    run even past skipped updates.
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
