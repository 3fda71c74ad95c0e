"""The train step, jitted on the mesh: loss, gradients over microbatches, update."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from moi_jax.data.loader import Batch
from moi_jax.models.config import ModelConfig
from moi_jax.models.decoder import Bind, Tree
from moi_jax.models.loss import weighted_nll
from moi_jax.models.trained import Trained
from moi_jax.parallel.placing import batch_sharding, replicated
from moi_jax.training.optimizer import Optimizer, Schedule
from moi_jax.training.state import TrainState, state_shardings

Metrics = dict[str, jax.Array]
# (trainable, frozen, microbatch) -> sum(w nll), and the sums for all metrics.
LossSums = Callable[[Tree, Tree, Batch], tuple[jax.Array, Metrics]]
SumsAndGradients = tuple[tuple[jax.Array, Metrics], Tree]
TrainStep = Callable[[TrainState, Batch, np.float32], tuple[TrainState, Metrics]]


def make_train_step(
    config: ModelConfig,
    bind: Bind,
    optimizer: Optimizer,
    schedule: Schedule,
    domains: int,
    mesh: Mesh,
    gradient_dtype: jax.typing.DTypeLike = "float32",
) -> TrainStep:
    """Makes the jitted step: (state, batch [A, M, S], max_loss) -> (state, metrics).

    The state is donated. The loss is sum(w nll) / sum(w) over the whole batch: all A microbatches
    and all devices. The update is applied only if the loss is at most max_loss, loss and gradient
    norm are finite and some weight is not zero (the metric `applied`). Otherwise parameters and
    moments stay, and only the step counts up.

    Args:
      gradient_dtype: of the gradients until the update, and of their sum over microbatches. In
        float32 a gradient that is wider stays so.
    """
    state = state_shardings(config, optimizer, mesh)
    return jax.jit(
        partial(_train_step, bind, optimizer, schedule, domains, jnp.dtype(gradient_dtype)),
        in_shardings=(state, batch_sharding(mesh), replicated(mesh)),
        out_shardings=(state, replicated(mesh)),
        donate_argnums=0,
    )


def _train_step(
    bind: Bind,
    optimizer: Optimizer,
    schedule: Schedule,
    domains: int,
    gradient_dtype: jnp.dtype,
    state: TrainState,
    batch: Batch,
    max_loss: jax.Array,
) -> tuple[TrainState, Metrics]:
    trained = optimizer.trained
    loss_sums = partial(microbatch_sums, bind, domains)
    (weighted, sums), gradients = _batch_sums(loss_sums, trained, gradient_dtype, state, batch)
    scale = 1 / jnp.where(sums["weights"] > 0, sums["weights"], 1)
    gradients = jax.tree.map(lambda g: g * scale.astype(g.dtype), jax.tree.map(_widened, gradients))
    loss, gradient_norm = weighted * scale, optax.tree.norm(gradients)
    applied = jnp.isfinite(loss) & jnp.isfinite(gradient_norm) & (sums["weights"] > 0)
    applied &= loss <= max_loss

    learning_rate = jnp.asarray(schedule(state.step), jnp.float32)
    before = trained.part(state.trainable)
    updates, opt_state = optimizer.update(gradients, state.opt_state, before)
    after = jax.tree.map(lambda p, u: (p - learning_rate * u).astype(p.dtype), before, updates)
    opt_state = optimizer.follow(opt_state, after)
    after, opt_state = jax.tree.map(
        lambda new, old: jnp.where(applied, new, old), (after, opt_state), (before, state.opt_state)
    )
    trainable = trained.put(state.trainable, after)
    metrics = sums | {
        "loss": loss,
        "grad_norm": gradient_norm,
        "learning_rate": learning_rate,
        "applied": applied,
    }
    return TrainState(state.step + 1, trainable, state.frozen, opt_state), metrics


def microbatch_sums(
    bind: Bind, domains: int, trainable: Tree, frozen: Tree, batch: Batch
) -> tuple[jax.Array, Metrics]:
    """Computes sum(w nll) of a microbatch [M, S], and the sums for all metrics.

    They are sums, never means: over microbatches and devices they add up to those of the batch.
    """
    model = bind(trainable, frozen)
    hidden = model.hidden_states(
        batch.tokens, batch.positions, batch.segment_ids, extend_context=False
    )
    weighted, nll = weighted_nll(hidden, model.head_kernel(), batch.targets, batch.loss_weights)
    counts = batch.loss_weights > 0
    in_domain = batch.domain_ids[..., None] == jnp.arange(domains)
    return weighted, {
        "weights": jnp.sum(batch.loss_weights.astype(nll.dtype)),
        "nll": jnp.sum(nll),
        "loss_tokens": jnp.sum(counts, dtype=jnp.int32),
        "tokens": jnp.sum(batch.segment_ids > 0, dtype=jnp.int32),
        "domain_nll": jnp.sum(jnp.where(in_domain, nll[..., None], 0), axis=(0, 1)),
        "domain_loss_tokens": jnp.sum(in_domain & counts[..., None], axis=(0, 1), dtype=jnp.int32),
    }


def _batch_sums(
    loss_sums: LossSums, trained: Trained, dtype: jnp.dtype, state: TrainState, batch: Batch
) -> SumsAndGradients:
    """Computes the sums over the microbatches of [A, M, S], and the gradients of sum(w nll).

    The gradients are those of the trained part of the parameters.
    """
    cast = _widened if dtype == jnp.float32 else lambda gradient: gradient.astype(dtype)

    def of(microbatch: Batch) -> SumsAndGradients:
        gradient = jax.value_and_grad(loss_sums, has_aux=True)
        sums, gradients = gradient(state.trainable, state.frozen, microbatch)
        return sums, jax.tree.map(cast, trained.part(gradients))

    def add(total: SumsAndGradients, microbatch: Batch) -> tuple[SumsAndGradients, None]:
        return jax.tree.map(jnp.add, total, of(microbatch)), None

    first = jax.tree.map(lambda x: x[0], batch)
    if batch.tokens.shape[0] == 1:
        # Adding them to zeros would take the memory of the gradients twice.
        return of(first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of, first))
    return jax.lax.scan(add, zeros, batch)[0]


def _widened(gradient: jax.Array) -> jax.Array:
    return gradient.astype(jnp.promote_types(gradient.dtype, jnp.float32))
